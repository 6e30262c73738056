"""The processes of a run: accelerate's Accelerator, made from our settings and from what `accelerate launch` put into the environment."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator, AutocastKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, GradientAccumulationPlugin, parse_flag_from_env
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.integrations import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from stableavatar.machine import named_precision
from stableavatar.parallel.launch import PATIENCE
from stableavatar.sampling.offload import resolve_device
from stableavatar.training.config import TrainConfig

Result = TypeVar("Result")

MIXED_PRECISION = {torch.float32: "no", torch.bfloat16: "bf16"}


def training_dtype(config: TrainConfig) -> torch.dtype:
    """What `config.dtype` says, on this machine."""
    return named_precision(config.dtype, resolve_device(config.device))


def make_accelerator(config: TrainConfig) -> Accelerator:
    """An accelerator that leaves the data to us: every process asks its part of the plan for itself.

    Under FSDP weights stay in float32 and autocast computes, as everywhere else; the library's policy would round timesteps to bfloat16.

    Raises:
        ValueError: settings that the launcher's strategy cannot follow.
    """
    on_cpu, deepspeed = resolve_device(config.device).type == "cpu", parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    accelerator = Accelerator(
        mixed_precision=MIXED_PRECISION[training_dtype(config)],
        cpu=on_cpu and not deepspeed,  # accelerate's cpu=True would do without DeepSpeed
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulation, sync_with_dataloader=False),
        kwargs_handlers=[
            InitProcessGroupKwargs(backend="gloo" if on_cpu and deepspeed else None, timeout=PATIENCE),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of the gradients
            AutocastKwargs(cache_enabled=False),  # a weight is used once in a forward: its cast need not be kept
        ],
    )
    if on_cpu and parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.num_processes > 1:
        # accelerate asks for FSDP on accelerators only; over gloo the same code runs.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if not accelerator.is_main_process:
        _be_quiet()
    kind = strategy(accelerator)
    if kind == "fsdp":
        if not accelerator.is_fsdp2:
            raise ValueError("FSDP needs fsdp_version: 2 in the accelerate configuration, such as accelerate_config/fsdp.yaml")
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if kind.startswith("zero"):
        _fill_deepspeed(accelerator, config)
    elif config.optimizer.name in ("came", "adamw8bit") and kind == "fsdp":
        raise ValueError(f"optimizer.name={config.optimizer.name} does not go with FSDP, which splits matrices; use adamw, muon or DDP")
    return accelerator


def _be_quiet() -> None:
    """What every process would say is said by one."""
    logging.getLogger("stableavatar").setLevel(logging.ERROR)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _fill_deepspeed(accelerator: Accelerator, config: TrainConfig) -> None:
    """DeepSpeed clips and counts for itself and has to be told how."""
    if config.optimizer.clip_mode != "constant":
        raise ValueError("optimizer.clip_mode=adaptive does not go with DeepSpeed, which clips by itself; use constant, DDP or FSDP")
    if config.optimizer.name not in ("adamw", "adamw8bit"):
        raise ValueError(f"optimizer.name={config.optimizer.name} does not go with DeepSpeed, which flattens matrices; use adamw or DDP")
    if config.optimizer.ema and strategy(accelerator) == "zero3":
        raise ValueError("optimizer.ema does not go with ZeRO-3, where no process holds the weights; use ZeRO-2 or FSDP")
    unset_hf_deepspeed_config()  # with ZeRO-3 transformers would share out the encoders as it reads them
    plugin = accelerator.state.deepspeed_plugin
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": config.batch,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.optimizer.clip,
        "zero_allow_untested_optimizer": True,
    }


def strategy(accelerator: Accelerator) -> str:
    """How the processes share the work: ddp (also for one process), fsdp, zero1, zero2 or zero3."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    return "ddp"


def has_parts_only(accelerator: Accelerator) -> bool:
    """Whether a process holds only a part of the weights, so that every forward needs all processes."""
    return strategy(accelerator) in ("fsdp", "zero3")


class DataParallel(NamedTuple):
    """A process among those that have samples of their own; processes that share a sequence, which are consecutive, count as one."""

    rank: int
    size: int


def data_parallel(accelerator: Accelerator, config: TrainConfig) -> DataParallel:
    """Where this process is. Raises ValueError if the processes cannot be divided into groups that share sequences."""
    share, started = config.parallel.size, accelerator.num_processes
    if started % share:
        asked = f"parallel.ulysses={config.parallel.ulysses} x parallel.ring={config.parallel.ring}"
        raise ValueError(f"{asked} processes share each sample, but {started} were started, no multiple of {share}; "
                         "start as many by accelerate launch (scripts/train.sh)")
    return DataParallel(accelerator.process_index // share, started // share)


def sum_over_processes(accelerator: Accelerator, values: dict[str, float | Tensor]) -> dict[str, float]:
    """Sums of scalars over all processes."""
    stacked = torch.stack([torch.as_tensor(value, dtype=torch.float64).cpu() for value in values.values()])
    if accelerator.num_processes > 1:
        on_device = stacked.to(accelerator.device, torch.float32 if accelerator.device.type == "mps" else torch.float64)
        stacked = accelerator.reduce(on_device, "sum").cpu()
    return dict(zip(values, stacked.tolist(), strict=True))


def gather_objects(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other, on every process."""
    if accelerator.num_processes == 1:
        return items
    gathered: list[list[Any]] = [[] for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What the main process gets from `work`, on every process; its ValueError or OSError is everybody's, as a ValueError."""
    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            told[0] = work()
        except (ValueError, OSError) as error:
            told[1] = str(error)
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(told)
    if told[1] is not None:
        raise ValueError(told[1])
    return told[0]

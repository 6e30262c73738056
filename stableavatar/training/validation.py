"""Seeing it learn: the loss on held-out clips, and videos with sound of fixed cases."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from stableavatar.cases import check_inputs, make_video, plan_case, read_cases
from stableavatar.config import InferenceConfig, ParallelConfig, load_config
from stableavatar.data.buckets import EpochPlan, assign
from stableavatar.data.dataset import ClipDataset
from stableavatar.data.samples import stack
from stableavatar.pipeline import StableAvatarPipeline
from stableavatar.training.config import TrainConfig, parse_lengths, parse_sizes
from stableavatar.training.encode import SampleEncoder
from stableavatar.training.learner import Learner
from stableavatar.training.objective import Objective, without_drops
from stableavatar.training.processes import data_parallel, has_parts_only, on_main, sum_over_processes
from stableavatar.training.source import list_clips


def read_validation_cases(config: TrainConfig) -> list[InferenceConfig]:
    """The cases of `validation.cases` with the settings of `validation.config`; their inputs are read once, to find mistakes early."""
    if not (config.validation.every and config.validation.cases):
        return []
    shared = load_config(InferenceConfig, config.validation.config or None)
    cases = [plan_case(shared, row, number) for number, row in enumerate(read_cases(config.validation.cases), 1)]
    for case in cases:
        if case.parallel != ParallelConfig():
            raise ValueError("validation videos are made by the processes that train, as they are; take parallel out of validation.config")
        check_inputs(case)
    return cases


class HeldOut:
    """Clips that are not trained on, and the loss on them: the same noise, levels and frames every time, on any number of processes."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator, data = config, accelerator, config.data
        self._place = data_parallel(accelerator, config)
        clips, broken = on_main(accelerator, lambda: list_clips(data, data.validation_lists, None))
        if broken:
            raise ValueError(f"{len(broken)} held-out clips are broken, first {next(iter(broken.items()))}")
        buckets, _ = assign(clips, parse_sizes(data.sizes), parse_lengths(data.frames), data.fps)
        if not buckets:
            raise ValueError(f"no clip of data.validation_lists={data.validation_lists} is long enough for data.frames={data.frames}")
        self.dataset = ClipDataset(clips, buckets, data.fps, data.seed)
        self.plan = EpochPlan(buckets, config.seed, 1, self._place.size, config.batch, 1)
        self.objective = Objective(without_drops(config.objective), config.seed)

    @torch.no_grad()
    def loss(self, learner: Learner, encoder: SampleEncoder) -> float:
        """Mean squared error of the velocity over the held-out clips; called by all processes."""
        total = {"loss": 0.0, "count": 0.0}
        for items in self.plan.forwards(0, 0, self._place.rank):
            levels = {"step": 0, "of": len(self.dataset.clips)}  # spread over all clips, however many make up a step
            samples = [self.dataset[replace(item, slot=item.clip, **levels)].value for item in items]
            batch = stack(encoder.encode(samples), learner.text_length, self.accelerator.device)
            with self.accelerator.autocast():
                losses = self.objective(learner.model, batch)
            total["loss"] += float((losses.parts["velocity"] * batch.weights).sum())
            total["count"] += float(batch.weights.sum())
        total = sum_over_processes(self.accelerator, total)
        return total["loss"] / total["count"]


class Validation:
    """Losses and videos of one run.

    Args:
        folder: of the run.

    Raises:
        ValueError: cases or held-out clips that cannot be used.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, folder: Path) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.cases = on_main(accelerator, lambda: read_validation_cases(config))
        self.held_out = HeldOut(config, accelerator) if config.data.validation_lists else None

    @property
    def needs_encoders(self) -> bool:
        """Whether it needs what is frozen while training."""
        return bool(self.cases or self.held_out)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of the videos."""
        return [(case.width, case.height) for case in self.cases]

    def loss(self, learner: Learner, encoder: SampleEncoder) -> float:
        """The loss on held-out clips, with the averaged weights if there are any."""
        with evaluating(learner):
            return self.held_out.loss(learner, encoder)

    def videos(self, step: int, learner: Learner, encoder: SampleEncoder) -> None:
        """Makes the videos of all cases, shared among the processes; those that share a sequence work together on each, and where each
        has only a part of the weights, all do."""
        if not self.cases:
            return
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        together = processes if has_parts_only(self.accelerator) else self.config.parallel.size
        device = self.accelerator.device.type if self.accelerator.device.type == "cpu" else str(self.accelerator.device)  # gloo's is cpu:0
        with evaluating(learner), self.accelerator.autocast(), encoder.resident():
            pipeline = StableAvatarPipeline(learner.transformer, **encoder.parts)
            pipeline.set_progress_bar_config(disable=True)
            for number, case in enumerate(self.cases):
                output = self.folder / "validation" / f"step_{step:06d}" / f"case_{number + 1:03d}.mp4"
                case = replace(case, output=str(output), device=device, work_dir="", frames_dir="")
                first = number * together % processes
                if rank == first:
                    make_video(pipeline, case)
                elif first < rank < first + together:
                    for _ in pipeline.stream(case.reference, case.audio, case.prompt, case):
                        pass
        self.accelerator.wait_for_everyone()


@contextmanager
def evaluating(learner: Learner) -> Iterator[None]:
    """The model in evaluation mode, with the averaged weights if there are any."""
    learner.model.eval()
    try:
        with learner.ema.swapped() if learner.ema else nullcontext():
            yield
            reshard(learner.model)
    finally:
        learner.model.train()


def reshard(model: nn.Module) -> None:
    """Lets go of the weights that FSDP keeps whole for a backward pass that will not come: the next forward would take them as they are."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

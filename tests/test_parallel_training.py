"""Training on several processes: data parallelism under every strategy and processes that share sequences = one process."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from make_tiny_model import tiny_transformer
from safetensors.torch import load_file
from train_runs import clip_list, finish, last_checkpoint, launch, losses, metrics, run, tiny_words, video_words

from stableavatar.config import load_config, override
from stableavatar.parallel.mesh import Mesh
from stableavatar.parallel.sequence import apply_sequence_parallel
from stableavatar.training.config import TrainConfig
from stableavatar.training.cost import Precision, Reading, make_inputs, measure, step_cost
from stableavatar.training.learner import check_sharing
from stableavatar.training.processes import data_parallel
from stableavatar.training.trainer import Trainer
from stableavatar.training.validation import read_validation_cases

SEVERAL = ["max_steps=4", "optimizer.eps=1e-6", "optimizer.ema=0.5", "data.sizes=48x32"]  # 6 tokens per frame
TOGETHER = "accumulation=2"  # one process, or several that share all samples, take the two samples of a step one after the other
RELEASED = "transformer3d.safetensors"
LORA = ["what=lora", "lora.rank=2", "max_steps=2", TOGETHER]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """The path list of five clips: the last step of an epoch has a filler."""
    return clip_list(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def words(tiny_folder, clips) -> list[str]:
    """Settings of a tiny run of two samples a step, when each process has its own."""
    return [*tiny_words(tiny_folder, clips), *SEVERAL]


@pytest.fixture(scope="module")
def one_process(words, clips, tmp_path_factory) -> Path:
    """The runs of one process: `whole` and `lora`."""
    output = tmp_path_factory.mktemp("one")
    run(words, output / "whole", TOGETHER, f"data.validation_lists={clips}")
    run(words, output / "lora", *LORA)
    return output


@pytest.mark.parametrize(
    "strategy, processes, first, then",
    [
        ("ddp", 2, [], [TOGETHER, "parallel.ring=2"]),
        ("fsdp", 2, [], [TOGETHER, "parallel.ulysses=2"]),
        ("zero2", 4, ["parallel.ulysses=2"], ["parallel.ring=2"]),
        ("zero3", 2, [], [TOGETHER, "parallel.ulysses=2"]),
    ],
)
def test_several_processes_are_one(words, clips, portrait, make_voice, one_process, tmp_path, strategy, processes, first, then):
    """Three steps on one mesh, one on another; validations on the way change nothing; what is saved for use is the whole model."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    looks = [*video_words(tmp_path, portrait, make_voice(9600)), "validation.every=2", f"data.validation_lists={clips}"]
    extra, output = ["optimizer.ema=0"] if strategy == "zero3" else looks, tmp_path / "run"
    own = [*words, *extra, f"output={output}"]
    lora = [[*words, *LORA, "parallel.ulysses=2", f"output={tmp_path / 'lora'}"]] if strategy == "ddp" else []
    finish(launch(strategy, processes, [[*own, *first, "max_steps=3"], [*own, *then, "resume=latest"], *lora]))
    averaged = strategy != "zero3"  # whose weights for use, without an average, are others
    assert_same_run(output, one_process / "whole", RELEASED if averaged else "")
    assert validation_loss(output) == (pytest.approx(validation_loss(one_process / "whole"), rel=2e-5) if averaged else None)
    if lora:
        assert_same_run(tmp_path / "lora", one_process / "lora", "lora.safetensors")


def assert_same_run(output: Path, expected: Path, file: str) -> None:
    """Same losses, numbers of samples and tokens; the same weights in a file for use, if one is named."""
    assert losses(metrics(output)) == pytest.approx(losses(metrics(expected)), rel=2e-5)
    assert samples(output) == samples(expected)
    assert tokens(output) == pytest.approx(tokens(expected))
    if file:
        ours, theirs = (load_file(last_checkpoint(path) / file) for path in (output, expected))
        assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=2e-5) for name in theirs)


def tokens(output: Path) -> list[float]:
    """Of all processes, step by step."""
    return [line["tokens_per_second"] * line["seconds_per_step"] for line in metrics(output) if "loss" in line]


def validation_loss(output: Path) -> float | None:
    """Of the last checkpoint; None without one."""
    return ([None] + [line["validation_loss"] for line in metrics(output) if "validation_loss" in line])[-1]


def samples(output: Path) -> int:
    """That a run has seen."""
    return json.loads((last_checkpoint(output) / "run.json").read_text())["seen"]


def accelerator(processes: int, index: int = 0) -> SimpleNamespace:
    """What data_parallel asks of one."""
    return SimpleNamespace(num_processes=processes, process_index=index)


def test_processes_next_to_each_other_share_samples():
    config = override(TrainConfig(), {"parallel.ulysses": 2, "parallel.ring": 2})
    assert [data_parallel(accelerator(8, index), config) for index in (0, 3, 4, 7)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    with pytest.raises(ValueError, match="parallel.ulysses=2 x parallel.ring=2 processes share each sample, but 6 were started"):
        data_parallel(accelerator(6), config)


@pytest.mark.parametrize("mesh, said", [({"ulysses": 8}, "4 attention heads"), ({"ring": 8}, "6 tokens of a frame")])
def test_a_mesh_that_is_too_large_for_the_model_is_told_before_it_is_loaded(tiny_folder, mesh, said):
    config = override(TrainConfig(), {"model": str(tiny_folder), **{f"parallel.{name}": size for name, size in mesh.items()}})
    with pytest.raises(ValueError, match=said):
        check_sharing(config, accelerator(8), [(512, 512), (48, 32)])


def test_a_mesh_that_does_not_go_with_other_settings_is_told(tiny_folder, portrait, make_voice, tmp_path):
    with pytest.raises(ValueError, match="parallel.ring=2 needs attention's log-sum-exp, which attention=_native_math lacks"):
        load_config(TrainConfig, None, ["parallel.ring=2", "attention=_native_math"])
    words = [*video_words(tmp_path, portrait, make_voice(9600)), "validation.every=1"]
    (tmp_path / "video.yaml").write_text("{parallel: {windows: 2}}")
    with pytest.raises(ValueError, match="take parallel out of validation.config"):
        read_validation_cases(load_config(TrainConfig, None, words))


def test_a_clip_that_only_one_of_those_that_share_it_can_read_is_noticed():
    config = override(TrainConfig(), {"parallel.ulysses": 3})

    def difference(*names: str) -> int:
        """Over two groups of three processes."""
        return sum(
            Trainer._difference(SimpleNamespace(config=config, accelerator=accelerator(6, rank)), [[read(name)]])
            for rank, name in enumerate(names)
        )

    def read(name: str) -> SimpleNamespace:
        return SimpleNamespace(value=SimpleNamespace(name=name, item=0))

    assert difference("a", "a", "a", "b", "b", "b") == 0
    assert difference("a", "a", "a", "b", "b", "c") != 0 and difference("a", "b", "b", "c", "c", "c") != 0


SHAPE = (3, 12, 16)


def reading(ulysses: int, ring: int) -> Reading:
    """Of a real forward and backward of this process."""
    model = tiny_transformer(num_layers=4).train()
    apply_sequence_parallel(model, Mesh.over("cpu", ulysses=ulysses, ring=ring))
    return measure(model, make_inputs(model, SHAPE, 1), Precision(autocast=False))


def readings() -> list[Reading]:
    """With heads exchanged, and around a ring."""
    return [reading(2, 1), reading(1, 2)]


def test_the_estimate_for_those_that_share_a_sample_is_what_each_computes_and_holds(crew):
    by_heads, around = crew.run(2, readings)[0]
    cost, whole = (step_cost(tiny_transformer(num_layers=4), SHAPE, 1, Precision(autocast=False), share) for share in (2, 1))
    assert cost.flops == by_heads.flops == around.flops < whole.flops
    assert cost.activations < whole.activations
    assert cost.activations == pytest.approx(max(by_heads.forward_peak, by_heads.backward_peak), rel=0.01)
    assert cost.activations == pytest.approx(max(around.forward_peak, around.backward_peak), rel=0.01)

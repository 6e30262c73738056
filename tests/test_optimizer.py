import copy
import io
import math
import sys
from dataclasses import replace

import pytest
import torch
from make_tiny_model import tiny_transformer
from peft import LoraConfig
from torch import nn

from stableavatar.models.dit import AvatarTransformer
from stableavatar.models.layout import TokenLayout
from stableavatar.training.config import OptimizerConfig
from stableavatar.training.ema import Ema
from stableavatar.training.optimizer import MuonAdamW, clip_gradients, clip_limit, make_optimizer, make_schedule, orthogonal
from stableavatar.training.trainable import parameter_groups, region, select, to_training_dtype, trained

CONFIG = OptimizerConfig(lr=1e-2, warmup=2)
PACKAGES = {"adamw8bit": "bitsandbytes", "came": "came_pytorch"}
OPTIMIZERS = ("adamw", "adamw8bit", "muon", "came")


def config_or_skip(name: str) -> OptimizerConfig:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return replace(CONFIG, name=name)


def fill_gradients(model: nn.Module, seed: int, size: float = 1.0) -> None:
    """Random gradients for what trains, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(model).values():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def add_lora(model: AvatarTransformer) -> None:
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["q", "k", "k_audio"]))


# What trains


def test_each_choice_trains_what_it_says(dit):
    names = {name for name, _ in dit.named_parameters()}
    adapter = {name for name in names if name.startswith("audio_adapter.")}
    blocks = {name for name in names if name.startswith("blocks.")}
    attention = {name for name in blocks if name.split(".")[2] in ("self_attn", "cross_attn")}
    sets = {"attention": adapter | attention, "blocks": adapter | blocks, "all": names}
    for what, expected in [*sets.items(), *reversed(sets.items())]:
        select(dit, what)
        assert set(trained(dit)) == expected
    assert len(attention) < len(blocks) and "blocks.0.cross_attn.k_audio.weight" in attention
    with pytest.raises(ValueError, match="attention, blocks or all, got 'lora'"):
        select(dit, "lora")


@pytest.mark.parametrize("adapter", ["full", "no_modulation"])
def test_trained_weights_are_float32_and_the_network_still_runs(adapter, make_conditions):
    model = tiny_transformer(adapter=adapter)
    select(model, "attention")
    to_training_dtype(model, torch.bfloat16)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert {tensor.dtype for name, tensor in tensors.items() if name in trained(model)} == {torch.float32}
    kept = [name for name in tensors if "modulation" in name or name.startswith(("time_embedding", "time_projection"))]
    assert {tensors[name].dtype for name in kept} == {torch.float32}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in {*kept, *trained(model)}} == {torch.bfloat16}

    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 16, 3, 4, 6), torch.tensor([500.0]), make_conditions(), TokenLayout.full(3)).float().square().mean().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(trained(model))
    assert all(parameter.grad.isfinite().all() for parameter in trained(model).values())


# Groups


def test_every_weight_is_in_the_group_of_its_rate_and_decay(dit):
    config = replace(CONFIG, lr=1.0, adapter_lr=2.0, audio_lr=3.0, weight_decay=0.5)
    groups = parameter_groups(dit, config)
    where = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(where) == sum(len(group["params"]) for group in groups) == len(list(dit.parameters()))

    def rate_and_decay(name: str) -> tuple[float, float]:
        group = where[id(dit.get_parameter(name))]
        return group["lr"], group["weight_decay"]

    assert rate_and_decay("audio_adapter.blocks.0.cross_attn.k.weight") == (2.0, 0.5)
    assert rate_and_decay("audio_adapter.projection.1.weight") == rate_and_decay("audio_adapter.head.modulation") == (2.0, 0.0)
    assert rate_and_decay("blocks.1.cross_attn.v_audio.weight") == (3.0, 0.5)
    assert rate_and_decay("blocks.1.cross_attn.k_audio.bias") == (3.0, 0.0)
    assert rate_and_decay("blocks.0.ffn.0.weight") == rate_and_decay("patch_embedding.weight") == (1.0, 0.5)
    for name in ("blocks.0.modulation", "blocks.0.norm3.weight", "blocks.0.self_attn.norm_q.weight", "head.modulation", "head.head.bias"):
        assert rate_and_decay(name) == (1.0, 0.0)
    assert len({group["name"] for group in groups}) == len(groups) == 8


def test_rates_of_zero_are_that_of_the_rest_and_frozen_weights_are_in_no_group(dit):
    select(dit, "attention")
    groups = parameter_groups(dit, CONFIG)
    assert {group["lr"] for group in groups} == {CONFIG.lr}
    assert {group["name"].partition("_")[0] for group in groups} == {"adapter", "audio", "blocks"}
    assert sum(len(group["params"]) for group in groups) == len(trained(dit))


def test_low_rank_updates_belong_to_what_they_update(dit):
    add_lora(dit)
    dit.audio_adapter.head.requires_grad_(True)
    regions = {name: region(name) for name in trained(dit)}
    assert {name.split(".")[3] for name, part in regions.items() if part == "audio"} == {"k_audio"}
    assert {name.split(".")[3] for name, part in regions.items() if part == "blocks"} == {"q", "k"}
    assert any("lora_A" in name for name, part in regions.items() if part == "adapter")
    assert "other" not in regions.values()
    decays = {group["name"]: group["weight_decay"] for group in parameter_groups(dit, CONFIG)}
    assert {name: decay > 0 for name, decay in decays.items()} == {"adapter": True, "adapter_vectors": False, "audio": True, "blocks": True}


# Optimisers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_optimizer_goes_on_exactly(name, dit):
    config = config_or_skip(name)
    select(dit, "attention")

    def build(model: nn.Module):
        optimizer = make_optimizer(parameter_groups(model, config), config)
        return optimizer, make_schedule(optimizer, config, 10)

    def go(model: nn.Module, optimizer, schedule, steps: range) -> None:
        for step in steps:
            fill_gradients(model, step)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    before = weights(dit)
    optimizer, schedule = build(dit)
    go(dit, optimizer, schedule, range(3))
    twin, file = copy.deepcopy(dit), io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, file)
    go(dit, optimizer, schedule, range(3, 6))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = build(twin)
    others[0].load_state_dict(saved["optimizer"])
    others[1].load_state_dict(saved["schedule"])
    go(twin, *others, range(3, 6))
    assert same(weights(dit), weights(twin))
    assert {key for key, value in weights(dit).items() if not torch.equal(value, before[key])} == set(trained(dit))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name):
    config = replace(config_or_skip(name), weight_decay=0.0)
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.Linear(64, 64), "head": nn.Linear(64, 64)})
    x, target = torch.randn(256, 64), torch.randn(256, 64) @ torch.randn(64, 64) / 8
    optimizer = make_optimizer(parameter_groups(model, config), config)
    history = []
    for _ in range(100):
        loss = (model["head"](model["blocks"](x)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.9 * history[0], history


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(dit):
    config = config_or_skip("muon")
    optimizer = make_optimizer(parameter_groups(dit, config), config)
    fill_gradients(dit, 0)
    optimizer.step()
    by_muon = {name for name, parameter in dit.named_parameters() if "momentum_buffer" in optimizer.state[parameter]}
    by_adamw = {name for name, parameter in dit.named_parameters() if "exp_avg_sq" in optimizer.state[parameter]}
    assert by_muon == {name for name, p in dit.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    assert by_muon | by_adamw == {name for name, _ in dit.named_parameters()} and not by_muon & by_adamw


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32)])
def test_muon_moves_as_the_librarys(shape):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    config = replace(CONFIG, name="muon", lr=0.1, weight_decay=0.1)
    torch.manual_seed(0)
    ours = nn.Linear(*shape[::-1], bias=False)
    theirs = copy.deepcopy(ours)
    start = ours.weight.detach().clone()
    groups = [{"name": "blocks", "params": [ours.weight], "lr": 0.1, "weight_decay": 0.1}]
    for optimizer in (
        MuonAdamW(groups, config),
        torch.optim.Muon(theirs.parameters(), 0.1, weight_decay=0.1, momentum=config.beta1, adjust_lr_fn="match_rms_adamw"),
    ):
        generator = torch.Generator().manual_seed(1)
        weight = optimizer.param_groups[0]["params"][0]
        for _ in range(3):
            weight.grad = torch.randn(shape, generator=generator)
            optimizer.step()
    moved = (theirs.weight - start).norm()
    assert (ours.weight - theirs.weight).norm() < 0.02 * moved, "more than rounding to bfloat16"


def test_orthogonal_sets_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(16, 64, generator=generator)).float())
    assert values.min() > 0.6 and values.max() < 1.3, values


def test_muon_with_matrices_alone_and_with_a_closure():
    config = config_or_skip("muon")
    model = nn.ModuleDict({"blocks": nn.Linear(4, 4, bias=False)})
    optimizer = MuonAdamW(parameter_groups(model, config), config)

    def closure() -> torch.Tensor:
        loss = model["blocks"](torch.ones(1, 4)).square().sum()
        loss.backward()
        return loss

    before = weights(model)
    assert optimizer.step(closure).item() > 0
    assert not same(before, weights(model))


@pytest.mark.parametrize(("name", "package"), [("adamw8bit", "bitsandbytes"), ("came", "came-pytorch")])
def test_a_missing_package_is_named(name, package, dit, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(ValueError, match=f"^optimizer.name={name} needs {package}, which is not installed: pip install {package}$"):
        make_optimizer(parameter_groups(dit, CONFIG), replace(CONFIG, name=name))


# Schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.5, *(1 - i / 8 for i in range(9))]),
        ("cosine", [0, 0.5, *((1 + math.cos(math.pi * i / 8)) / 2 for i in range(9))]),
    ],
)
def test_schedules_keep_the_groups_ratios(schedule, expected, dit):
    config = replace(CONFIG, schedule=schedule, adapter_lr=2e-2)
    optimizer = make_optimizer(parameter_groups(dit, config), config)
    learning_rate = make_schedule(optimizer, config, total_steps=10)
    for factor in expected:
        for group in optimizer.param_groups:
            rate = 2e-2 if group["name"].startswith("adapter") else 1e-2
            assert group["lr"] == pytest.approx(rate * factor, abs=1e-12)
        optimizer.step()
        learning_rate.step()


# Clipping


@pytest.mark.parametrize(
    ("step", "norm", "limit"),
    [
        (0, 9.0, 0.5),
        (500, 9.0, 0.3),
        (999, 9.0, 0.1004),
        (1000, 0.01, 0.1),
        (1000, 0.5, 0.1),
        (1000, 0.6, 0.1 / 6),
        (5000, 1.0, 0.01),
        (5000, 70.0, 0.01),
    ],
)
def test_adaptive_limits_by_hand(step, norm, limit):
    config = replace(CONFIG, clip=0.1, clip_mode="adaptive", clip_start=1000, clip_ratio=5.0)
    assert clip_limit(config, step, norm) == pytest.approx(limit)
    assert clip_limit(replace(config, clip_mode="constant"), step, norm) == 0.1
    assert clip_limit(replace(config, clip=0.0), step, norm) == math.inf


@pytest.mark.parametrize(("size", "settings", "expected"), [(100.0, {}, 0.05), (1e-5, {}, None), (100.0, {"clip": 0.0}, None)])
def test_gradients_keep_to_the_limit_and_small_ones_stay(size, settings, expected, dit):
    select(dit, "attention")
    fill_gradients(dit, 0, size)
    before = {name: parameter.grad.clone() for name, parameter in trained(dit).items()}
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in before.values()))
    assert clip_gradients(dit.parameters(), replace(CONFIG, **settings), 0) == pytest.approx(norm)
    after = {name: parameter.grad for name, parameter in trained(dit).items()}
    if expected is None:
        assert same(before, after)
    else:
        assert all(torch.allclose(after[name], before[name] * expected / norm, rtol=1e-4) for name in before)


def test_sharded_gradients_are_clipped_by_the_norm_of_the_whole():
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        parameter = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
        parameter.grad = distribute_tensor(torch.full((4,), 3.0), mesh, [Shard(0)])
        assert clip_gradients([parameter], replace(CONFIG, clip=0.6), 0) == 6
        assert torch.allclose(parameter.grad.full_tensor(), torch.full((4,), 0.3))
    finally:
        destroy_process_group()


# Moving average


def test_the_average_by_hand():
    model = nn.Linear(1, 1, bias=False).requires_grad_(True)
    ema = Ema(model, decay=0.5)
    values = [1.0, 3.0, 7.0]
    for value in values:
        model.weight.data.fill_(value)
        ema.step()
    first, second = min(0.5, 2 / 11), min(0.5, 3 / 12)  # the library's growing decay, after a first step that copies
    expected = second * (first * 1 + (1 - first) * 3) + (1 - second) * 7
    with ema.swapped():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averaged_weights_swap_in_and_out_exactly(dtype, dit):
    dit.to(dtype)
    select(dit, "attention")
    ema = Ema(dit, 0.9)
    for step in range(3):
        for name, parameter in trained(dit).items():
            parameter.data.add_(torch.full_like(parameter, 0.01 * (step + 1) * (len(name) % 3 + 1)))
        ema.step()
    before = weights(dit)
    with pytest.raises(RuntimeError), ema.swapped():
        changed = {name for name, tensor in weights(dit).items() if not torch.equal(tensor, before[name])}
        assert changed == set(trained(dit))
        raise RuntimeError
    assert same(before, weights(dit))
    state = ema.state_dict()
    assert {shadow.dtype for shadow in state["shadow_params"]} == {torch.float32} and len(state["shadow_params"]) == len(trained(dit))


def test_a_saved_average_goes_on_exactly_after_the_weights_were_replaced(dit):
    select(dit, "attention")

    def go(model: nn.Module, ema: Ema, steps: range) -> None:
        for step in steps:
            fill_gradients(model, step)
            for parameter in trained(model).values():
                parameter.data.sub_(0.1 * parameter.grad)
            ema.step()

    ema = Ema(dit, 0.99)
    go(dit, ema, range(3))
    file, saved = io.BytesIO(), weights(dit)
    torch.save(ema.state_dict(), file)
    go(dit, ema, range(3, 6))

    file.seek(0)
    twin = tiny_transformer()
    select(twin, "attention")
    other = Ema(twin, 0.99)
    twin.load_state_dict(saved, assign=True)
    select(twin, "attention")
    other.load_state_dict(torch.load(file, weights_only=True))
    go(twin, other, range(3, 6))
    with ema.swapped(), other.swapped():
        assert same(weights(dit), weights(twin))

    select(twin, "blocks")
    with pytest.raises(ValueError, match="resume with the same what"):
        Ema(twin, 0.99).load_state_dict(ema.state_dict())

"""Sequence parallelism: several processes give the velocity and the gradients of one."""

from collections.abc import Callable
from dataclasses import replace
from math import prod

import pytest
import torch
import torch.distributed as dist
from make_tiny_model import tiny_transformer

from stableavatar.models.cache import KVCache
from stableavatar.models.dit import AudioFeatures, AudioTokens, AvatarTransformer, Conditions
from stableavatar.models.layout import TokenLayout
from stableavatar.parallel.mesh import Mesh
from stableavatar.parallel.sequence import apply_sequence_parallel, check_sequence
from stableavatar.parallel.traffic import Traffic
from stableavatar.parallel.ulysses import split_sizes

FRAMES, HEIGHT, WIDTH, TOKENS = 3, 6, 10, 15  # an odd number of tokens per frame: no mesh of several divides it
FULL = TokenLayout.full(FRAMES)
CAUSAL = replace(FULL, plan=tuple((slice(i, i + 1), (slice(0, i + 1),)) for i in range(FRAMES)))
SKIPPING = replace(FULL, plan=((slice(0, 1), (slice(0, 1),)), (slice(1, 3), (slice(0, 1), slice(2, 3)))))
TIMES = torch.tensor([500.0])
MESHES = [{"ulysses": 2}, {"ring": 2}, {"ring": 3}, {"ring": 2, "ulysses": 2}]
each_mesh = pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "_x_".join(f"{name}_{size}" for name, size in sizes.items()))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_model(**changes: object) -> AvatarTransformer:
    torch.manual_seed(0)
    return tiny_transformer(**changes).eval()


def make_inputs(batch: int = 1) -> tuple[torch.Tensor, Conditions]:
    audio = AudioFeatures(random(batch, 2 * (4 * (FRAMES - 1) + 1) - 1, 32, seed=3))
    reference = random(batch, 20, FRAMES, HEIGHT, WIDTH, seed=4)
    latents = random(batch, 16, FRAMES, HEIGHT, WIDTH, seed=5)
    return latents, Conditions(random(batch, 8, 32, seed=6), random(batch, 257, 32, seed=7), reference, audio)


def velocity(model: AvatarTransformer, layout: TokenLayout = FULL, times: torch.Tensor = TIMES) -> torch.Tensor:
    latents, conditions = make_inputs(len(times))
    return model(latents, times, conditions, layout)


def refined(model: AvatarTransformer) -> tuple[torch.Tensor, Conditions]:
    """Inputs with the adapter's tokens for audio."""
    latents, conditions = make_inputs()
    patches = model.embed_patches(latents, conditions.reference)
    return latents, replace(conditions, audio=model.refine_audio(conditions.audio, patches, *model.embed_time(TIMES)))


def with_cache(model: AvatarTransformer) -> torch.Tensor:
    """Two frames, then a third that sees the first of them and itself."""
    (latents, conditions), cache, parts = refined(model), KVCache(), []
    last = TokenLayout((2.0,), ((slice(0, 1), (slice(0, 1), slice(2, 3))),))
    for span, layout in (slice(0, 2), TokenLayout.full(2)), (slice(2, 3), last):
        audio = AudioTokens(conditions.audio.tokens[:, span], conditions.audio.lengths[span])
        part = replace(conditions, reference=conditions.reference[:, :, span], audio=audio)
        parts.append(model(latents[:, :, span], TIMES, part, layout, cache))
    return torch.cat(parts, dim=2)


def compiled(model: AvatarTransformer) -> torch.Tensor:
    model.compile_repeated_blocks(backend="eager")
    return velocity(model, CAUSAL)


CASES: dict[str, tuple[dict, Callable[[AvatarTransformer], torch.Tensor]]] = {
    "full": ({}, velocity),
    "14B's audio widths": ({"audio_hidden_dims": (48,)}, velocity),
    "three heads": ({"dim": 48, "num_heads": 3}, velocity),
    "causal": ({}, lambda model: velocity(model, CAUSAL)),
    "several key slices": ({"num_heads": 2}, lambda model: velocity(model, SKIPPING)),
    "clip audio": ({}, lambda model: velocity(model, replace(FULL, clip_audio=True))),
    "padding hidden": ({"mask_audio_padding": True}, velocity),
    "times per frame": ({}, lambda model: velocity(model, times=torch.tensor([[0.0, 500.0, 900.0], [100.0, 20.0, 0.0]]))),
    "positions": ({}, lambda model: velocity(model, replace(CAUSAL, positions=(-3.5, 0.0, 1.0)))),
    "cache": ({}, with_cache),
}


def share(model: AvatarTransformer, sizes: dict[str, int]) -> AvatarTransformer:
    apply_sequence_parallel(model, Mesh.over("cpu", **sizes))
    return model


@torch.no_grad()
def differences(sizes: dict[str, int], cases: list[str]) -> dict[str, float]:
    """The largest difference that sharing makes, by case."""
    found = {}
    for name in cases:
        changes, run = CASES[name]
        found[name] = float((run(share(make_model(**changes), sizes)) - run(make_model(**changes))).abs().max())
    return found


@each_mesh
def test_every_mesh_gives_the_velocity_of_one_process(sizes, crew):
    for found in crew.run(prod(sizes.values()), differences, sizes, list(CASES)):
        assert found.keys() == CASES.keys() and max(found.values()) < 1e-5, found


@torch.no_grad()
def compiled_difference(sizes: dict[str, int]) -> float:
    return float((compiled(share(make_model(), sizes)) - velocity(make_model(), CAUSAL)).abs().max())


def test_blocks_can_be_compiled(crew):
    assert max(crew.run(2, compiled_difference, {"ulysses": 2})) < 1e-5


@torch.no_grad()
def half_precision(sizes: dict[str, int]) -> tuple[list[tuple[float, float]], list[dict[str, int]]]:
    """Errors of bfloat16 against float32, of one process and of several, and what these send, with such weights and under autocast."""
    exact, pairs, sent = velocity(make_model(), CAUSAL), [], []
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Traffic() as traffic:
            results = velocity(make_model().to(dtype), CAUSAL), velocity(share(make_model().to(dtype), sizes), CAUSAL)
        pairs.append(tuple(float((result.float() - exact).norm() / exact.norm()) for result in results))
        sent.append(dict(traffic.sent))
    return pairs, sent


@pytest.mark.parametrize("sizes", MESHES[-1:], ids=str)
def test_half_precision_is_no_worse_than_in_one_process_and_travels_as_such(sizes, crew):
    for pairs, (stored, cast) in crew.run(4, half_precision, sizes):
        assert all(0 < alone < 0.05 and together < 1.3 * alone for alone, together in pairs)
        assert stored == cast and stored["ring"] > 0


@torch.no_grad()
def audio_changes(sizes: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What other audio for the middle frame changes in one process and in several, frames that see only themselves and earlier ones."""
    changes = []
    for model in (make_model(), share(make_model(), sizes)):
        latents, conditions = refined(model)
        other = conditions.audio.tokens.clone()
        other[:, 1] += random(*other[:, 1].shape, seed=8)
        heard = replace(conditions, audio=AudioTokens(other, conditions.audio.lengths))
        changes.append(model(latents, TIMES, heard, CAUSAL) - model(latents, TIMES, conditions, CAUSAL))
    return changes[0], changes[1]


@each_mesh
def test_audio_of_a_frame_changes_what_it_changes_in_one_process(sizes, crew):
    for alone, together in crew.run(prod(sizes.values()), audio_changes, sizes):
        assert not together[:, :, 0].any() and together[:, :, 1:].abs().amax((0, 1, 3, 4)).min() > 1e-3
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def gradients(model: AvatarTransformer, layout: TokenLayout, times: torch.Tensor) -> dict[str, torch.Tensor]:
    found = velocity(model, layout, times)
    (found * random(*found.shape, seed=9)).sum().div(10).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def gradient_errors(sizes: dict[str, int]) -> list[float]:
    """Of the gradients' sum over the processes, the largest error of each kind of model; relative where a gradient is larger than one."""
    errors, times = [], torch.tensor([[0.0, 500.0, 900.0], [100.0, 20.0, 0.0]])
    for checkpointing, heads, layout in (False, 2, SKIPPING), (True, 3, CAUSAL):
        model = share(make_model(dim=48, num_heads=heads), sizes)
        if checkpointing:
            model.enable_gradient_checkpointing()
        ours, expected = gradients(model, layout, times), gradients(make_model(dim=48, num_heads=heads), layout, times)
        for gradient in ours.values():
            dist.all_reduce(gradient)
        errors.append(max(float((ours[name] - one).abs().max() / one.abs().max().clamp_min(1)) for name, one in expected.items()))
        assert all(gradient.any() for gradient in expected.values())
    return errors


@each_mesh
def test_gradients_add_up_to_those_of_one_process(sizes, crew):
    for found in crew.run(prod(sizes.values()), gradient_errors, sizes):
        assert max(found) < 1e-5, found


def traffic(sizes: dict[str, int]) -> list[tuple[dict[str, int], dict[str, int]]]:
    """What a forward and a backward of three heads of 16 send, counted and by the formulas where they are sent."""
    mesh, model = Mesh.over("cpu", **sizes), make_model(dim=48, num_heads=3)
    apply_sequence_parallel(model, mesh)
    with Traffic() as forward:
        found = velocity(model)
    with Traffic() as backward:
        found.sum().backward()
    ulysses, ring, rank = mesh.size("ulysses"), mesh.size("ring"), mesh.rank("ulysses")
    parts, heads = split_sizes(TOKENS, ulysses * ring), split_sizes(3, ulysses)
    around = [sum(parts[i : i + ulysses]) for i in range(0, len(parts), ulysses)]
    own, together, width = parts[mesh.rank("sequence")], around[mesh.rank("ring")], 2 * FRAMES * 16 * 4  # layers, frames, head, bytes
    out, back = own * (3 - heads[rank]), (together - own) * heads[rank]  # of heads to others, and of tokens back to them
    passed_on = 2 * width * heads[rank] * (TOKENS - around[(mesh.rank("ring") + 1) % ring])
    expected = {"ulysses": width * (3 * out + back), "ring": passed_on, "gather": (len(parts) - 1) * FRAMES * max(parts) * 64 * 4}
    again = {"ulysses": width * (out + 3 * back), "ring": passed_on + (ring > 1) * 2 * width * heads[rank] * TOKENS, "gather": 0}
    return [({key: counted.sent[key] for key in want}, want) for counted, want in ((forward, expected), (backward, again))]


@each_mesh
def test_bytes_sent_are_those_of_the_formulas(sizes, crew):
    for counted, expected in sum(crew.run(prod(sizes.values()), traffic, sizes), []):
        assert counted == expected


def refused(sizes: dict[str, int], heads: int, height: int) -> str:
    model = share(make_model(dim=32, num_heads=heads), sizes)
    latents, conditions = make_inputs()
    small = replace(conditions, reference=conditions.reference[..., :height, :2])
    with pytest.raises(ValueError) as error:
        model(latents[..., :height, :2], TIMES, small, FULL)
    return str(error.value)


def test_too_few_heads_or_tokens_are_refused(crew):
    assert "ulysses=2 shares out 1 attention heads" in crew.run(2, refused, {"ulysses": 2}, 1, 6)[0]
    assert "ring=2 processes share the 1 tokens of a frame" in crew.run(2, refused, {"ring": 2}, 2, 2)[1]
    check_sequence(heads=12, tokens_per_frame=1024, ulysses=8, ring=4)


def test_parts_are_as_equal_as_can_be():
    assert [split_sizes(12, 4), split_sizes(7, 3), split_sizes(1, 1)] == [[3, 3, 3, 3], [3, 2, 2], [1]]


def test_one_process_keeps_its_whole_sequence(crew):
    assert crew.run(1, differences, {}, ["full"]) == [{"full": 0.0}]

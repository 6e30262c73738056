import itertools
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stableavatar.data.samples import Batch, Bucket, EncodedSample, Item, stack
from stableavatar.geometry import AUDIO_WIDENING, audio_slices, latents_to_frames
from stableavatar.models.dit import AudioFeatures, AudioTokens, Conditions
from stableavatar.models.layout import TokenLayout
from stableavatar.sampling.flow import (
    TRAIN_TIMESTEPS,
    Solver,
    add_noise,
    logit_normal,
    make_scheduler,
    mode,
    shift_sigma,
    velocity_target,
)
from stableavatar.training.config import ObjectiveConfig
from stableavatar.training.objective import Objective, choose_mask, seeded_noise, without_drops

BUCKET = Bucket(48, 32, 9)
FRAMES, HEIGHT, WIDTH = 3, 4, 6
PLAIN = without_drops(ObjectiveConfig())
UNIFORM = torch.linspace(0, 1, 10_001, dtype=torch.float64)


def item(clip: int = 0, slot: int = 0, of: int = 1, **values: int) -> Item:
    return Item(**{"clip": clip, "bucket": BUCKET, "run": 0, "epoch": 0, "step": 0, "slot": slot, "of": of} | values)


def sample(order: Item) -> EncodedSample:
    """Random, the same for the same clip; a small face and smaller lips."""
    generator = torch.Generator().manual_seed(order.clip)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    masks = torch.zeros(2, FRAMES, HEIGHT, WIDTH)
    masks[0, :, :3, :3], masks[1, :, 2, 1:3] = 1, 1
    latents = (random(16, FRAMES, HEIGHT, WIDTH) for _ in range(2))
    return EncodedSample(order, f"clip{order.clip}", *latents, random(257, 32), random(3, 32), random(17, 32), masks)


def batch(*items: Item) -> Batch:
    return stack([sample(order) for order in items], 8, torch.device("cpu"))


def losses_of_error(error: torch.Tensor, weights: torch.Tensor, **settings: float):
    return Objective(ObjectiveConfig(**settings), 0).losses(error, torch.zeros_like(error), weights)


# Equation 11


@pytest.mark.parametrize(
    ("q", "weights", "loss"),
    [
        (0.0, [[2, 3], [1, 1]], 9.75),
        (0.39, [[2, 3], [1, 1]], 9.75),
        (0.4, [[1, 1], [0, 0]], 1.25),
        (0.49, [[1, 1], [0, 0]], 1.25),
        (0.5, [[0, 1], [0, 0]], 1.0),
        (0.99, [[0, 1], [0, 0]], 1.0),
    ],
)
def test_equation_11_by_hand(q, weights, loss):
    masks = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]], [[[0.0, 1.0], [0.0, 0.0]]]])
    chosen = choose_mask(masks, q, face_share=0.1, lip_share=0.5)
    assert chosen.tolist() == [weights]
    assert Objective(ObjectiveConfig(), 0).mask(masks, q).tolist() == [weights], "the paper's shares are the defaults"
    losses = losses_of_error(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 1, 2, 2), chosen.unsqueeze(0))
    assert losses.per_sample.item() == losses.parts["masked"].item() == loss
    assert losses.parts["velocity"].item() == 30 / 4
    heavier = [[1 + 1, 1 + 1 + 25], [1, 1]] if q < 0.4 else weights
    assert Objective(ObjectiveConfig(lip_weight=25), 0).mask(masks, q).tolist() == [heavier]
    assert Objective(ObjectiveConfig(masks=False), 0).mask(masks, q).tolist() == [[[1, 1], [1, 1]]], "off: the plain squared error"


@pytest.mark.parametrize("lips", [[[1.0, 0.0], [0.0, 0.0]], [[0.5, 1.0], [1.0, 1.0]]])
@pytest.mark.parametrize(("q", "total"), [(0.0, 4 + 2 + 10 * 4 * 0.05), (0.99, 4 * 0.05)])
def test_lips_of_any_size_weigh_the_same(q, total, lips):
    masks = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]], [lips]])
    chosen = Objective(ObjectiveConfig(lip_weight=10, lip_area=0.05), 0).mask(masks, q)
    assert chosen.sum().item() == pytest.approx(total)
    none = torch.stack([masks[0], torch.zeros_like(masks[1])])
    assert Objective(ObjectiveConfig(lip_area=0.05), 0).mask(none, 0.0).tolist() == [[[2, 2], [1, 1]]], "no lips are seen"


def test_motion_compares_frames_not_channels():
    error = torch.tensor([[1.0, 3.0], [0.0, 0.0]]).view(1, 2, 2, 1, 1)
    losses = losses_of_error(error, torch.ones(1, 2, 1, 1), motion=0.25)
    assert losses.parts["motion"].item() == 2
    assert losses.per_sample.item() == 0.75 * 2.5 + 0.25 * 2
    assert "motion" not in losses_of_error(error, torch.ones(1, 2, 1, 1)).parts


# Draws


def test_draws_follow_from_seed_and_item():
    objective, again = Objective(ObjectiveConfig(), 7), Objective(ObjectiveConfig(), 7)
    orders = [item(clip, epoch=epoch, slot=clip, of=3) for clip, epoch in itertools.product(range(3), range(3))]
    assert [objective.draw(order) for order in orders] == [again.draw(order) for order in reversed(orders)][::-1]
    assert len({objective.draw(order).noise_seed for order in orders}) == len({objective.draw(order).q for order in orders}) == 9
    assert Objective(ObjectiveConfig(), 8).draw(orders[0]).noise_seed != objective.draw(orders[0]).noise_seed


@pytest.mark.parametrize(("ranks", "size", "accumulation"), [(1, 1, 8), (2, 2, 2), (8, 1, 1)])
def test_noise_levels_are_stratified_over_ranks_batches_and_accumulation(ranks, size, accumulation):
    def on_rank(rank: int, step: int) -> list[float]:
        places = [(a * ranks + rank) * size + j for a in range(accumulation) for j in range(size)]
        return [Objective(ObjectiveConfig(), 3).draw(item(20 + place, slot=place, of=8, step=step)).u for place in places]

    drawn = {(rank, step): on_rank(rank, step) for rank in range(ranks) for step in range(6)}
    for step in range(6):
        assert sorted(int(8 * u) for rank in range(ranks) for u in drawn[rank, step]) == list(range(8))
    assert len({int(8 * drawn[0, step][0]) for step in range(6)}) > 1, "a slot does not keep its noise level"


def test_a_sample_that_fills_a_place_has_a_valid_noise_level():
    for slot in range(5):
        assert 0 <= Objective(ObjectiveConfig(), 0).draw(item(slot=slot, of=2, weight=0)).u < 1


def test_drops_happen_at_their_rates_independently():
    objective = Objective(ObjectiveConfig(null_audio=0.2, drop_tokens=0.4, clip_audio=0.3), 0)
    draws = [objective.draw(item(clip)) for clip in range(4000)]

    def rate(*names: str) -> float:
        return sum(all(getattr(draw, name) for name in names) for draw in draws) / len(draws)

    rates = {("null_audio",): 0.2, ("drop_tokens",): 0.4, ("clip_audio",): 0.3, ("null_audio", "drop_tokens"): 0.08}
    assert {names: pytest.approx(expected, abs=0.025) for names, expected in rates.items()} == {names: rate(*names) for names in rates}
    shares = [sum(low <= draw.q < high for draw in draws) / len(draws) for low, high in ((0, 0.4), (0.4, 0.5), (0.5, 1))]
    assert shares == pytest.approx([0.4, 0.1, 0.5], abs=0.03)


def test_validation_hears_all_audio_locally():
    settings = without_drops(ObjectiveConfig(null_audio=1, drop_tokens=1, clip_audio=1))
    draws = [Objective(settings, 0).draw(item(clip)) for clip in range(50)]
    assert not any(draw.null_audio or draw.drop_tokens or draw.clip_audio for draw in draws)


# Noise levels and the flow


def test_logit_normal_has_its_mean_and_deviation():
    levels = logit_normal(UNIFORM, 0.3, 0.8)
    assert levels[5000].item() == pytest.approx(torch.tensor(0.3).sigmoid().item())
    logits = torch.logit(levels[1:-1])
    assert (logits.mean().item(), logits.std().item()) == pytest.approx((0.3, 0.8), abs=0.01)
    assert (levels[0], levels[-1]) == (0, 1)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
def test_mode_falls_from_one_to_zero_and_favours_the_middle(scale):
    levels = mode(UNIFORM, scale)
    assert (levels[[0, 5000, -1]] - torch.tensor([1, 0.5, 0])).abs().max() < 1e-12
    assert (levels.diff() <= 0).all()
    middle = ((levels - 0.5).abs() < 0.1).float().mean().item()
    assert middle == pytest.approx(0.2, abs=1e-3) if scale == 0 else (middle > 0.2) == (scale > 0)


@pytest.mark.parametrize(("density", "spread"), [("uniform", 0.289), ("logit_normal", 0.208), ("mode", 0.215)])
def test_densities_before_and_after_the_shift(density, spread):
    levels = Objective(ObjectiveConfig(density=density, shift=1), 0).sigmas(UNIFORM.tolist())
    assert (levels.mean().item(), levels.std().item()) == pytest.approx((0.5, spread), abs=2e-3)
    shifted = Objective(ObjectiveConfig(density=density, shift=5), 0).sigmas(UNIFORM.tolist())
    assert torch.allclose(shifted, 5 * levels / (1 + 4 * levels), atol=1e-6)
    assert shifted.dtype == torch.float32 and 0 <= shifted.min() and shifted.max() <= 1


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_the_shift_and_the_timesteps_are_the_schedulers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert scheduler.config.num_train_timesteps == TRAIN_TIMESTEPS
    levels = torch.linspace(1, 1 / TRAIN_TIMESTEPS, TRAIN_TIMESTEPS)
    assert torch.allclose(scheduler.sigmas, shift_sigma(levels, shift), atol=1e-6)
    assert torch.allclose(scheduler.timesteps, TRAIN_TIMESTEPS * scheduler.sigmas)


def test_eulers_step_along_the_true_velocity_arrives_at_the_data():
    scheduler = make_scheduler("euler", 4, 5.0)
    latents, noise = seeded_noise((2, 16, 3, 4, 6), 0), seeded_noise((2, 16, 3, 4, 6), 1)
    last, sigma = len(scheduler.timesteps) - 1, scheduler.sigmas[-2]
    solver = Solver(scheduler)
    solver.restore(solver.state() | {"_step_index": last})
    stepped = solver.step(add_noise(latents, noise, sigma.expand(2)), velocity_target(latents, noise), last)
    assert torch.allclose(stepped, latents, atol=1e-5)
    middle = add_noise(latents, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(middle[0], latents[0]) and torch.equal(middle[1], noise[1])


# The objective with the network


def by_hand(model, samples: Batch, objective: Objective, audio: AudioFeatures | AudioTokens, clip_audio: bool = False) -> torch.Tensor:
    """The plain loss [B] with conditions written out."""
    draws = [objective.draw(order) for order in samples.items]
    sigma = objective.sigmas([draw.u for draw in draws]).view(-1, 1, 1, 1, 1)
    noise = torch.stack([seeded_noise(samples.latents.shape[1:], draw.noise_seed) for draw in draws])
    mask = torch.zeros(len(draws), 4, FRAMES, HEIGHT, WIDTH)
    mask[:, :, 0] = 1
    conditions = Conditions(samples.text, samples.image, torch.cat([mask, samples.reference], dim=1), audio)
    layout = TokenLayout((0.0, 1.0, 2.0), clip_audio=clip_audio)
    velocity = model((1 - sigma) * samples.latents + sigma * noise, 1000 * sigma.flatten(), conditions, layout)
    return ((velocity - (noise - samples.latents)) ** 2).mean(dim=(1, 2, 3, 4))


def zero_tokens(samples: Batch, dim: int) -> AudioTokens:
    start, end = audio_slices(samples.audio.shape[1], latents_to_frames(FRAMES))[0]
    count = end - start + 1 + 2 * AUDIO_WIDENING
    return AudioTokens(torch.zeros(len(samples.items), FRAMES, count, dim), torch.zeros(FRAMES))


@torch.no_grad()
def test_drops_give_the_network_what_they_promise(dit):
    samples = batch(item(0, 0, 2), item(1, 1, 2))
    audio = {
        "": AudioFeatures(samples.audio),
        "null_audio": AudioFeatures(torch.zeros_like(samples.audio)),
        "drop_tokens": zero_tokens(samples, dit.config.dim),
        "clip_audio": AudioFeatures(samples.audio),
    }
    expected = {}
    for name, given in audio.items():
        objective = Objective(replace(PLAIN, **{name: 1.0} if name else {}), 5)
        expected[name] = by_hand(dit, samples, objective, given, name == "clip_audio")
        assert torch.allclose(objective(dit, samples).parts["velocity"], expected[name], atol=1e-5)
    for one, other in itertools.combinations(expected.values(), 2):
        assert (one - other).abs().max() > 1e-3, "the four differ, or the comparison says nothing"


@torch.no_grad()
def test_a_batch_of_two_is_two_batches_of_one(dit):
    objective = Objective(replace(ObjectiveConfig(), null_audio=0.5, drop_tokens=0.5, clip_audio=0, motion=0.3), 2)
    items = [item(clip, clip, 4) for clip in range(4)]
    assert len({objective.draw(order).null_audio for order in items}) == 2, "with both kinds of samples"
    for pair in (items[:2], items[2:]):
        together, alone = objective(dit, batch(*pair)), [objective(dit, batch(order)) for order in pair]
        assert torch.allclose(together.per_sample, torch.cat([one.per_sample for one in alone]), rtol=1e-4)
        assert together.parts.keys() == {"velocity", "masked", "motion"}
        for name, part in together.parts.items():
            assert torch.allclose(part, torch.cat([one.parts[name] for one in alone]), rtol=1e-4)


def test_the_first_sample_decides_on_clip_level_audio(dit):
    objective, layouts = Objective(ObjectiveConfig(clip_audio=0.5), 0), []
    items = [item(clip, clip, 8) for clip in range(8)]
    dit.register_forward_pre_hook(lambda module, arguments: layouts.append(arguments[3].clip_audio))
    with torch.no_grad():
        for order in items:
            objective(dit, batch(order, items[0]))
    assert layouts == [objective.draw(order).clip_audio for order in items] and len(set(layouts)) == 2


def test_a_tiny_network_overfits_one_clip(dit):
    samples, objective = batch(item()), Objective(replace(PLAIN, face_share=0.0, lip_share=0.0, motion=0.1), 0)
    optimizer = torch.optim.Adam(dit.parameters(), 3e-3)
    history = []
    for _ in range(60):
        losses = objective(dit, samples)
        optimizer.zero_grad()
        losses.per_sample.mean().backward()
        optimizer.step()
        history.append(losses.parts["velocity"].item())
    assert history[-1] < history[0] / 100, history


def test_gradient_checkpointing_changes_neither_loss_nor_gradients(dit):
    samples, objective = batch(item(0, 0, 2), item(1, 1, 2)), Objective(PLAIN, 0)

    def measure() -> tuple[torch.Tensor, list[torch.Tensor]]:
        dit.zero_grad()
        loss = objective(dit, samples).per_sample.mean()
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in dit.parameters()]

    loss, gradients = measure()
    dit.enable_gradient_checkpointing()
    again, others = measure()
    assert abs(loss - again) < 1e-6
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(gradients, others))
    assert all(gradient.abs().max() > 0 for gradient in gradients if gradient.ndim > 1)

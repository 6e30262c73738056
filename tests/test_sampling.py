"""Windows, flow, guidance, step cache and resume: plans of every length, and the same numbers in every order."""

import math
from functools import partial

import pytest
import torch

from stableavatar.sampling.conditioning import Conditioning, reference_channels
from stableavatar.sampling.crew import Crew
from stableavatar.sampling.denoise import GuidedVelocity, SlidingWindows, denoise_windows
from stableavatar.sampling.flow import SOLVERS, Solver, frame_noise, make_scheduler
from stableavatar.sampling.guidance import STRATEGIES, Audio, Guidance, Text
from stableavatar.sampling.resume import RunStore
from stableavatar.sampling.step_cache import StepCache
from stableavatar.sampling.windows import TAILS, WEIGHTS, Window, WindowPlan, fusion_weights


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("length, overlap", [(21, 5), (21, 0), (21, 15), (5, 4), (2, 1)])
def test_windows_cover_every_frame_in_order(length, overlap, tail):
    for total in range(1, 3 * length + 2):
        plan = WindowPlan.sliding(total, length, overlap, tail)
        assert sorted({f for w in plan.windows for f in range(*w)}) == list(range(total))
        assert [f for i in range(len(plan)) for f in range(*plan.stretch(i))] == list(range(total))
        assert all(w.stop - w.start <= length for w in plan.windows)
        assert all(plan.overlap(i) >= overlap for i in range(1, len(plan)))
        if tail == "shift" and total >= length:
            assert all(w.stop - w.start == length for w in plan.windows)


@pytest.mark.parametrize("overlap, length", [(21, 21), (-1, 21), (0, 0)])
def test_an_overlap_that_does_not_fit_is_an_error(overlap, length):
    with pytest.raises(ValueError, match="overlap"):
        WindowPlan.sliding(50, length, overlap)


def test_fusion_weights_are_those_of_the_paper():
    ramp = torch.linspace(0, 1, 5)
    expected = torch.log1p(ramp * (math.e - 1))
    torch.testing.assert_close(fusion_weights(5, "log"), (expected - expected.min()) / (expected.max() - expected.min()))
    torch.testing.assert_close(fusion_weights(5, "uniform"), torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    torch.testing.assert_close(fusion_weights(3, "fixed"), torch.full((3,), 0.5))
    torch.testing.assert_close(fusion_weights(3, "none"), torch.ones(3))
    for kind in WEIGHTS:
        assert torch.isfinite(fusion_weights(1, kind)).all() and len(fusion_weights(0, kind)) == 0


@pytest.mark.parametrize("overlap", [0, 2, 4])
def test_both_orders_respect_dependencies_and_wavefront_keeps_a_band(overlap):
    plan, steps = WindowPlan.sliding(60, 5, overlap), 4
    for kind in ("step_major", "wavefront"):
        done = set()
        for window, step in plan.order(steps, kind):
            needed = range(window + plan.reach + 1) if step else range(window)
            assert all((w, step - 1) in done for w in needed if step and w < len(plan))
            assert all((w, step) in done for w in range(window))
            done.add((window, step))
        assert len(done) == steps * len(plan)
    begun, finished, widest = set(), set(), 0
    for window, step in plan.order(steps, "wavefront"):
        begun.add(window)
        if step == steps - 1:
            finished.add(window)
        widest = max(widest, len(begun) - len(finished))
    assert widest <= plan.reach * (steps - 1) + 1


def field(index, window, latents, step):
    """A velocity that depends on window, position in the window, latents and step."""
    place = torch.arange(latents.shape[1]).view(1, -1, 1, 1)
    return torch.tanh(latents * (0.3 + 0.1 * step)) + 0.1 * torch.sin(place + 0.7 * index)


class Field:
    """`field` with the face of GuidedVelocity."""

    def __init__(self, timesteps, cache=None):
        self.timesteps, self.step_cache = timesteps, cache or StepCache(0, len(timesteps))

    def __call__(self, *arguments):
        return field(*arguments)

    def forget(self, index, window):
        pass


def run(plan, order="step_major", solver="euler", steps=4, store=None):
    scheduler = make_scheduler(solver, steps, 5.0)
    velocity = Field(scheduler.timesteps)
    windows = SlidingWindows(Crew(plan, order), scheduler, partial(frame_noise, (2, 4, 4), 7), velocity)
    return denoise_windows(windows, velocity, *([store] if store else []))


def algorithm_1(plan, steps=4):
    """The paper's algorithm 1, literally: whole latents, z_{t-1} fused."""
    scheduler = make_scheduler("euler", steps, 5.0)
    z = torch.cat([frame_noise((2, 4, 4), 7, f) for f in range(plan.total)], dim=1)
    for step in range(steps):
        result = z.clone()
        delta = scheduler.sigmas[step + 1] - scheduler.sigmas[step]
        for k, (start, stop) in enumerate(plan.windows):
            new = z[:, start:stop] + delta * field(k, None, z[:, start:stop], step)
            if k and step:
                overlap = plan.overlap(k)
                w = plan.fusion(k).view(-1, 1, 1)
                new[:, :overlap] = w * new[:, :overlap] + (1 - w) * result[:, start : start + overlap]
            result[:, start:stop] = new
        z = result
    return z


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("tail", TAILS)
def test_sliding_windows_are_algorithm_1(weights, tail):
    for total in (1, 5, 6, 17):
        plan = WindowPlan.sliding(total, 5, 2, tail, weights)
        torch.testing.assert_close(torch.cat(list(run(plan)), dim=1), algorithm_1(plan), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("overlap, tail", [(2, "cut"), (2, "shift"), (4, "cut")])
def test_wavefront_equals_step_major(solver, overlap, tail):
    plan = WindowPlan.sliding(23, 5, overlap, tail)
    results = [torch.cat(list(run(plan, order, solver)), dim=1) for order in ("step_major", "wavefront")]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_solver_follows_a_straight_path_exactly(solver, steps):
    """For one data point the velocity is constant along the path and any solver must land on it."""
    data, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    scheduler = make_scheduler(solver, steps, 5.0)
    stepper, latents = Solver(scheduler), noise
    for step in range(steps):
        sigma = scheduler.sigmas[step]
        latents = stepper.step(latents, (latents - data) / sigma.clamp_min(1e-6) if step else noise - data, step)
    torch.testing.assert_close(latents, data, atol=2e-3, rtol=2e-3)


def test_a_stretch_is_solved_as_the_whole_would_be():
    scheduler = make_scheduler("unipc", 4, 5.0)
    whole, part, z = Solver(scheduler), Solver(scheduler), torch.randn(2, 6, 4, 4)
    cut = z[:, 2:4]
    for step in range(4):
        velocity = torch.sin(z + step)
        z, cut = whole.step(z, velocity, step), part.step(cut, velocity[:, 2:4], step)
    torch.testing.assert_close(z[:, 2:4], cut)


def test_noise_depends_on_frame_and_seed_alone():
    one = frame_noise((16, 8, 8), 42, 3)
    assert torch.equal(one, frame_noise((16, 8, 8), 42, 3))
    others = torch.stack([one, frame_noise((16, 8, 8), 42, 4), frame_noise((16, 8, 8), 43, 3)]).flatten(1)
    assert torch.corrcoef(others).fill_diagonal_(0).abs().max() < 0.15
    assert abs(one.mean()) < 0.15 and abs(one.std() - 1) < 0.1
    assert torch.equal(0.5 * one, frame_noise((16, 8, 8), 42, 3, scale=0.5))


def predictions(guidance: Guidance) -> float:
    """Guided value where u, a, c are 1, 10, 100 for cfg and D, D(null), D(dropped) are 100, 10, 1."""
    values = {
        (Text.NEGATIVE, Audio.DROPPED): 1, (Text.NEGATIVE, Audio.SPEECH): 10, (Text.POSITIVE, Audio.SPEECH): 100,
        (Text.POSITIVE, Audio.NULL): 10, (Text.POSITIVE, Audio.DROPPED): 1,
    }  # fmt: skip
    return sum(p.weight * values[p.text, p.audio] for p in guidance.passes(0, 10))


def test_guidance_is_what_the_equations_say():
    assert predictions(Guidance("none")) == 100
    assert predictions(Guidance("cfg", text_scale=3, audio_scale=5)) == 1 + 5 * (10 - 1) + 3 * (100 - 10)
    assert predictions(Guidance("audio_native", alpha=4.5, beta=3)) == 8.5 * 100 - 4.5 * 10 - 3 * 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_guidance_at_scale_one_or_off_is_the_conditional_pass(name):
    assert predictions(Guidance(name, text_scale=1, audio_scale=1, alpha=0, beta=0)) == 100
    guidance = Guidance(name, start=0.2, end=0.5)
    for step in (0, 1, 5, 9):
        assert [p.weight for p in guidance.passes(step, 10)] == [1.0]
    assert abs(sum(p.weight for p in guidance.passes(3, 10)) - 1) < 1e-9


def test_reference_channels_mark_the_known_frames():
    channels = reference_channels(torch.randn(16, 5, 2, 2), known=2)
    assert channels.shape == (20, 5, 2, 2)
    assert channels[:4, :2].min() == 1 and channels[:4, 2:].max() == 0


class Counter(torch.nn.Module):
    """A network that counts its rows and calls and answers with a value per row."""

    def __init__(self):
        super().__init__()
        self.calls, self.rows = 0, 0

    def forward(self, latents, timesteps, conditions, layout):
        self.calls += 1
        self.rows += len(latents)
        heard = conditions.audio.features.mean((1, 2)) + conditions.audio.keep + conditions.text.mean((1, 2))
        return latents * 0.1 + heard.view(-1, 1, 1, 1, 1)


def conditioning(encode=lambda window: torch.full((1, 9, 4), 0.5)):
    text = {Text.POSITIVE: torch.ones(1, 3, 4), Text.NEGATIVE: -torch.ones(1, 3, 4)}
    return Conditioning(text, torch.zeros(1, 5, 4), torch.zeros(20, 5, 4, 4), encode)


@pytest.mark.parametrize("name", ["cfg", "audio_native"])
def test_batched_and_sequential_passes_agree(name):
    latents, results = torch.randn(16, 5, 4, 4), []
    for batched, calls in ((True, 1), (False, 3)):
        model = Counter()
        velocity = GuidedVelocity(model, conditioning(), Guidance(name), torch.tensor([900.0]), StepCache(0, 1), batched)
        results.append(velocity(0, Window(0, 5), latents, 0))
        assert (model.calls, model.rows) == (calls, 3)
    torch.testing.assert_close(*results)


def test_audio_is_encoded_once_per_window_and_let_go():
    asked = []

    def encode(window):
        asked.append(window)
        return torch.zeros(1, 9, 4)

    plan, scheduler = WindowPlan.sliding(17, 5, 2), make_scheduler("euler", 4, 5.0)
    inputs = conditioning(encode)
    velocity = GuidedVelocity(Counter(), inputs, Guidance("cfg"), scheduler.timesteps, StepCache(0, 4))
    list(denoise_windows(SlidingWindows(Crew(plan, "wavefront"), scheduler, partial(frame_noise, (16, 4, 4), 0), velocity), velocity))
    assert sorted(asked) == list(plan.windows) and not inputs._features


def cached(threshold, steps=12, order="step_major"):
    model, plan, scheduler = Counter(), WindowPlan.sliding(17, 5, 2), make_scheduler("euler", steps, 5.0)
    cache = StepCache(threshold, steps)
    velocity = GuidedVelocity(model, conditioning(), Guidance("cfg"), scheduler.timesteps, cache)
    windows = SlidingWindows(Crew(plan, order), scheduler, partial(frame_noise, (16, 4, 4), 0), velocity)
    return torch.cat(list(denoise_windows(windows, velocity)), dim=1), model.rows, cache


def test_step_cache_saves_work_and_stays_close():
    exact, all_rows, _ = cached(0)
    close, rows, cache = cached(0.02)
    assert rows < all_rows and rows + cache.reused == all_rows
    assert 0 < (close - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_step_cache_knows_the_rate_of_change_since_it_last_computed():
    cache, velocity_at = StepCache(0.35, 20), lambda x: 0.1 * x + 1
    rates, key = set(), (0, "positive", "speech")
    for step in range(12):
        latents = torch.full((1, 1, 1, 1), float(step))
        if cache.lookup(key, latents, step) is None:
            cache.record(key, latents, velocity_at(latents))
        rates.add(round(cache._entries[key].rate or 0.1, 6))
    assert rates == {0.1} and cache.reused > 2


def test_step_cache_keeps_a_state_per_window_whatever_the_order():
    torch.testing.assert_close(cached(0.02)[0], cached(0.02, order="wavefront")[0])


@pytest.mark.parametrize("order", ["step_major", "wavefront"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_killed_run_goes_on_bit_for_bit(order, solver, tmp_path):
    plan = WindowPlan.sliding(17, 5, 2)
    whole = torch.cat(list(run(plan, order, solver)), dim=1)
    make_store = partial(RunStore, tmp_path / "work", {"seed": 7}, every=0)

    class Killed(Exception):
        pass

    def killer(after):
        store = make_store()
        original = store.maybe_save

        def maybe_save(make_state):
            nonlocal after
            after -= 1
            if not after:
                raise Killed
            original(make_state)

        store.maybe_save = maybe_save
        return store

    for after in (3, 9, 7):
        with pytest.raises(Killed):
            list(run(plan, order, solver, store=killer(after)))
    assert torch.equal(whole, torch.cat(list(run(plan, order, solver, store=make_store())), dim=1))
    assert torch.equal(whole, torch.cat(list(run(plan, order, solver, store=make_store())), dim=1))


def test_a_work_dir_of_another_run_or_a_broken_state_is_an_error(tmp_path):
    RunStore(tmp_path, {"seed": 7}, 0)
    with pytest.raises(ValueError, match="differs in: seed"):
        RunStore(tmp_path, {"seed": 8}, 0)
    (tmp_path / "state.pt").write_bytes(b"nonsense")
    (tmp_path / "finished" / "000000.pt").write_bytes(b"nonsense")
    store = RunStore(tmp_path, {"seed": 7}, 0)
    for read in (store.load, lambda: store.get(0)):
        with pytest.raises(ValueError, match="delete"):
            read()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json"):
        RunStore(tmp_path, {"seed": 7}, 0)

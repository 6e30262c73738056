"""The loops: the dynamic weighted sliding window (in both orders), the plain window, and motion frames."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from stableavatar.models.layout import TokenLayout
from stableavatar.sampling.conditioning import Conditioning
from stableavatar.sampling.flow import Solver, frame_noise
from stableavatar.sampling.guidance import Guidance, Pass
from stableavatar.sampling.resume import NO_RUN_STORE, NoRunStore
from stableavatar.sampling.step_cache import StepCache
from stableavatar.sampling.windows import Window, WindowPlan


class GuidedVelocity:
    """The velocity of a window's latents: guidance passes through the network, summed by weight.

    Args:
        model: the transformer.
        conditioning: encoded inputs; its tensors say on which device to run.
        guidance: which passes, with which weights.
        timesteps: one per step.
        step_cache: reuse across steps.
        batched: passes in one batch, or one after another with less memory.
    """

    def __init__(
        self,
        model: nn.Module,
        conditioning: Conditioning,
        guidance: Guidance,
        timesteps: Tensor,
        step_cache: StepCache,
        batched: bool = True,
    ) -> None:
        self.model, self.conditioning, self.guidance = model, conditioning, guidance
        self.timesteps, self.step_cache, self.batched = timesteps, step_cache, batched

    @torch.no_grad()
    def __call__(self, index: int, window: Window, latents: Tensor, step: int) -> Tensor:
        """latents [C, F, h, w] of window `index` before step `step` -> velocity [C, F, h, w], float32 on the latents' device"""
        passes = self.guidance.passes(step, len(self.timesteps))
        known = {p: self.step_cache.lookup((index, p.text.value, p.audio.value), latents, step) for p in passes}
        missing = tuple(p for p, velocity in known.items() if velocity is None)
        size = max(1, len(missing)) if self.batched else 1
        for group in (missing[i : i + size] for i in range(0, len(missing), size)):
            predictions = self._predict(window, group, latents, step).to(latents.device)
            for p, velocity in zip(group, predictions, strict=True):
                self.step_cache.record((index, p.text.value, p.audio.value), latents, velocity)
                known[p] = velocity
        return sum(p.weight * velocity for p, velocity in known.items())

    def _predict(self, window: Window, passes: tuple[Pass, ...], latents: Tensor, step: int) -> Tensor:
        conditions = self.conditioning.conditions(window, passes)
        device = conditions.reference.device
        batch = latents.to(device).expand(len(passes), -1, -1, -1, -1)
        timesteps = self.timesteps[step].to(device, torch.float32).expand(len(passes))
        return self.model(batch, timesteps, conditions, TokenLayout.full(latents.shape[1])).float()

    def forget(self, index: int, window: Window) -> None:
        """Lets go of a finished window."""
        self.conditioning.forget(window)
        self.step_cache.forget(index)


class SlidingWindows:
    """Algorithm 1, in any order that respects what depends on what.

    A stretch is the part of a window into which no later window reaches. Window k at step i reads the latents before step i,
    fuses its velocity with what earlier windows said of the frames they share (w * new + (1 - w) * old), takes the solver's
    step on its stretch, whose velocity is then complete, and carries the rest over to window k + 1. A step of the flow is
    affine in the velocity with the same coefficients for both windows, so fusing velocities is fusing z_{t-1}, and
    multistep solvers see one history. As in the paper, the first step is not fused: the later window overwrites.

    Only stretches in work are held: a band in wavefront order, the video's latents in step-major order.
    """

    def __init__(
        self,
        plan: WindowPlan,
        scheduler: SchedulerMixin,
        shape: tuple[int, int, int],
        seed: int,
        velocity: Callable[[int, Window, Tensor, int], Tensor],
    ) -> None:
        self.plan, self.scheduler, self.shape, self.seed, self.velocity = plan, scheduler, shape, seed, velocity
        self._stretches: dict[int, Tensor] = {}
        self._solvers: dict[int, Solver] = {}
        self._carried: dict[int, Tensor] = {}

    def advance(self, index: int, step: int) -> None:
        """Brings window `index` through step `step`."""
        window, stretch = self.plan.windows[index], self.plan.stretch(index)
        velocity = self.velocity(index, window, self._read(index), step)
        if index and step:
            overlap = self.plan.overlap(index)
            weights = self.plan.fusion(index).view(-1, 1, 1)
            fused = torch.lerp(self._carried[step], velocity[:, :overlap], weights)
            velocity = torch.cat([fused, velocity[:, overlap:]], dim=1)
        own = stretch.stop - stretch.start
        self._stretches[index] = self._solvers[index].step(self._stretches[index], velocity[:, :own], step)
        self._carried[step] = velocity[:, own:].clone()

    def finish(self, index: int) -> Tensor:
        """Hands out a finished stretch [C, n, h, w] and lets go of its window."""
        del self._solvers[index]
        return self._stretches.pop(index)

    def _read(self, index: int) -> Tensor:
        """Latents [C, F, h, w] of a window, from the stretches that it spans."""
        start, stop = self.plan.windows[index]
        spanned = [i for i in range(index, min(index + self.plan.reach + 1, len(self.plan))) if self.plan.windows[i].start < stop]
        return torch.cat([self._stretch(i) for i in spanned], dim=1)[:, : stop - start]

    def _stretch(self, index: int) -> Tensor:
        """Latents of a stretch; noise where no step was taken yet."""
        if index not in self._stretches:
            frames = range(*self.plan.stretch(index))
            self._stretches[index] = torch.cat([frame_noise(self.shape, frame, self.seed) for frame in frames], dim=1)
            self._solvers[index] = Solver(self.scheduler)
        return self._stretches[index]

    def state(self) -> dict:
        """Everything that the next `advance` depends on."""
        solvers = {index: solver.state() for index, solver in self._solvers.items()}
        return {"stretches": dict(self._stretches), "carried": dict(self._carried), "solvers": solvers}

    def restore(self, state: dict) -> None:
        """Takes over what `state` gave."""
        self._stretches, self._carried = state["stretches"], state["carried"]
        self._solvers = {index: Solver(self.scheduler) for index in state["solvers"]}
        for index, solver in self._solvers.items():
            solver.restore(state["solvers"][index])


def denoise_windows(
    windows: SlidingWindows,
    velocity: GuidedVelocity,
    order: str,
    store: NoRunStore = NO_RUN_STORE,
    on_progress: Callable[[], object] = lambda: None,
) -> Iterator[Tensor]:
    """Runs a window plan and yields finished stretches [C, n, h, w] from the first to the last.

    Args:
        windows: the algorithm's state; `velocity`: what it asks, for letting go of finished windows.
        order: `step_major` or `wavefront`: the same numbers with another memory (`WindowPlan.order`).
        store: where a run leaves its state, and where an interrupted one goes on.
        on_progress: called after every window's step.
    """
    steps = len(velocity.timesteps)
    todo, done = windows.plan.order(steps, order), 0
    saved = store.load()
    if saved is not None:
        done = saved["done"]
        windows.restore(saved["windows"])
        velocity.step_cache.restore(saved["step_cache"])
    for position, (index, step) in enumerate(todo):
        finished = step == steps - 1
        if position < done:
            if finished:
                yield _required(store.get(index), index)
        else:
            windows.advance(index, step)
            if finished:
                velocity.forget(index, windows.plan.windows[index])
                stretch = windows.finish(index)
                store.put(index, stretch)
                yield stretch
            store.maybe_save(
                lambda count=position + 1: {
                    "done": count,
                    "windows": windows.state(),
                    "step_cache": velocity.step_cache.state(),
                }
            )
        on_progress()


def _required(stretch: Tensor | None, index: int) -> Tensor:
    if stretch is None:
        raise ValueError(f"work_dir lacks the finished stretch {index}; delete the folder to start again")
    return stretch


def denoise_motion_frames(
    plan: WindowPlan,
    start: Callable[[Conditioning, WindowPlan], tuple[SlidingWindows, GuidedVelocity]],
    conditioning: Conditioning,
    continue_reference: Callable[[Tensor, int], Tensor],
    store: NoRunStore = NO_RUN_STORE,
    on_progress: Callable[[], object] = lambda: None,
) -> Iterator[Tensor]:
    """Clip after clip, each conditioned on the last frames of the one before: the baseline of tables 2 and 6.

    A run goes on after the last clip that the store holds.

    Args:
        plan: clips as windows; consecutive ones share the motion frames, one latent frame at least.
        start: makes the machinery that denoises a plan (here of one window) under a conditioning.
        conditioning: of the first clip.
        continue_reference: reference channels [20, F, h, w] that give the last n latent frames of a clip to the next one.

    Yields:
        new latents [C, n, h, w] of every clip
    """
    for index, window in enumerate(plan.windows):
        clip = store.get(index)
        if clip is None:
            windows, velocity = start(conditioning, WindowPlan((window,)))
            clip = torch.cat(list(denoise_windows(windows, velocity, "step_major", on_progress=on_progress)), dim=1)
            store.put(index, clip)
        yield clip[:, plan.overlap(index) :]
        if index + 1 < len(plan):
            conditioning = replace(conditioning, reference=continue_reference(clip, plan.overlap(index + 1)))

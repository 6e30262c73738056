"""The loops: the dynamic weighted sliding window (in both orders), the plain window, and motion frames."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from stableavatar.models.layout import TokenLayout
from stableavatar.sampling.conditioning import Conditioning
from stableavatar.sampling.crew import Crew
from stableavatar.sampling.flow import Solver
from stableavatar.sampling.guidance import ALL_PASSES, Guidance, Pass, PassShares
from stableavatar.sampling.resume import NO_RUN_STORE, NoRunStore
from stableavatar.sampling.step_cache import StepCache
from stableavatar.sampling.windows import Pair, Window, WindowPlan


class GuidedVelocity:
    """The velocity of a window's latents: guidance passes through the network, summed by weight.

    Args:
        model: the transformer.
        conditioning: encoded inputs; its tensors say on which device to run.
        guidance: which passes, with which weights.
        timesteps: one per step.
        step_cache: reuse across steps.
        batched: passes in one batch, or one after another with less memory.
        shares: who evaluates which pass.
    """

    def __init__(
        self,
        model: nn.Module,
        conditioning: Conditioning,
        guidance: Guidance,
        timesteps: Tensor,
        step_cache: StepCache,
        batched: bool = True,
        shares: PassShares = ALL_PASSES,
    ) -> None:
        self.model, self.conditioning, self.guidance = model, conditioning, guidance
        self.timesteps, self.step_cache, self.batched, self.shares = timesteps, step_cache, batched, shares

    @torch.no_grad()
    def __call__(self, index: int, window: Window, latents: Tensor, step: int) -> Tensor:
        """latents [C, F, h, w] of window `index` before step `step` -> velocity [C, F, h, w], float32 on the latents' device"""
        passes = self.guidance.passes(step, len(self.timesteps))
        known = {p: self.step_cache.lookup((index, p.text.value, p.audio.value), latents, step) for p in passes}
        missing = tuple(p for p, velocity in known.items() if velocity is None)
        own = self.shares.own(missing)
        size = max(1, len(own)) if self.batched else 1
        groups = (own[i : i + size] for i in range(0, len(own), size))
        predictions = [velocity.to(latents.device) for group in groups for velocity in self._predict(window, group, latents, step)]
        for p, velocity in zip(missing, self.shares.gather(predictions, len(missing), latents), strict=True):
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

    Only stretches in work are held: a band in wavefront order, the video's latents in step-major order. Where a crew of several
    processes shares the windows, a process holds its own stretches and what its windows read of the others'.

    Args:
        noise: gives a latent frame [C, 1, h, w] before the first step.
        velocity: of a window (its index and itself) at its latents [C, F, h, w] and a step.
    """

    def __init__(
        self,
        crew: Crew,
        scheduler: SchedulerMixin,
        noise: Callable[[int], Tensor],
        velocity: Callable[[int, Window, Tensor, int], Tensor],
    ) -> None:
        self.crew, self.plan, self.scheduler, self.noise, self.velocity = crew, crew.plan, scheduler, noise, velocity
        self._stretches: dict[int, Tensor] = {}
        self._solvers: dict[int, Solver] = {}
        self._carried: dict[int, Tensor] = {}

    def advance(self, pairs: list[Pair]) -> None:
        """Brings windows through a step each, one round of the crew."""
        own = [pair for pair in pairs if self.crew.owns(pair[0])]
        velocities = {(index, step): self.velocity(index, self.plan.windows[index], self._read(index), step) for index, step in own}
        for pair in pairs:  # all fusions before the solvers' steps, because the next process waits for what is carried over
            self._fuse(*pair, velocities)
        for pair in pairs:
            self._step(*pair, velocities)

    def finish(self, index: int) -> Tensor | None:
        """Hands out a finished stretch [C, n, h, w], to the process that collects them, and lets go of its window."""
        self._solvers.pop(index, None)
        return self.crew.collect(index, self._stretches.pop(index, None))

    def _read(self, index: int) -> Tensor:
        """Latents [C, F, h, w] of a window, from the stretches that it spans."""
        start, stop = self.plan.windows[index]
        spanned = [i for i in range(index, min(index + self.plan.reach + 1, len(self.plan))) if self.plan.windows[i].start < stop]
        return torch.cat([self._stretch(i) for i in spanned], dim=1)[:, : stop - start]

    def _stretch(self, index: int) -> Tensor:
        """Latents of a stretch; noise where no step was taken yet."""
        if index not in self._stretches:
            self._stretches[index] = torch.cat([self.noise(frame) for frame in range(*self.plan.stretch(index))], dim=1)
        return self._stretches[index]

    def _fuse(self, index: int, step: int, velocities: dict[Pair, Tensor]) -> None:
        """Leaves of a window's velocity what its stretch needs and carries the rest over to the next window."""
        carried = None
        if (velocity := velocities.get((index, step))) is not None:
            if index and step:
                overlap, weights = self.plan.overlap(index), self.plan.fusion(index).view(-1, 1, 1)
                fused = torch.lerp(self._carried.pop(step), velocity[:, :overlap], weights)
                velocity = torch.cat([fused, velocity[:, overlap:]], dim=1)
            start, stop = self.plan.stretch(index)
            velocities[index, step], carried = velocity[:, : stop - start], velocity[:, stop - start :].clone()
        if step and index + 1 < len(self.plan):
            carried = self.crew.carry(index, carried)
            if carried is not None:
                self._carried[step] = carried

    def _step(self, index: int, step: int, velocities: dict[Pair, Tensor]) -> None:
        """Takes the solver's step on a stretch and shows the result to those who read it."""
        if (index, step) in velocities:
            if index not in self._solvers:
                self._solvers[index] = Solver(self.scheduler)
            self._stretches[index] = self._solvers[index].step(self._stretches[index], velocities.pop((index, step)), step)
        if step + 1 < len(self.scheduler.timesteps):
            latents = self.crew.spread(index, self._stretches.get(index))
            if latents is not None:
                self._stretches[index] = latents

    def state(self) -> dict[str, dict]:
        """What of this process the next `advance` depends on; parts of several processes differ in their keys."""
        return {
            "stretches": {index: self._stretches[index] for index in self._solvers},
            "carried": dict(self._carried),
            "solvers": {index: solver.state() for index, solver in self._solvers.items()},
        }

    def restore(self, state: dict) -> None:
        """Takes over what this process needs of the state of all, whatever order and processes it comes from.

        Windows are never further than those before them; what is carried at a step waits for the first that is not through it.
        """
        behind = {step: sum(done > step for done in state["steps"]) for step in state["carried"]}
        self._stretches = {index: latents for index, latents in state["stretches"].items() if self.crew.reads(index)}
        self._carried = {step: carried for step, carried in state["carried"].items() if self.crew.owns(behind[step])}
        self._solvers = {index: Solver(self.scheduler) for index in state["solvers"] if self.crew.owns(index)}
        for index, solver in self._solvers.items():
            solver.restore(state["solvers"][index])


def denoise_windows(
    windows: SlidingWindows,
    velocity: GuidedVelocity,
    store: NoRunStore = NO_RUN_STORE,
    on_progress: Callable[[int], object] = lambda count: None,
) -> Iterator[Tensor]:
    """Runs a window plan and yields finished stretches [C, n, h, w] from the first to the last, in the process that collects them.

    Args:
        windows: the algorithm's state, whose crew knows the order; `velocity`: what it asks, for letting go of finished windows.
        store: where a run leaves its state, and where an interrupted one goes on.
        on_progress: called with the number of windows' steps that were done since the last call.
    """
    crew, steps, saved = windows.crew, len(velocity.timesteps), store.load()
    done = [0] * len(windows.plan)
    if saved is not None:
        done = list(saved["steps"])
        windows.restore(saved)
        velocity.step_cache.restore({key: entry for key, entry in saved["step_cache"].items() if crew.owns(key[0])})
    on_progress(sum(done))
    for index in range(done.count(steps)):
        stretch = _required(store.get(index), index)
        if crew.collects:
            yield stretch
    for pairs in crew.rounds(steps):
        if not (todo := [(index, step) for index, step in pairs if step >= done[index]]):
            continue
        windows.advance(todo)
        for index, step in todo:
            done[index] = step + 1
        last = [index for index, step in todo if step + 1 == steps]
        for index, stretch in [(index, windows.finish(index)) for index in last]:
            velocity.forget(index, windows.plan.windows[index])
            if stretch is not None:
                store.put(index, stretch)
                yield stretch
        store.maybe_save(partial(_state, windows, velocity, done))
        on_progress(len(todo))


def _state(windows: SlidingWindows, velocity: GuidedVelocity, done: list[int]) -> dict:
    """`steps`: how many each window is through, the same for all processes; the rest is of this process's windows, by window or step."""
    return {"steps": list(done), "step_cache": velocity.step_cache.state(), **windows.state()}


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
    on_progress: Callable[[int], object] = lambda count: None,
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
            clip = torch.cat(list(denoise_windows(windows, velocity, on_progress=on_progress)), dim=1)
            store.put(index, clip)
        yield clip[:, plan.overlap(index) :]
        if index + 1 < len(plan):
            conditioning = replace(conditioning, reference=continue_reference(clip, plan.overlap(index + 1)))

"""Window parallelism: the windows of a plan on several processes, which exchange the frames where windows of two of them overlap.

A window stays with its process for all steps, with its solver's history, its step cache and its audio features. In wavefront order,
too: dealing out steps in bands instead would leave processes idle until the first window has come through all bands, make steps
with and without guidance unequal, and move every stretch with its solver's history.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from stableavatar.parallel.mesh import Mesh
from stableavatar.parallel.traffic import count
from stableavatar.sampling.crew import Crew
from stableavatar.sampling.windows import Pair, WindowPlan

logger = logging.getLogger(__name__)
ENOUGH = 0.8
"""Share of the time below which idle processes are worth a line."""


@dataclass(frozen=True)
class WindowShares:
    """Which process does which window, in which rounds, and which frames travel: integers, no processes.

    Attributes:
        plan: the windows.
        order: `step_major`: a round is a step of all windows, a process has a run of neighbours. `wavefront`: a round is a
            diagonal, in which a step follows reach + 1 windows behind the one before: what its predictions read was finished in
            earlier rounds. Its windows are reach + 1 apart, so runs of that many are dealt out in turn.
        ranks: processes; those beyond the number of windows have nothing to do.
    """

    plan: WindowPlan
    order: str
    ranks: int

    @property
    def lag(self) -> int:
        """Windows by which a step follows the one before in a wavefront of independent predictions."""
        return self.plan.reach + 1

    def rounds(self, steps: int) -> list[list[Pair]]:
        """All pairs, in groups whose predictions do not depend on one another."""
        if self.order == "step_major":
            return [[(window, step) for window in range(len(self.plan))] for step in range(steps)]
        return list(self.plan.waves(steps, self.lag))

    def owner(self, index: int) -> int:
        """The process of a window."""
        return index * self.ranks // len(self.plan) if self.order == "step_major" else index // self.lag % self.ranks

    def readers(self, index: int) -> dict[int, int]:
        """Other processes whose windows reach into stretch `index`, each with how many of its first frames."""
        start, stop = self.plan.stretch(index)
        before = range(max(0, index - self.plan.reach), index)  # a later window reaches further
        frames = {self.owner(i): min(self.plan.windows[i].stop, stop) - start for i in before}
        return {rank: n for rank, n in frames.items() if n > 0 and rank != self.owner(index)}

    def busy(self, steps: int) -> float:
        """The share of the time that processes work, if every prediction takes as long as every other."""
        slowest = sum(max(Counter(self.owner(window) for window, _ in pairs).values()) for pairs in self.rounds(steps))
        return len(self.plan) * steps / (slowest * self.ranks)

    def frames_sent(self, steps: int) -> dict[str, int]:
        """Latent frames that travel in a whole run, by kind of message.

        At a boundary between two processes, every step but the first carries the overlap's velocity forwards, and every step but
        the last shows the overlap's latents backwards. Finished stretches go to process 0.
        """
        windows = range(len(self.plan))
        carried = sum(self.plan.overlap(i) for i in windows[1:] if self.owner(i) != self.owner(i - 1))
        shown = sum(sum(self.readers(i).values()) for i in windows)
        finished = sum(stop - start for start, stop in (self.plan.stretch(i) for i in windows if self.owner(i)))
        return {"carried": (steps - 1) * carried, "stretches": (steps - 1) * shown, "finished": finished}


class WindowCrew(Crew):
    """A process of several that share a window plan; the first one collects.

    All processes walk through the same rounds and, inside a round, through the same pairs in the same order; who sends goes on at
    once and who receives waits, so the process with the earliest pair can always go on.

    Args:
        shares: who does what.
        group: the processes; on GPUs, with a backend for the host too, because latents stay there.
        shape: channels, height, width of a latent frame.
    """

    def __init__(self, shares: WindowShares, group: ProcessGroup, shape: tuple[int, int, int]) -> None:
        super().__init__(shares.plan, shares.order)
        self.shares, self.group, self.shape, self.rank = shares, group, shape, group.rank()
        self.collects = self.rank == 0
        self._sent: list[Work] = []

    def rounds(self, steps: int) -> Iterator[list[Pair]]:
        if dist.get_rank() == 0 and (busy := self.shares.busy(steps)) < ENOUGH:
            other = replace(self.shares, order="step_major").busy(steps)
            logger.warning("%d windows in %s order keep %d window processes busy for %.0f%% of the time, in step_major order for %.0f%%",
                           len(self.plan), self.order, self.shares.ranks, 100 * busy, 100 * other)
        for pairs in self.shares.rounds(steps):
            earlier, self._sent = self._sent, []
            yield pairs
            for work in earlier:  # received at the latest in the round that was just done
                work.wait()
        for work in self._sent:
            work.wait()

    def owns(self, index: int) -> bool:
        return self.shares.owner(index) == self.rank

    def reads(self, index: int) -> bool:
        return self.owns(index) or self.rank in self.shares.readers(index)

    def carry(self, index: int, carried: Tensor | None) -> Tensor | None:
        return self._move("carried", carried, index, self.plan.overlap(index + 1), self.shares.owner(index + 1))

    def spread(self, index: int, stretch: Tensor | None) -> Tensor | None:
        for rank, frames in self.shares.readers(index).items():
            received = self._move("stretches", stretch, index, frames, rank)
            if rank == self.rank:
                return received
        return stretch if self.owns(index) else None

    def collect(self, index: int, stretch: Tensor | None) -> Tensor | None:
        start, stop = self.plan.stretch(index)
        return self._move("finished", stretch, index, stop - start, 0)

    def _move(self, kind: str, tensor: Tensor | None, index: int, frames: int, target: int) -> Tensor | None:
        """Sends the first `frames` frames of `tensor` [C, n, h, w] from the owner of window `index` to `target`, which gets them."""
        owner = self.shares.owner(index)
        if self.rank == owner == target:
            return tensor
        if self.rank == owner:
            part = tensor[:, :frames].contiguous()
            self._sent.append(dist.isend(part, group=self.group, group_dst=target))
            count(kind, part.nbytes)
        elif self.rank == target:
            channels, height, width = self.shape
            part = torch.empty(channels, frames, height, width)
            dist.recv(part, group=self.group, group_src=owner)
            return part
        return None


def share_windows(mesh: Mesh | None, plan: WindowPlan, order: str, shape: tuple[int, int, int]) -> Crew:
    """The crew of a plan whose latent frames have `shape` (channels, height, width) on a mesh; None is one process."""
    if mesh is None or mesh.size("windows") == 1:
        return Crew(plan, order)
    return WindowCrew(WindowShares(plan, order, mesh.size("windows")), mesh.group("windows"), shape)

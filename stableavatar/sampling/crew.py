"""Who brings which window of a plan through which step, and when: the seam between the loops and several processes."""

from collections.abc import Iterator

from torch import Tensor

from stableavatar.sampling.windows import Pair, WindowPlan


class Crew:
    """One process that does every window of a plan, one after another; parallel/windows.py shares them out.

    Args:
        plan: the windows.
        order: `step_major` or `wavefront`: the same numbers with another memory (`WindowPlan.order`).

    Attributes:
        collects: whether finished stretches come to this process.
    """

    def __init__(self, plan: WindowPlan, order: str) -> None:
        self.plan, self.order, self.collects = plan, order, True

    def rounds(self, steps: int) -> Iterator[list[Pair]]:
        """All pairs, in groups whose predictions do not depend on one another; every process goes through all groups."""
        yield from ([pair] for pair in self.plan.order(steps, self.order))

    def owns(self, index: int) -> bool:
        """Whether window `index` is this process's."""
        return True

    def reads(self, index: int) -> bool:
        """Whether a window of this process reads stretch `index`."""
        return True

    def carry(self, index: int, carried: Tensor | None) -> Tensor | None:
        """Hands the velocity that window `index` carries over to the next window's process; what this process got, if it is the one."""
        return carried

    def spread(self, index: int, stretch: Tensor | None) -> Tensor | None:
        """Hands stretch `index` after a step to the processes that read it; what this process now knows of it, None if nothing."""
        return stretch

    def collect(self, index: int, stretch: Tensor | None) -> Tensor | None:
        """Hands finished stretch `index` to the process that collects them; None in the others."""
        return stretch

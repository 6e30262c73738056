"""Guidance parallelism: the passes of a step on several processes."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from stableavatar.parallel.mesh import Mesh
from stableavatar.parallel.traffic import count as count_bytes
from stableavatar.sampling.guidance import ALL_PASSES, Pass, PassShares


class SharedPasses(PassShares):
    """Passes dealt out in contiguous parts, such as 2 + 1 of 3 over two processes; afterwards every process knows all of them.

    Velocities are summed in the passes' order everywhere, so unbatched passes give the bits of one process, and the step cache
    decides alike in all.

    Args:
        group: the processes; on GPUs, with a backend for the host too.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def own(self, passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
        return tuple(p for i, p in enumerate(passes) if self._owner(i, len(passes)) == self.rank)

    def gather(self, own: list[Tensor], count: int, latents: Tensor) -> list[Tensor]:
        """Every pass from its owner to the others: size - 1 velocities of bytes for each pass, counted where it starts."""
        mine, owners = iter(own), [self._owner(i, count) for i in range(count)]
        velocities = [next(mine).contiguous() if owner == self.rank else torch.empty_like(latents) for owner in owners]
        for owner, velocity in zip(owners, velocities, strict=True):
            dist.broadcast(velocity, group=self.group, group_src=owner)
            if owner == self.rank:
                count_bytes("guidance", velocity.nbytes * (self.size - 1))
        return velocities

    def _owner(self, index: int, count: int) -> int:
        return index * self.size // count


def share_passes(mesh: Mesh | None) -> PassShares:
    """The shares of this process in a mesh; None is one process."""
    return ALL_PASSES if mesh is None or mesh.size("guidance") == 1 else SharedPasses(mesh.group("guidance"))

"""The mesh of processes: who shares what with whom.

    windows x guidance x ring x ulysses

Neighbours in rank differ in `ulysses` first, so that the most talkative dimension stays inside a machine.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DIMS = ("windows", "guidance", "ring", "ulysses")
SEQUENCE = "sequence"


@dataclass(frozen=True)
class Mesh:
    """Processes of one run by their four coordinates; `sequence` is ring and ulysses taken together, ulysses running fastest.

    Attributes:
        devices: the library's mesh of all processes, with the dimensions of `DIMS`.
    """

    devices: DeviceMesh

    @classmethod
    def over(cls, device_type: str, windows: int = 1, guidance: int = 1, ring: int = 1, ulysses: int = 1) -> "Mesh":
        """A mesh over all processes; the process group must stand.

        Args:
            device_type: cpu or cuda, of the tensors that the processes compute with.

        Raises:
            ValueError: the product of the sizes is not the number of processes.
        """
        sizes = (windows, guidance, ring, ulysses)
        if prod(sizes) != (world := dist.get_world_size()):
            named = " x ".join(f"{name}={size}" for name, size in zip(DIMS, sizes, strict=True))
            raise ValueError(f"{named} are {prod(sizes)} processes, but {world} were started")
        return cls(init_device_mesh(device_type, sizes, mesh_dim_names=DIMS))

    @cached_property
    def sequence(self) -> DeviceMesh:
        """The processes that share a sequence, as a mesh of one dimension: rank = ring rank * ulysses size + ulysses rank."""
        return self.devices["ring", "ulysses"]._flatten(SEQUENCE)

    def size(self, dim: str) -> int:
        """Processes along a dimension of `DIMS`, or `sequence`."""
        return self.sequence.size() if dim == SEQUENCE else self.devices.size(DIMS.index(dim))

    def rank(self, dim: str) -> int:
        """This process's coordinate along a dimension."""
        return self.sequence.get_local_rank() if dim == SEQUENCE else self.devices.get_local_rank(dim)

    def group(self, dim: str) -> ProcessGroup:
        """The processes that differ from this one along a dimension only."""
        return self.sequence.get_group() if dim == SEQUENCE else self.devices.get_group(dim)

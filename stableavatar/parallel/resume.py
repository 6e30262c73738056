"""A resumable run of several processes: the first one alone reads and writes the folder."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from stableavatar.parallel.launch import leads, together
from stableavatar.parallel.mesh import SEQUENCE, Mesh
from stableavatar.sampling.resume import NoRunStore

Result = TypeVar("Result")


class SharedRunStore(NoRunStore):
    """The store of a run on a mesh. What it keeps is what one process would keep, so that any mesh can go on with it.

    Args:
        store: the folder in the first process, anything in the others.
    """

    def __init__(self, store: NoRunStore, mesh: Mesh) -> None:
        self.mesh, self._store = mesh, store

    def load(self) -> dict | None:
        """The whole state, in every process. Raises ValueError in all of them alike, as the other methods do."""
        return self._from_first(self._store.load)

    def get(self, index: int) -> Tensor | None:
        return self._from_first(lambda: self._store.get(index))

    def put(self, index: int, latents: Tensor) -> None:
        if leads(self.mesh):
            self._store.put(index, latents)

    def due(self) -> bool:
        """What the clock of the first process says; every process asks after the same round."""
        return self._from_first(self._store.due)

    def save(self, state: dict) -> None:
        """Saves the state of all processes in one.

        Args:
            state: this process's part; those that share a window with others hold the same as these.
        """
        parts: list[dict] = [{}] * self.mesh.size("windows")
        if self.mesh.rank("guidance") == self.mesh.rank(SEQUENCE) == 0:
            dist.gather_object(state, parts if leads(self.mesh) else None, group=self.mesh.group("windows"), group_dst=0)
        self._from_first(lambda: self._store.save(merge(parts)))

    def _from_first(self, work: Callable[[], Result]) -> Result:
        """What `work` gives in the first process, in every one."""
        told = [together(self.mesh, lambda: work() if leads(self.mesh) else None)]
        dist.broadcast_object_list(told, src=0)
        return told[0]


def merge(parts: list[dict]) -> dict:
    """One state of the parts of processes that share a window plan: `steps` is the same in all, the rest has other keys in each."""
    state = {key: dict(values) for key, values in parts[0].items() if key != "steps"}
    for part in parts[1:]:
        for key, values in state.items():
            values.update(part[key])
    return {"steps": parts[0]["steps"], **state}

"""The mesh of processes and its coordinates."""

import pytest
import torch.distributed as dist

from stableavatar.parallel.mesh import Mesh


def coordinates(sizes: dict[str, int]) -> dict[str, int]:
    mesh = Mesh.over("cpu", **sizes)
    told = [None] * mesh.size("ring")
    dist.all_gather_object(told, dist.get_rank(), group=mesh.group("ring"))
    return {name: mesh.rank(name) for name in ("windows", "guidance", "ring", "ulysses", "sequence")} | {"ring_peers": told}


def test_neighbours_differ_in_ulysses_first(crew):
    got = crew.run(4, coordinates, {"ring": 2, "ulysses": 2})
    assert [(c["ring"], c["ulysses"], c["sequence"]) for c in got] == [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)]
    assert [c["ring_peers"] for c in got] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_sizes_that_do_not_fit_are_told(crew):
    with pytest.raises(AssertionError, match="windows=3 x guidance=1 x ring=1 x ulysses=1 are 3 processes, but 2 were started"):
        crew.run(2, coordinates, {"windows": 3})

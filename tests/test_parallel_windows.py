"""Windows and guidance passes on several processes: the bits of one process, only overlaps travel, and runs go on under any mesh."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from make_tiny_model import tiny_pipeline

from stableavatar.config import InferenceConfig
from stableavatar.media import AudioTrack
from stableavatar.parallel.guidance import share_passes
from stableavatar.parallel.launch import leads, together
from stableavatar.parallel.mesh import Mesh
from stableavatar.parallel.resume import SharedRunStore
from stableavatar.parallel.traffic import Traffic
from stableavatar.parallel.windows import WindowShares, share_windows
from stableavatar.sampling.conditioning import Conditioning
from stableavatar.sampling.denoise import GuidedVelocity, SlidingWindows, denoise_windows
from stableavatar.sampling.flow import frame_noise, make_scheduler
from stableavatar.sampling.guidance import Guidance, Text
from stableavatar.sampling.resume import NO_RUN_STORE, NoRunStore, RunStore
from stableavatar.sampling.step_cache import StepCache
from stableavatar.sampling.windows import WindowPlan

SHAPE = (3, 4, 2)
FRAME_BYTES = 3 * 4 * 2 * 4
ORDERS = ("step_major", "wavefront")
Sizes = dict[str, int]


@dataclass(frozen=True)
class Case:
    """A generation; `total`, `length` and `overlap` in latent frames."""

    total: int = 23
    length: int = 5
    overlap: int = 2
    tail: str = "cut"
    order: str = "step_major"
    solver: str = "euler"
    steps: int = 4
    guidance: str = "none"
    step_cache: float = 0.0

    def plan(self) -> WindowPlan:
        return WindowPlan.sliding(self.total, self.length, self.overlap, self.tail)


class Network(torch.nn.Module):
    """Answers with what depends on latents, place in the window, timestep, text and audio; counts its rows."""

    rows = 0

    def forward(self, latents, timesteps, conditions, layout):
        self.rows += len(latents)
        place = torch.arange(latents.shape[2]).view(-1, 1, 1)
        told = conditions.text.mean((1, 2)) + conditions.audio.features.mean((1, 2)) + 0.3 * conditions.audio.keep
        return torch.tanh(latents * (0.3 + timesteps.view(-1, 1, 1, 1, 1) / 2000)) + 0.1 * torch.sin(place + told.view(-1, 1, 1, 1, 1))


def conditioning() -> Conditioning:
    text = {Text.POSITIVE: torch.ones(1, 3, 4), Text.NEGATIVE: -torch.ones(1, 3, 4)}
    reference = torch.zeros(20, 24, *SHAPE[1:])
    return Conditioning(text, torch.zeros(1, 5, 4), reference, lambda window: torch.full((1, 9, 4), 0.1 * window.start))


def generate(
    case: Case, mesh: Mesh | None = None, store: NoRunStore = NO_RUN_STORE, on_round: Callable[[int], object] = lambda count: None
) -> tuple[list[torch.Tensor], int]:
    """Stretches that this process gets, and how many rows it put through the network."""
    scheduler, network = make_scheduler(case.solver, case.steps, 5.0), Network()
    cache = StepCache(case.step_cache, case.steps)
    velocity = GuidedVelocity(network, conditioning(), Guidance(case.guidance), scheduler.timesteps, cache, False, share_passes(mesh))
    windows = SlidingWindows(share_windows(mesh, case.plan(), case.order, SHAPE), scheduler, partial(frame_noise, SHAPE, 7), velocity)
    stretches = list(denoise_windows(windows, velocity, store, on_round))
    assert not (windows._stretches or windows._solvers or windows._carried or cache._entries), "something of a finished run is kept"
    return stretches, network.rows


def plain(stretches: Iterable[torch.Tensor]) -> list[np.ndarray]:
    """Numbers that pass between processes by value."""
    return [stretch.numpy() for stretch in stretches]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def generate_all(cases: list[Case], sizes: Sizes) -> list[tuple[list[np.ndarray], int, Counter]]:
    """In a process of a mesh: stretches, rows and bytes sent of every case."""
    mesh, results = Mesh.over("cpu", **sizes), []
    for case in cases:
        with Traffic() as traffic:
            stretches, rows = generate(case, mesh)
        results.append((plain(stretches), rows, traffic.sent))
    return results


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "total, length, overlap, tail", [(23, 5, 2, "cut"), (22, 5, 3, "shift"), (30, 6, 5, "cut"), (9, 5, 0, "cut"), (4, 5, 2, "cut")]
)
def test_shares_are_fair_and_respect_what_depends_on_what(order, total, length, overlap, tail):
    plan, steps = WindowPlan.sliding(total, length, overlap, tail), 4
    for ranks in (1, 2, 3, 8):
        shares, done = WindowShares(plan, order, ranks), set()
        for pairs in shares.rounds(steps):
            needed = {(w + ahead, step - 1) for w, step in pairs for ahead in range(plan.reach + 1) if step and w + ahead < len(plan)}
            assert needed <= done, "a prediction waits for another of its round"
            work = Counter(shares.owner(window) for window, _ in pairs)
            assert max(work.values()) == -(-len(pairs) // ranks)
            for window, step in pairs:
                assert not window or (window - 1, step) in done
                done.add((window, step))
        assert len(done) == len(plan) * steps
        for index in range(len(plan)):
            stretch = set(range(*plan.stretch(index)))
            read = {shares.owner(k): len(stretch & set(range(*plan.windows[k]))) for k in range(index)}
            read.pop(shares.owner(index), None)
            assert shares.readers(index) == {rank: frames for rank, frames in read.items() if frames}


WINDOW_CASES = [
    replace(case, order=order)
    for order in ORDERS
    for case in (
        Case(),
        Case(solver="unipc", overlap=3, guidance="cfg"),
        Case(solver="dpm", overlap=4, total=12),
        Case(total=22, tail="shift", solver="unipc", steps=5),
        Case(total=21, overlap=3, tail="shift", guidance="audio_native"),
        Case(overlap=0),
        Case(total=8, steps=2),
        Case(total=4, steps=3),
        Case(steps=1),
        Case(guidance="cfg", steps=10, step_cache=0.05, overlap=3),
    )
]


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_shared_windows_are_one_process_bit_for_bit(crew, processes):
    together = crew.run(processes, generate_all, WINDOW_CASES, {"windows": processes})
    for number, case in enumerate(WINDOW_CASES):
        stretches, rows, sent = zip(*(results[number] for results in together), strict=True)
        alone, all_rows = generate(case)
        assert same(stretches[0], plain(alone)) and not any(stretches[1:]), case
        assert sum(rows) == all_rows, case
        expected = WindowShares(case.plan(), case.order, processes).frames_sent(case.steps)
        assert sum(sent, Counter()) == Counter({kind: frames * FRAME_BYTES for kind, frames in expected.items() if frames}), case


PASS_CASES = [
    Case(guidance="none", total=8),
    Case(guidance="cfg", solver="unipc"),
    Case(guidance="audio_native", overlap=3, order="wavefront", tail="shift", total=22),
    Case(guidance="cfg", steps=10, step_cache=0.05, overlap=3, order="wavefront", total=14),
]


@pytest.mark.parametrize("sizes", [{"guidance": 2}, {"guidance": 3}, {"guidance": 2, "windows": 2}], ids=str)
def test_shared_passes_are_one_process_bit_for_bit(crew, sizes):
    guidance, windows = sizes["guidance"], sizes.get("windows", 1)
    together = crew.run(prod(sizes.values()), generate_all, PASS_CASES, sizes)
    for number, case in enumerate(PASS_CASES):
        stretches, rows, sent = zip(*(results[number] for results in together), strict=True)
        alone, all_rows = generate(case)
        for rank, own in enumerate(stretches):  # ranks run through guidance before windows
            assert same(own, plain(alone) if rank < guidance else []), (case, rank)
        assert sum(rows) == all_rows, case
        if not case.step_cache and windows == 1:
            per_pass = sum(stop - start for start, stop in case.plan().windows) * case.steps
            passes = 1 if case.guidance == "none" else 3
            shares = {(1, 2): (1, 0), (3, 2): (2, 1), (1, 3): (1, 0, 0), (3, 3): (1, 1, 1)}[passes, guidance]
            assert rows == tuple(len(case.plan()) * case.steps * share for share in shares), case
            assert sum(sent, Counter()) == {"guidance": passes * per_pass * FRAME_BYTES * (guidance - 1)}, case


def sent_by_round(case: Case, sizes: Sizes) -> list[Counter]:
    """In a process of a mesh: bytes sent in every round."""
    mesh, totals = Mesh.over("cpu", **sizes), []
    with Traffic() as traffic:
        generate(case, mesh, on_round=lambda count: totals.append(Counter(traffic.sent)))
    return [after - before for before, after in zip(totals[:-1], totals[1:], strict=True)]


def test_only_overlaps_travel_in_a_round(crew):
    """Four windows on two processes meet at one overlap of two frames, whatever the windows' length."""
    case, overlap = Case(total=32, length=10, overlap=2, steps=3), 2 * FRAME_BYTES
    first, second = crew.run(2, sent_by_round, case, {"windows": 2})
    assert first == [{}, {"carried": overlap}, {"carried": overlap}]
    assert second == [{"stretches": overlap}, {"stretches": overlap}, {"finished": 16 * FRAME_BYTES}]


class Killed(Exception):
    """Stands for the end of a process."""


class Killing(NoRunStore):
    """A store whose process ends when it would look at the clock for the nth time."""

    def __init__(self, store: NoRunStore, rounds: int) -> None:
        self.rounds = rounds
        self.load, self.get, self.put, self._maybe_save = store.load, store.get, store.put, store.maybe_save

    def maybe_save(self, make_state):
        if not self.rounds:
            raise Killed
        self.rounds -= 1
        self._maybe_save(make_state)


def open_store(case: Case, folder: Path, mesh: Mesh | None) -> NoRunStore:
    store = RunStore(folder, asdict(replace(case, order="")), 0) if leads(mesh) else NO_RUN_STORE
    return SharedRunStore(store, mesh) if mesh else store


def go_on(case: Case, folder: Path, sizes: Sizes | None, rounds: int) -> tuple[list[np.ndarray], int]:
    """Goes on with a run for some rounds; its stretches, none if it was killed, and the windows' steps that it began with."""
    mesh = Mesh.over("cpu", **sizes) if sizes else None
    store, progress = together(mesh, partial(open_store, case, folder, mesh)), []
    try:
        return plain(generate(case, mesh, Killing(store, rounds), progress.append)[0]), progress[0]
    except Killed:
        if mesh:
            dist.barrier()  # the connections go down with the first process that leaves; others may still be receiving
        return [], progress[0]


TWO, THREE, FOUR = {"windows": 2}, {"windows": 3}, {"windows": 2, "guidance": 2}
RELAYS = {
    "2 to 1 to 3 to 2": [(TWO, "step_major", 2), (None, "wavefront", 7), (THREE, "wavefront", 6), (TWO, "step_major", 99)],
    "1 to 2x2 to 2 to 1": [(None, "wavefront", 13), (FOUR, "step_major", 1), (TWO, "wavefront", 5), (None, "step_major", 999)],
}
RELAY_CASES = [Case(solver="unipc", overlap=3, total=19, steps=6, guidance="cfg", step_cache=0.02), Case(solver="dpm", steps=5)]


@pytest.mark.parametrize("relay", RELAYS)
@pytest.mark.parametrize("case", RELAY_CASES, ids=("unipc", "dpm"))
def test_a_killed_run_goes_on_under_another_order_and_mesh(crew, tmp_path, relay, case):
    starts = []
    for sizes, order, rounds in RELAYS[relay]:
        arguments = (replace(case, order=order), tmp_path / "work", sizes, rounds)
        stretches, start = crew.run(prod(sizes.values()), go_on, *arguments)[0] if sizes else go_on(*arguments)
        starts.append(start)
    assert starts[0] == 0 and starts == sorted(set(starts)), "no leg began where the one before had ended"
    assert same(stretches, plain(generate(case)[0]))


def complaint(case: Case, folder: Path, sizes: Sizes) -> str:
    try:
        go_on(case, folder, sizes, 99)
    except ValueError as error:
        return str(error)
    return ""


def test_a_folder_that_cannot_be_used_is_told_in_every_process(crew, tmp_path):
    go_on(Case(), tmp_path, None, 3)
    answers = crew.run(2, complaint, Case(solver="dpm"), tmp_path, {"windows": 2})
    assert ["differs in: solver" in answer for answer in answers] == [True, True]
    (tmp_path / "state.pt").write_bytes(b"nonsense")
    answers = crew.run(2, complaint, Case(), tmp_path, {"windows": 2})
    assert ["state.pt cannot be read" in answer for answer in answers] == [True, True]


def denoise_on(sizes: Sizes, runs: list[tuple[InferenceConfig, int]], voice: Path) -> list[list[np.ndarray]]:
    """In a process of a mesh: what the tiny pipeline denoises in each run; it ends after some rounds, or clips of motion frames."""
    pipe, pixels, results = tiny_pipeline(), torch.linspace(-1, 1, 3 * 32 * 32).view(3, 32, 32), []
    pipe.set_progress_bar_config(disable=True)
    pipe.parallel = Mesh.over("cpu", **sizes) if sizes else None
    for config, limit in runs:
        with AudioTrack(voice) as track:
            inputs = (track, "a man speaks")
            store = pipe._run_store(pixels, *inputs, config)
            clips = limit if config.windows.strategy == "motion_frame" else None
            latents = pipe.denoise(pipe.encode(pixels, *inputs, 45, config), 45, config, store if clips else Killing(store, limit))
            try:
                results.append(plain(islice(latents, clips)))
            except Killed:
                dist.barrier()
                results.append([])
    return results


@pytest.mark.parametrize("sizes", [{"windows": 2}, {"guidance": 2}], ids=str)
def test_the_pipeline_denoises_alike_on_any_mesh(crew, settings, make_voice, tmp_path, sizes):
    """Once from the beginning to the end, and once killed on the way; 45 frames are three windows, or three clips."""
    changes = [{"guidance__name": "audio_native", "solver": "unipc", "steps": 3}]
    changes.append({"windows__order": "step_major"} if "windows" in sizes else {"windows__strategy": "motion_frame"})
    configs = [settings(**change) for change in changes]
    kept = [replace(config, work_dir=str(tmp_path / f"{number}"), save_every=0.0) for number, config in enumerate(configs)]
    runs = [(kept[0], 3), (kept[0], 99), (kept[1], 1), (kept[1], 99)]
    voice = make_voice(28_800)
    got = crew.run(2, denoise_on, sizes, [(config, 99) for config in configs] + runs, voice)[0]
    expected = denoise_on({}, [(config, 99) for config in configs], voice)
    for one, many in zip(expected * 2, got[:2] + got[3::2], strict=True):
        assert len(one) == len(many) == 3
        for a, b in zip(one, many, strict=True):
            np.testing.assert_allclose(b, a, atol=1e-5, rtol=1e-5)
    assert [len(part) for part in got[2::2]] == [0, 0 if "windows" in sizes else 1], "a run was not ended on the way"


@pytest.mark.parametrize(
    "total, order, ranks, busy",
    [
        (26, "step_major", 2, 1),  # eight windows, four each
        (11, "step_major", 2, 9 / 12),  # three windows: each of three steps takes as long as two predictions
        (11, "wavefront", 2, 9 / 14),  # seven rounds as long as one prediction; in one of them both work
        (11, "wavefront", 1, 1),
    ],
)
def test_idle_processes_are_foreseen(total, order, ranks, busy):
    assert WindowShares(WindowPlan.sliding(total, 5, 2), order, ranks).busy(3) == pytest.approx(busy)

"""The estimate of many GPUs: its bytes and operations against those of real processes, its times against hand formulas."""

from collections import Counter
from dataclasses import replace
from math import inf, prod
from pathlib import Path

import plan_memory
import pytest
import torch
from make_tiny_model import tiny_pipeline, tiny_transformer

from stableavatar.config import InferenceConfig, override
from stableavatar.media import AudioTrack
from stableavatar.parallel.estimate import Cluster, Job, MeshSizes, busiest, check, forecast, meshes, rank_meshes
from stableavatar.parallel.mesh import Mesh
from stableavatar.parallel.sequence import apply_sequence_parallel
from stableavatar.parallel.traffic import Traffic
from stableavatar.parallel.volume import forward_bytes, velocity_bytes, window_bytes
from stableavatar.parallel.windows import WindowShares
from stableavatar.parallel.work import Size, decode_work, forward_work, read_work, weights
from stableavatar.sampling.windows import WindowPlan
from stableavatar.training.cost import Meter, make_inputs
from stableavatar.training.estimate import GIB, RUNTIME

SHAPE = (6, 10, 6)  # fifteen tokens per frame
SIZES = {2: [(1, 2), (2, 1)], 3: [(3, 1), (1, 3)], 4: [(2, 2)]}
"""Processes -> (ring, ulysses); neither tokens nor heads always divide."""
GENERATIONS = [{"windows": 2, "ulysses": 2}, {"windows": 2, "guidance": 2}]


def tiny():
    """Four heads of 16, two blocks, float32."""
    model = tiny_transformer().eval()
    return model, Size.of({key: value for key, value in model.config.items() if not key.startswith("_")}, torch.float32)


def forward_really(sizes: list[tuple[int, int]]) -> list[tuple[dict, int]]:
    """Bytes that this process sends in forwards of real tensors, and its operations."""
    found = []
    for ring, ulysses in sizes:
        model = tiny()[0]
        apply_sequence_parallel(model, Mesh.over("cpu", ring=ring, ulysses=ulysses))
        with torch.no_grad(), Traffic() as traffic, Meter(model.parameters()) as meter:
            model(*make_inputs(model, SHAPE, 1))
        found.append((dict(+traffic.sent), meter.flops))
    return found


@pytest.mark.parametrize("processes", SIZES)
def test_bytes_and_operations_are_those_of_real_processes(processes, crew):
    size = tiny()[1]
    for rank, answers in enumerate(crew.run(processes, forward_really, SIZES[processes])):
        for (ring, ulysses), (sent, flops) in zip(SIZES[processes], answers, strict=True):
            assert sent == forward_bytes(size, SHAPE, 1, ring, ulysses, rank)
            assert set(sent) == {"gather"} | {kind for kind, count in (("ring", ring), ("ulysses", ulysses)) if count > 1}
            work = forward_work(size, SHAPE, 1, ring, ulysses)
            expected = work.outside + 2 * work.block
            assert flops == pytest.approx(expected, rel=1e-9) if rank == 0 else flops <= expected


def denoise_really(meshes: list[dict[str, int]], config: InferenceConfig, frames: int, voice: Path) -> list[Counter]:
    """Bytes that this process sends in a whole generation on each mesh."""
    found = []
    for sizes in meshes:
        pipe, mesh = tiny_pipeline(), Mesh.over("cpu", **sizes)
        pipe.set_progress_bar_config(disable=True)
        apply_sequence_parallel(pipe.transformer, mesh)
        pipe.parallel = mesh
        with AudioTrack(str(voice)) as audio, Traffic() as traffic:
            list(pipe.denoise(pipe.encode(torch.zeros(3, config.height, config.width), audio, "", frames, config), frames, config))
        found.append(+traffic.sent)
    return found


def test_a_generation_sends_what_the_formulas_say(crew, settings, make_voice):
    frames, steps = 53, 2
    config = settings(steps=steps)
    answers = crew.run(4, denoise_really, GENERATIONS, config, frames, make_voice(frames * 640))
    job = Job.of(config, tiny()[1], frames)
    assert job.passes == (3, 3) and len(job.plan) == 3
    overlaps = window_bytes(WindowShares(job.plan, "wavefront", 2), steps, 4, 4)  # which both processes of a group exchange
    shared, guided = (Counter({kind: 2 * n for kind, n in overlaps.items()}) for _ in GENERATIONS)
    for window in job.plan.windows:
        shape = (window.stop - window.start, 4, 4)
        guided["guidance"] += steps * 3 * velocity_bytes(shape)
        for rank in range(2):
            shared += Counter({kind: steps * 3 * n for kind, n in forward_bytes(job.size, shape, 1, 1, 2, rank).items()})
    assert [sum(sent, Counter()) for sent in zip(*answers, strict=True)] == [+shared, +guided]


def test_a_line_through_two_readings_meets_others():
    _, size = tiny()
    for ring, ulysses in ((3, 1), (2, 4)):
        line, read = forward_work(size, SHAPE, 1, ring, ulysses), read_work(size, SHAPE, 1, ring, ulysses)
        assert (line.outside, line.block) == pytest.approx((read.outside, read.block), rel=1e-9)
        assert 0.9 * read.peak < line.peak < 1.6 * read.peak


def test_one_process_is_what_a_real_forward_computes_and_holds():
    model, size = tiny()
    with torch.no_grad():
        inputs = make_inputs(model, SHAPE, 1)
        with Meter([*model.parameters(), *inputs[:2]]) as meter:
            model(*inputs)
    work = forward_work(size, SHAPE, 1)
    assert meter.flops == work.outside + 2 * work.block
    assert work.peak == pytest.approx(meter.peak, rel=0.1)
    assert sum(p.nbytes for p in model.parameters()) == weights(size)[0] + 2 * weights(size)[1]


def test_the_busiest_process_sets_the_pace():
    plan = WindowPlan.sliding(21, 5, 1)  # five windows
    for ranks, rounds in ((1, 5), (2, 3), (3, 2), (4, 2), (5, 1)):
        found, _ = busiest(plan, "step_major", ranks, (1, 1))
        assert found.sum() == 10 and (found.sum(-1).amax(1).sum() == 2 * rounds)
    mixed, first = busiest(plan, "wavefront", 2, (1, 3))
    assert mixed.sum((0, 1)).tolist() == [5, 5] and first == plan.reach + 1
    short, _ = busiest(WindowPlan.sliding(12, 5, 1), "step_major", 1, (1,))  # 5 + 5 + 4 frames
    assert float(short.sum()) == pytest.approx(2.8)


FAST = Cluster(memory=inf, rate=1e9, decode_rate=inf, link=inf, network=inf, host=inf, copy=inf, stream=inf, latency=0)


def make_job(frames=53, **values):
    words = {"width": 48, "height": 80, "steps": 4, "windows.frames": 21, "windows.overlap": 2}
    return Job.of(override(InferenceConfig(), words | {key.replace("__", "."): value for key, value in values.items()}), tiny()[1], frames)


def seconds(job, cluster, **sizes):
    return forecast(job, cluster, MeshSizes(**sizes), "step_major").denoise


def test_imbalance_costs_what_it_leaves_idle():
    job = make_job()
    alone = seconds(job, FAST)
    work = forward_work(job.size, job.shape, 1)
    frames = sum(window.stop - window.start for window in job.plan.windows)
    assert alone == pytest.approx(4 * 3 * frames / 6 * (work.outside + 2 * work.block) / 1e9)
    assert seconds(job, FAST, guidance=2) == pytest.approx(alone * 2 / 3)  # 2 + 1 passes
    assert seconds(job, FAST, guidance=3) == pytest.approx(alone / 3)
    assert len(job.plan) == 3 and seconds(job, FAST, windows=2) == pytest.approx(alone * 2 / 3)  # 2 + 1 windows
    assert alone / 2 < seconds(job, FAST, ulysses=2) < alone / 2 * 1.6  # embeddings, adapter and contexts are not shared out
    assert seconds(job, FAST, ulysses=3) > seconds(job, FAST, ring=3)  # four heads over three processes


def test_links_and_latency_cost_time():
    job = make_job()
    for sizes in ({"ulysses": 2}, {"ring": 2}, {"ulysses": 2, "ring": 2}, {"guidance": 3}, {"windows": 2}):
        fast = seconds(job, FAST, **sizes)
        assert seconds(job, replace(FAST, link=1e6, host=1e6), **sizes) > fast
        assert seconds(job, replace(FAST, latency=1), **sizes) > fast or "guidance" in sizes or "windows" in sizes
    inside, across = (replace(FAST, link=1e9, network=1e6, machine=machine) for machine in (2, 1))
    assert seconds(job, inside, ulysses=2) < seconds(job, across, ulysses=2)
    hidden = forward_bytes(job.size, job.shape, 1, 2, 1)["ring"] / 2 * FAST.rate / forward_work(job.size, job.shape, 1, 2).attention
    gather = forward_bytes(job.size, job.shape, 1, 2, 1)["gather"]
    slow = replace(FAST, link=4 * hidden)  # a ring's keys arrive while it computes: only the gather is waited for
    forwards = seconds(job, FAST) / forecast(job, FAST, MeshSizes(), "step_major").forward
    assert seconds(job, slow, ring=2) - seconds(job, FAST, ring=2) == pytest.approx(forwards * gather / slow.link, rel=1e-3)


def test_memory_follows_mode_and_sharding():
    job, decode = make_job(), decode_work(10, 6, False)[1]
    outside, block = weights(job.size)
    whole, work = outside + 2 * block, forward_work(job.size, job.shape, 1)
    memory = {name: forecast(make_job(**words), FAST, MeshSizes(ulysses=2), "step_major").memory for name, words in {
        "full": {}, "shard": {"parallel__shard": True, "parallel__ulysses": 2}, "model": {"memory__mode": "model_offload"},
        "offload": {"parallel__shard": True, "parallel__ulysses": 2, "parallel__offload": True},
    }.items()}  # fmt: skip
    assert memory["full"] == RUNTIME + whole + sum(job.encoders.values()) + max(decode, forward_work(job.size, job.shape, 1, 1, 2).peak)
    assert work.peak > 0 and memory["full"] - memory["shard"] == pytest.approx(job.encoders["text_encoder"] / 2, rel=0.01)
    assert memory["shard"] - memory["offload"] == pytest.approx(job.encoders["text_encoder"] / 2, rel=0.01)
    assert memory["model"] == RUNTIME + max(job.encoders["text_encoder"], whole + work.peak)


def test_meshes_that_leave_processes_idle_fall_out():
    assert len(meshes(64)) == 84 and all(prod(sizes) == 64 for sizes in meshes(64))
    job = make_job()
    for sizes, word in (({"windows": 8}, "windows"), ({"guidance": 4}, "guidance"), ({"ulysses": 5}, "ulysses"), ({"ring": 31}, "31")):
        with pytest.raises(ValueError, match=word):
            check(job, MeshSizes(**sizes))
    ranked, refused = rank_meshes(job, FAST, 4)
    assert len(ranked) + sum(refused.values()) == len(meshes(4))
    assert [each.video for each in ranked] == sorted(each.video for each in ranked)
    nothing, refused = rank_meshes(job, replace(FAST, memory=GIB), 1)
    assert nothing == [] and refused == Counter({"memory: more than 1 GiB on a GPU": 1})


def test_the_command_tells_the_best_mesh(tiny_folder, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {tiny_folder}\nwidth: 48\nheight: 80\ndtype: float32\nsteps: 4\nwindows: {{frames: 21, overlap: 2}}\n")
    assert plan_memory.main([str(config), "--gpus", "4", "--seconds", "4", "--best", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 blocks, width 64" in out and "100 frames (4.0 s)" in out
    best = [line.split() for line in out.partition("Best meshes of 4 GPUs")[2].splitlines()[2:4]]
    assert [line[0] for line in best] == ["4", "4"] and float(best[0][11]) <= float(best[1][11])
    table = [line.split() for line in out.partition("the best mesh of each")[2].splitlines()[2:]]
    assert [line[0] for line in table if line] == ["1", "2", "4"]
    assert plan_memory.main([str(config), "--gpus", "2", "--card", "1"]) == 0
    assert "No mesh of 2 GPUs fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "part"), [(["--gpus", "0"], "--gpus must be more than 0"), (["--gpus=2", "stepps=3"], "steps"), (["--gpus=2"], "--model")]
)
def test_mistakes_are_one_line(words, part, capsys):
    assert plan_memory.main(words) == 2
    message = capsys.readouterr().err
    assert part in message and message.count("\n") == 1

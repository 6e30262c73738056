"""The estimate as text: the best meshes of some GPUs, why others fall out, and how the time falls with more GPUs."""

from collections.abc import Iterator, Sequence

from stableavatar.parallel.estimate import Cluster, Forecast, Job, MeshSizes, forecast, rank_meshes
from stableavatar.parallel.mesh import DIMS
from stableavatar.training.estimate import GIB

COLUMNS = ("GPUs", " x ".join(DIMS), "order", "GiB", "s/step", "video s", "first s", "speed-up", "efficiency", "MB sent/step by each GPU")


def report(job: Job, cluster: Cluster, gpus: int, best: int) -> Iterator[str]:
    """Lines for a job on 1 .. `gpus` GPUs, with the `best` fastest meshes of `gpus`."""
    alone = forecast(job, cluster, MeshSizes(), job.config.windows.order)
    yield from describe(job, alone)
    ranked, refused = rank_meshes(job, cluster, gpus)
    yield f"\nBest meshes of {gpus} GPUs:" if ranked else f"\nNo mesh of {gpus} GPUs fits."
    yield table([row(each, alone) for each in ranked[:best]])
    yield from (f"not possible ({count} of the meshes): {reason}" for reason, count in sorted(refused.items()))
    yield "\nWith more and more GPUs, the best mesh of each:"
    counts = sorted({gpus, *(2**n for n in range(gpus.bit_length()))})
    yield table([row(found[0], alone) for count in counts if (found := rank_meshes(job, cluster, count)[0])])
    if alone.memory > cluster.memory:
        yield f"One GPU would need {alone.memory / GIB:.1f} GiB; speed-up and efficiency are against its time if it had them."


def describe(job: Job, alone: Forecast) -> Iterator[str]:
    """What is to be made, and what of it no mesh makes faster."""
    full, settings = job.size.full, job.config
    model = f"{full['num_layers']} blocks, width {full['dim']}, {full['num_heads']} heads"
    length = f"{settings.width}x{settings.height}, {job.frames} frames ({job.frames / settings.fps:.1f} s)"
    yield f"{model}; {length}: {len(job.plan)} windows, {len(job.passes)} steps, {max(job.passes)} passes a step"
    yield f"Decoding takes {alone.decode:.0f} s on the first GPU and is not shared out;"
    yield f"embeddings, conditions and adapter, {alone.replicated:.1%} of a forward, are computed by every GPU of a sequence group."


def row(found: Forecast, alone: Forecast) -> tuple[str, ...]:
    """A line of the table."""
    gpus = found.sizes.windows * found.sizes.guidance * found.sizes.sequence
    faster = alone.video / found.video
    sent = ", ".join(f"{kind} {count / 1e6:.3g}" for kind, count in found.sent.items()) or "-"
    seconds = f"{found.step:.3g}", f"{found.video:.0f}", f"{found.first:.0f}"
    return str(gpus), str(found.sizes), found.order, f"{found.memory / GIB:.1f}", *seconds, f"{faster:.2f}", f"{faster / gpus:.0%}", sent


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows under their heads; the last column is ragged."""
    lines = [COLUMNS, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line[:-1], widths)) + "  " + line[-1] for line in lines)

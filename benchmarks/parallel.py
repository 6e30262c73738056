"""Seconds of a denoising step on every mesh of some processes, against what the estimate says for the rates measured beside them.

    python benchmarks/parallel.py [--processes 1 2 4] [--device cuda] [--pixels 256] [--layers 4] [--windows 4] [--steps 2]

On CPUs a process has one thread and gloo between it and the others; on GPUs each has its own, with NCCL. With as many processes at work as
the mesh has, these rates are measured first: matrix products, copies, messages. How much of the first the transformer reaches is
taken from one process alone; everything else is the model of `stableavatar/parallel/estimate.py`. Decoding is left out.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from stableavatar.config import InferenceConfig, override
from stableavatar.geometry import IMAGE_TOKENS, LATENT_CHANNELS, WINDOW_FRAMES, frame_samples, frames_to_latents, latents_to_frames
from stableavatar.models.dit import AvatarTransformer
from stableavatar.parallel.estimate import Cluster, Job, MeshSizes, check, forecast, meshes
from stableavatar.parallel.guidance import share_passes
from stableavatar.parallel.mesh import Mesh
from stableavatar.parallel.sequence import apply_sequence_parallel
from stableavatar.parallel.traffic import Traffic
from stableavatar.parallel.windows import share_windows
from stableavatar.parallel.work import Size
from stableavatar.sampling.conditioning import Conditioning
from stableavatar.sampling.denoise import GuidedVelocity, SlidingWindows, denoise_windows
from stableavatar.sampling.flow import frame_noise, make_scheduler
from stableavatar.sampling.guidance import Guidance, Text
from stableavatar.sampling.step_cache import StepCache

ORDER = "step_major"
OVERLAP = 2


def make_job(options: argparse.Namespace) -> Job:
    """A video of so many whole windows, and a transformer whose text and image are narrow."""
    length = frames_to_latents(options.frames)
    frames = latents_to_frames(length + (options.windows - 1) * (length - OVERLAP))
    words = {"width": options.pixels, "height": options.pixels, "steps": options.steps, "windows.frames": options.frames,
             "windows.overlap": OVERLAP, "windows.order": ORDER}  # fmt: skip
    settings = {"dim": 64 * options.heads, "num_heads": options.heads, "num_layers": options.layers, "ffn_dim": 256 * options.heads,
                "text_dim": 64, "image_dim": 64}  # fmt: skip
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    return Job.of(override(InferenceConfig(), words), Size.of(settings, dtype), frames)


def make_conditioning(job: Job, model: AvatarTransformer, device: torch.device) -> Conditioning:
    """Random text, image, reference and voice."""
    width, options = model.config, {"device": device, "dtype": job.size.dtype}
    text = {name: torch.randn(1, width.text_length, width.text_dim, **options) for name in Text}
    reference = torch.randn(width.in_channels - LATENT_CHANNELS, *job.shape, **options)
    voice = torch.randn(1, frame_samples(latents_to_frames(job.shape[0])) // 320, width.audio_dim, **options)
    return Conditioning(text, torch.randn(1, IMAGE_TOKENS, width.image_dim, **options), reference, lambda window: voice)


def timed(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Seconds of the fastest of a few calls that all processes begin together, in the slowest process."""
    found = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = torch.tensor(time.perf_counter() - start, device=device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        found.append(float(seconds))
    return min(found)


def measure_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What a process reaches while all of them do the same: operations and bytes per second, and seconds of an empty message."""
    side = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    numbers, processes = (1 << 22) * (1 if device.type == "cpu" else 16), dist.get_world_size()
    x = torch.zeros(numbers - numbers % processes, device=device)
    y, parts = torch.empty_like(x), x[:processes].clone()
    rate, stream = 2 * side**3 / timed(lambda: a @ b, device), 2 * x.nbytes / timed(lambda: y.copy_(x), device)
    if processes == 1:
        return {"rate": rate, "stream": stream}
    link = x.nbytes * (processes - 1) / processes / timed(lambda: dist.all_to_all_single(y, x), device)
    latency = timed(lambda: dist.all_to_all_single(torch.empty_like(parts), parts), device)
    host = torch.zeros(1 << 20)
    broadcast = host.nbytes / timed(lambda: dist.broadcast(host, src=0), device)
    return {"rate": rate, "stream": stream, "link": link, "network": link, "host": broadcast, "latency": latency}


@torch.no_grad()
def measure_mesh(job: Job, sizes: MeshSizes, device: torch.device) -> tuple[float, int]:
    """Seconds of a step on average in the slowest process, and bytes that the first one sends in it."""
    torch.manual_seed(0)
    mesh = Mesh.over(device.type, **sizes._asdict())
    model = job.size.build().to(device)
    model.set_attention_backend("native")
    apply_sequence_parallel(model, mesh)
    scheduler = make_scheduler("euler", len(job.passes), 5.0)
    conditioning = make_conditioning(job, model, device)

    def denoise() -> None:
        cache = StepCache(0.0, len(job.passes))
        velocity = GuidedVelocity(model, conditioning, Guidance(), scheduler.timesteps, cache, False, share_passes(mesh))
        shape = (LATENT_CHANNELS, job.height, job.width)
        crew = share_windows(mesh, job.plan, ORDER, shape)
        list(denoise_windows(SlidingWindows(crew, scheduler, partial(frame_noise, shape, 7), velocity), velocity))

    with Traffic() as traffic:
        denoise()  # the first one also warms up
    return timed(denoise, device, repeats=2) / len(job.passes), traffic.sent.total() // len(job.passes)


def usable(job: Job, processes: int) -> list[MeshSizes]:
    """Meshes none of whose processes are idle."""

    def fits(sizes: MeshSizes) -> bool:
        try:
            check(job, sizes)
        except ValueError:
            return False
        return True

    return [sizes for sizes in meshes(processes) if fits(sizes)]


def work(rank: int, processes: int, folder: str, options: argparse.Namespace) -> None:
    """One process: rates, then every mesh; the first one leaves its findings in the folder."""
    torch.set_num_threads(1)
    device = torch.device(options.device, rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store{processes}", processes)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=processes)
    job = make_job(options)
    rates = measure_rates(device, job.size.dtype)
    found = {tuple(sizes): measure_mesh(job, sizes, device) for sizes in usable(job, processes)}
    if rank == 0:
        torch.save((rates, found), f"{folder}/found{processes}")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="beside one (default: 2 4)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    for name, value in {"pixels": 256, "frames": 21, "windows": 4, "steps": 2, "layers": 4, "heads": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"(default: {value}; the published model has "
                            f"{dict(pixels=512, frames=WINDOW_FRAMES, layers=30, heads=12).get(name, 'as you like')})")  # fmt: skip
    options = parser.parse_args()
    job, alone, share = make_job(options), math.nan, 1.0
    print("| processes | mesh | measured s/step | efficiency | model s/step | model / measured | MB sent/step |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for processes in sorted({1, *options.processes}):
            multiprocessing.spawn(work, (processes, folder, options), nprocs=processes)
            rates, found = torch.load(Path(folder) / f"found{processes}")
            cluster = Cluster(machine=processes, **rates)
            if processes == 1:
                alone = found[1, 1, 1, 1][0]
                share = forecast(job, cluster, MeshSizes(), ORDER).step / alone
            cluster = replace(cluster, rate=cluster.rate * share)
            for sizes, (seconds, sent) in found.items():
                model = forecast(job, cluster, MeshSizes(*sizes), ORDER).step
                print(f"| {processes} | {MeshSizes(*sizes)} | {seconds:.3f} | {alone / seconds / processes:.0%} | {model:.3f} "
                      f"| {model / seconds:.2f} | {sent / 1e6:.2f} |", flush=True)  # fmt: skip
            print(f"<!-- {processes}: share {share:.3f}, " + ", ".join(f"{name} {value:.3g}" for name, value in rates.items()) + " -->")


if __name__ == "__main__":
    main()

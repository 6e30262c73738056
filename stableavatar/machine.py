"""What the machine is doing: the memory that a process has used at most, and how fast its device can be."""

import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

DATA_SHEETS = (
    ("B200", 2250), ("H200", 989), ("GH200", 989), ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("H800 PCIe", 756), ("H800", 989),
    ("H20", 148), ("A100", 312), ("A800", 312), ("L40S", 362), ("L40", 181), ("A40", 150), ("A10", 125), ("RTX A6000", 155),
    ("RTX 4090", 165), ("RTX 3090", 71),
)  # fmt: skip
"""Part of a GPU's name -> dense bfloat16 TFLOP/s with float32 sums, from NVIDIA's data sheets; the first that fits counts."""
DATA_SHEET, MEASURED, SET = "data sheet", "measured matmul rate", "setting"
REPEATS = 5


@dataclass(frozen=True)
class Peak:
    """The fastest that a device can be, in floating point operations per second, and who says so."""

    flops: float
    source: str


def peak_host_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss starts at what the parent process had
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has used on a device so far; of the CPU, resident memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_host_bytes()


def fast_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it; float32 on other CPUs, which take ten times as long for it."""
    known = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type != "cpu" or known else torch.float32


def named_precision(name: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16 by their name; auto is the device's `fast_precision`."""
    return fast_precision(device) if name == "auto" else getattr(torch, name)


def memory_bytes(device: torch.device) -> int:
    """All the memory that a device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_of(device: torch.device, dtype: torch.dtype, tflops: float = 0.0) -> Peak:
    """The peak of a device in a precision: `tflops` if given, else from the data sheet, else measured (well under a second)."""
    if tflops:
        return Peak(tflops * 1e12, SET)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if dtype == torch.bfloat16 and (known := data_sheet_tflops(name)):
        return Peak(known * 1e12, DATA_SHEET)
    return Peak(matmul_rate(device, dtype), MEASURED)


def data_sheet_tflops(name: str) -> float | None:
    """Of a GPU by the name that its driver gives; None for an unknown one."""
    words = f" {name} ".replace("-", " ")
    return next((tflops for part, tflops in DATA_SHEETS if f" {part} " in words), None)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large product of square matrices: the fastest of a few."""
    size = 8192 if device.type == "cuda" else 512
    matrix = torch.ones(size, size, device=device, dtype=dtype)

    def seconds() -> float:
        started = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    seconds()
    return 2 * size**3 / min(seconds() for _ in range(REPEATS))

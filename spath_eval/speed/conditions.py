"""What a machine can do, and what else it is doing: the rates that turn counts into seconds, caches, memory, load.

Rates are the best of several repetitions of plain operations of torch, on this machine, in this process: reading a
buffer larger than the last-level cache, and multiplying square matrices. Load and clocks are noted and never changed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.benchmark import Timer

SMALLEST_BUFFER = 64 * 2**20
"""Bytes read where the last-level cache is small or unknown."""
MATRIX = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices that are multiplied."""
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
CONTAINER_LIMITS = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]


@dataclass(frozen=True)
class Rates:
    """How fast a device reads and multiplies."""

    bytes_per_second: float
    flops_per_second: float


def measure_rates(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> Rates:
    """The rates of `device`, on the current number of threads; `dtype` is that of the matrices.

    Each of the four operations is repeated for about `seconds`. The buffer takes at most a quarter of the memory that
    is available, so that reading may be from a cache that is larger.
    """
    wanted = max(2 * (last_level_cache(device) or 0), SMALLEST_BUFFER)
    columns = 4096
    rows = max(2, min(wanted, available_memory(device) // 4) // (4 * columns) // 2 * 2)
    buffer = torch.ones(rows, columns, device=device)
    vector = torch.ones(columns, device=device)
    upper, lower = buffer.chunk(2)
    reading = min(
        _least_seconds("buffer.sum()", {"buffer": buffer}, seconds),
        _least_seconds("torch.mv(buffer, vector)", {"buffer": buffer, "vector": vector}, seconds),
        _least_seconds("upper.copy_(lower)", {"upper": upper, "lower": lower}, seconds),
    )
    size = MATRIX[device.type]
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    multiplying = _least_seconds("torch.mm(left, right)", {"left": left, "right": right}, seconds)
    return Rates(buffer.nbytes / reading, 2 * size**3 / multiplying)


def _least_seconds(statement: str, names: dict[str, Any], seconds: float) -> float:
    timer = Timer(statement, globals={"torch": torch, **names}, num_threads=torch.get_num_threads())
    return float(min(timer.blocked_autorange(min_run_time=seconds).times))


def last_level_cache(device: torch.device) -> int | None:
    """Bytes of the largest cache between `device` and its memory; none where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    except OSError:
        return None
    return max(
        (int(size.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}[size[-1]] for size in sizes), default=None
    )


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device`, within the limit of a container where there is one."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    for path in CONTAINER_LIMITS:
        if path.is_file() and (limit := path.read_text().strip()).isdecimal():
            available = min(available, int(limit) - psutil.Process().memory_info().rss)
    return max(0, available)


def load(device: torch.device) -> dict[str, float]:
    """The load average of the last minute and the clock in MHz, each where it is to be had."""
    found = {}
    if hasattr(os, "getloadavg"):
        found["load_average"] = os.getloadavg()[0]
    try:
        clock = torch.cuda.clock_rate(device) if device.type == "cuda" else getattr(psutil.cpu_freq(), "current", None)
    except (ImportError, RuntimeError, OSError, NotImplementedError):  # torch asks NVIDIA's pynvml, which may be absent
        clock = None
    return found | ({"clock_mhz": float(clock)} if clock else {})

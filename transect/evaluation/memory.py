"""The most memory that was in use at once."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes: on a GPU the peak that torch allocated there, otherwise this process's peak resident set.

    Both count from the start of the process, so one process compares models only by the largest.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; getrusage would count what a parent process had before it started this one
        high_water = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(high_water.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB

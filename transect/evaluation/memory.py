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
    on_linux = _status("VmHWM")  # getrusage would count what a parent process had before it started this one
    if on_linux is not None:
        return on_linux
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def resident_memory() -> int:
    """Bytes that this process has in memory now; its peak so far where the system does not say that."""
    return _status("VmRSS") or peak_memory()


def _status(what: str) -> int | None:
    """A number of Linux's about this process, in bytes; None elsewhere."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024

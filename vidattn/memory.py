"""Peak memory of a piece of work, for the reports of the command line and the demo."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import TracebackType

import torch


class PeakMemory:
    """Measures the highest memory use while its ``with`` block runs.

    On the CPU this is the resident memory of the whole process, whoever allocates it. On a CUDA device it is what
    torch's allocator handed out on that device.

    Args:
        device: where the work runs.

    Attributes:
        peak: highest use in bytes during the block, None where the system does not tell.
        growth: how much of it came on top of the use at the start of the block, in bytes, or None. Memory that the
            process had freed but not returned to the system before the block is not seen growing again.

    Example:
        >>> with PeakMemory() as memory:
        ...     _ = torch.ones(2**24)
        >>> memory.growth is None or memory.growth > 2**25
        True
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.peak: int | None = None
        self.growth: int | None = None
        self._start: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            # Linux can forget the high-water mark; elsewhere growth counts from the highest mark so far.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            self._start = _peak_resident()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _peak_resident()
        if self.peak is not None and self._start is not None:
            self.growth = self.peak - self._start


def _peak_resident() -> int | None:
    """Returns the highest resident memory of this process in bytes, or None where the system does not tell."""
    # Linux: VmHWM belongs to this program alone, while ru_maxrss starts at the size of the process that launched it.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def format_bytes(count: int | None) -> str:
    """Writes a number of bytes for people.

    Args:
        count: bytes, or None for unknown.

    Returns:
        For example "1.21 GiB", or "unknown".

    Example:
        >>> format_bytes(3 * 2**19), format_bytes(None)
        ('1.5 MiB', 'unknown')
    """
    if count is None:
        return "unknown"
    if abs(count) >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.1f} MiB"

"""Memory of a training process: keeping freed memory, measuring it, and returning a GPU's.

A pass frees what the next one allocates again. The C library returns large blocks to the kernel, which zeroes every page again: with
per-example gradients of hundreds of MB that takes a fifth of the time.
"""

import ctypes
import platform
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Lets this process keep freed memory for its next allocations; its resident set then stays at the peak.

    Does nothing without glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_gpu_memory() -> None:
    """Frees the GPU memory that this process caches, for other processes; does nothing if no GPU is in use."""
    import torch  # measuring a process's memory does not need it

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def resident_bytes(*, peak: bool = False) -> int:
    """Returns the resident memory of this process, or its peak since the program began; 0 if the system does not report it.

    The peak of `getrusage` is unsuitable: a process inherits it from its parent.
    """
    status, name = Path("/proc/self/status"), "VmHWM:" if peak else "VmRSS:"
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)

"""What a process of a CPU run does with memory that was freed: keep it for the next step.

A training step frees and asks for the same activations and gradients again and again. The C library gives large pieces
back to the kernel, which hands them out again page by page, each page zeroed and faulted in anew (``python -m
tools.bench sharded`` has DDP with and without it). On a device torch's caching allocator does the same work.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's mallopt(3)."""
LARGEST = 32 << 20
"""Bytes: the largest piece that glibc can take from its heap. Larger ones come from the kernel each time."""
_NEVER = (1 << 31) - 1
_USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Keep what this process frees, from now on and for good, in pieces of up to ``LARGEST`` bytes.

    Returns False, and changes nothing, where the C library is not glibc, another allocator was preloaded, or the user
    set glibc's own variables (mallopt(3), ``GLIBC_TUNABLES``).
    """
    tuned = "glibc.malloc" in environ.get("GLIBC_TUNABLES", "") or any(name in environ for name in _USERS)
    if tuned or "malloc" in environ.get("LD_PRELOAD", ""):
        return False
    mallopt = _mallopt()
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, LARGEST) and mallopt(_TRIM_THRESHOLD, _NEVER))


def _mallopt() -> Callable[[int, int], int] | None:
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # musl has a mallopt in name only
        found: Callable[[int, int], int] = library.mallopt
    except (AttributeError, OSError, TypeError):
        return None
    return found

"""Camshaft's own kernels in Triton: one file an operation, each with the signature of ``camshaft.ops``.

They run on NVIDIA GPUs from compute capability 8.0, and on a CPU in Triton's interpreter, which is for tests: it takes
about a millisecond a program. Importing this package imports neither torch nor triton; importing one of its modules
does, and decides there whether kernels are compiled or interpreted (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OLDEST = (3, 6)
"""Triton's version from which everything here is tried."""

CAPABILITY = (8, 0)
"""The oldest GPUs that have bf16 in hardware."""

_VARIABLE = "TRITON_INTERPRET=1"


def available(device: torch.device | None = None) -> str | None:
    """Why these kernels cannot run in this process on ``device`` (None: the current GPU), in one sentence; None: they
    can.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'camshaft[kernels]'"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    return _interpreter() if triton.knobs.runtime.interpret else _gpu(device)


def _interpreter() -> str | None:
    """Triton's own functions are decorated when it is imported, and stay what they were made then."""
    from triton.language import standard
    from triton.runtime.jit import JITFunction

    if isinstance(standard.sum, JITFunction):
        return f"{_VARIABLE} was set after triton was imported: set it before the process starts"
    return None


def _gpu(device: torch.device | None) -> str | None:
    import torch

    if torch.version.hip is not None:
        return "Camshaft's Triton kernels are tried on NVIDIA GPUs alone, and this torch is built for ROCm"
    if not torch.cuda.is_available():
        return f"there is no CUDA GPU (set {_VARIABLE} before the process starts to interpret on a CPU, for tests)"
    found = torch.cuda.get_device_capability(device if device is not None and device.type == "cuda" else None)
    if found < CAPABILITY:
        return f"the GPU has compute capability {found[0]}.{found[1]}, and {CAPABILITY[0]}.{CAPABILITY[1]} is needed"
    return None

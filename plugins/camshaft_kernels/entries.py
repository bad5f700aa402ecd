"""What an offer brings for its operation: all that belongs to it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from camshaft.errors import PluginError
from camshaft_kernels.registry import OPS

if TYPE_CHECKING:
    from torch import Tensor

    from camshaft.ops import Kernel


def entries_of(kernel: Kernel) -> dict[str, Any]:
    """What ``camshaft.ops.Ops.replace`` takes for ``kernel``.

    A ``rms_norm`` without its form for residuals gets one, in which the sum is made before: without it most norms of
    a decoder would silently stay torch's own.

    Raises:
        PluginError: the operation itself is not among what the kernel brings, or something of another one is.
    """
    given = dict(kernel.entries())
    known = OPS[kernel.op].entries if kernel.op in OPS else (f"others.{kernel.op}",)
    main = next(name for name in known if name.rpartition(".")[2] == kernel.op)
    if main not in given or not given.keys() <= set(known):
        raise PluginError(
            "?",
            "kernels",
            f"'{kernel.provider}' of {kernel.op} brings {', '.join(given) or 'nothing'}, and has to bring '{main}'"
            + (f"; what belongs to it is {', '.join(known)}" if len(known) > 1 else " alone"),
        )
    if kernel.op == "rms_norm":
        given.setdefault("add_rms_norm", _of_sum(given["rms_norm"]))
    return given


def _of_sum(norm: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        summed = residual + hidden
        return norm(summed, weight, eps), summed

    return add_rms_norm

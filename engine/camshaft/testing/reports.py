"""What a rank reports, pickled: tensors as their bytes, where torch pickles each as an archive of its own."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor


def dumps(report: Any) -> bytes:
    """``report`` pickled. Plain dense tensors on the CPU arrive as contiguous copies that share no memory; other
    tensors (parameters, those that require gradients, subclasses) as torch pickles them.
    """
    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(report)
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        return (_tensor, _bytes(value)) if type(value) is Tensor and _plain(value) else NotImplemented


def _plain(value: Tensor) -> bool:
    return (
        value.device.type == "cpu"
        and value.layout == torch.strided
        and not (value.requires_grad or value.is_quantized or value.is_conj() or value.is_neg())
    )


def _bytes(value: Tensor) -> tuple[bytes, torch.dtype, tuple[int, ...]]:
    flat = value.contiguous().view(-1).view(torch.uint8)
    return flat.numpy().tobytes(), value.dtype, tuple(value.shape)


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)

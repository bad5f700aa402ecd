"""Peak rates of devices, from their makers' data sheets: what model FLOP/s utilisation is a share of.

Dense figures, without structured sparsity; tensor cores (or matrix cores) where the device has them for the type. The
name is exactly what ``torch.cuda.get_device_name`` says, so a part of a device (MIG), a board with other clocks or an
unknown one has no figure, and none is guessed.

Sources: NVIDIA's data sheets "V100 Tensor Core GPU" (2020), "T4" (2019), "A100 80GB" (2021), "A10" (2021), "A40"
(2021), "L4" and "L40S" (2023), "H100" (SXM, PCIe: 2022; SXM, NVL: 2024), "GH200 Grace Hopper" (2024), "H200" (2024),
"HGX B200" (2025, eight GPUs); AMD's "Instinct MI300X" (2023) and "Instinct MI325X" (2024). Those that print figures
with sparsity alone are halved.
"""

from __future__ import annotations

from collections.abc import Mapping

Rates = Mapping[str, float]
"""Name of a type to operations a second."""


def _rates(**tera: float) -> Rates:
    return {name: value * 1e12 for name, value in tera.items()}


_V100_SXM = _rates(fp16=125, fp32=15.7, fp64=7.8)
_V100_PCIE = _rates(fp16=112, fp32=14, fp64=7)
_A100 = _rates(bf16=312, fp16=312, tf32=156, fp32=19.5, fp64=19.5)
_HOPPER_SXM = _rates(fp8=1978.9, bf16=989.4, fp16=989.4, tf32=494.7, fp32=66.9, fp64=66.9)
_HOPPER_NVL = _rates(fp8=1670.5, bf16=835.5, fp16=835.5, tf32=417.5, fp32=60, fp64=60)
_MI300X = _rates(fp8=2614.9, bf16=1307.4, fp16=1307.4, tf32=653.7, fp32=163.4, fp64=163.4)

PEAKS: Mapping[str, Rates] = {
    "Tesla V100-SXM2-16GB": _V100_SXM,
    "Tesla V100-SXM2-32GB": _V100_SXM,
    "Tesla V100-PCIE-16GB": _V100_PCIE,
    "Tesla V100-PCIE-32GB": _V100_PCIE,
    "Tesla T4": _rates(fp16=65, fp32=8.1),
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A10": _rates(bf16=125, fp16=125, tf32=62.5, fp32=31.2),
    "NVIDIA A40": _rates(bf16=149.7, fp16=149.7, tf32=74.8, fp32=37.4),
    "NVIDIA L4": _rates(fp8=242.5, bf16=121, fp16=121, tf32=60, fp32=30.3),
    "NVIDIA L40S": _rates(fp8=733, bf16=362.05, fp16=362.05, tf32=183, fp32=91.6),
    "NVIDIA H100 80GB HBM3": _HOPPER_SXM,
    "NVIDIA H100 PCIe": _rates(fp8=1513, bf16=756, fp16=756, tf32=378, fp32=51, fp64=51),
    "NVIDIA H100 NVL": _HOPPER_NVL,
    "NVIDIA GH200 480GB": _HOPPER_SXM,
    "NVIDIA H200": _HOPPER_SXM,
    "NVIDIA H200 NVL": _HOPPER_NVL,
    "NVIDIA B200": _rates(fp8=4500, bf16=2250, fp16=2250, tf32=1125, fp32=75, fp64=37),
    "AMD Instinct MI300X": _MI300X,
    "AMD Instinct MI325X": _MI300X,
}

_NAMES = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32", "torch.float64": "fp64"}


def type_name(dtype: object, tf32: bool = False) -> str:
    """Column of the table for a torch dtype of matrix products; ``tf32``: whether fp32 products may be made in it."""
    name = _NAMES.get(str(dtype), "fp8" if "float8" in str(dtype) else str(dtype))
    return "tf32" if name == "fp32" and tf32 else name


def peak(device: str, kind: str) -> float | None:
    """Operations a second of ``device`` in ``kind`` (``bf16``, ``fp8``, ...); None where no data sheet says."""
    return PEAKS.get(device, {}).get(kind)

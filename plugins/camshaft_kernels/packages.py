"""Whether the packages that providers need are here, told without importing any of them, and without torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping

from camshaft.cli import inventory
from camshaft_kernels.registry import PACKAGES

Lack = tuple[str, str]
"""What is missing, in one sentence without an end, and what to do about it."""

OLDEST_LIGER = (0, 6)
INTERPRET = "TRITON_INTERPRET"


def _triton() -> Lack | None:
    if not inventory.has_module("triton"):
        return "triton is not installed", "pip install 'camshaft[kernels]'"
    return None


def apex() -> tuple[str, bool]:
    """Which apex is installed, and whether it is NVIDIA's with its CUDA extensions."""
    if inventory.has_module("amp_C"):
        return "NVIDIA apex with CUDA extensions (amp_C)", True
    if not inventory.has_module("apex"):
        return "not installed", False
    if inventory.has_folders("apex", "normalization", "multi_tensor_apply"):
        return "NVIDIA apex without its CUDA extensions: build it with --cpp_ext --cuda_ext", False
    version = inventory.version("apex") or "of unknown version"
    return (
        f"PyPI's 'apex' {version}, an unrelated web package: pip uninstall apex, and build NVIDIA/apex from source",
        False,
    )


def found() -> Iterator[tuple[bool, str, str]]:
    """For ``camshaft doctor``: whether all is well, what was looked at, and what was found."""
    text, real = apex()
    yield real, "apex", text
    versions = inventory.packages(PACKAGES)
    there = [f"{module} {version}" for module, version in versions.items() if version]
    absent = [module for module, version in versions.items() if not version]
    told = ", ".join(there) or "none"
    yield not absent, "kernels", told + (f"; not installed: {', '.join(absent)}" if absent else "")


def _apex() -> Lack | None:
    text, real = apex()
    if real:
        return None
    found = "NVIDIA apex is not installed" if text == "not installed" else f"this is no use here: {text}"
    return found, "build NVIDIA's with tools/install_apex.sh"


def _liger() -> Lack | None:
    fix = "pip install 'liger-kernel>=0.6'"
    if not inventory.has_module("liger_kernel"):
        return "liger_kernel is not installed", fix
    found = inventory.version("liger-kernel") or inventory.version("liger-kernel-nightly")
    if found is not None and _numbers(found) < OLDEST_LIGER:
        return f"liger-kernel {found} is older than 0.6, and its functions take other arguments", fix
    return None


def _transformer_engine() -> Lack | None:
    if not inventory.has_module("transformer_engine"):
        return "transformer_engine is not installed", "pip install --no-build-isolation 'transformer_engine[pytorch]'"
    return None


def _flash_attention() -> Lack | None:
    if not inventory.has_module("flash_attn"):
        return "flash_attn is not installed", "pip install --no-build-isolation flash-attn"
    return None


_NEEDS: Mapping[str, Callable[[], Lack | None]] = {
    "triton": _triton,
    "apex": _apex,
    "liger": _liger,
    "transformer_engine": _transformer_engine,
    "flash_attention": _flash_attention,
}


def lack(provider: str) -> Lack | None:
    """What of ``provider`` is missing on this machine; None: nothing, or it is no provider of ours."""
    needs = _NEEDS.get(provider)
    return None if needs is None else needs()


def interpreted() -> bool:
    """Whether Triton's interpreter is switched on, in which kernels run on a CPU, for tests."""
    return os.environ.get(INTERPRET, "") == "1"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())

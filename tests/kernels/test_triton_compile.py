"""Kernels compile for GPUs that are not here: a cubin comes out, nothing spilled, with accesses of 16 bytes."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux alone")

TRITON = "compiled"
NAMES = [
    *(f"norm{kind} {size} {flag}"
      for size in (*(f"{n} bf16 fp32" for n in (128, 2048, 4096, 8192)),
                   "2048 bf16 bf16", *(f"{n} fp32 fp32" for n in (2048, 8192)))
      for kind in ("", " backward") for flag in (False, True)),
    *(f"norm weight 2048 {dtypes}" for dtypes in ("bf16 fp32", "bf16 bf16")),
    *(f"rope {heads} {flag}" for heads in ("32 8 128", "32 4 64", "20 20 80") for flag in (False, True)),
    "swiglu bf16", "swiglu backward bf16", "swiglu fp32", "swiglu backward fp32",
    *(f"loss {size} {flag}" for size in ("128256 bf16", "50257 bf16", "32000 fp32") for flag in (False, True)),
    "loss gradient 128256 bf16", "loss gradient 32000 fp32",
    "adamw fp32 True", "adamw bf16 True", "adamw fp32 False",
]  # fmt: skip
OTHERS = [
    name for name in NAMES if not any(size in name for size in ("fp32 fp32", "4096", "8192", "bf16 bf16", "50257"))
]
"""Compiled for the oldest and the newest GPUs as well."""


def compiled(name, capability):
    import triton_compiling

    variant = triton_compiling.variants()[name]
    result = triton_compiling.compile_for(variant, capability)
    assert len(result.asm["cubin"]) > 1000
    assert f".target sm_{capability}" in result.asm["ptx"]
    return variant, result


@pytest.mark.parametrize("name", NAMES)
def test_hopper(name):
    import triton_compiling

    variant, result = compiled(name, 90)
    with TemporaryDirectory() as folder:
        registers, spilled = triton_compiling.usage(result, Path(folder))
    assert spilled == 0
    assert 8 < registers <= variant.registers
    found = triton_compiling.accesses(result)
    assert {kind for kind, size in found if size == 16} == variant.wide
    assert variant.narrow is None or sum(size < 16 for _, size in found) <= variant.narrow


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("name", OTHERS)
def test_others(name, capability):
    compiled(name, capability)


@pytest.mark.parametrize("size", ["128256 bf16", "32000 fp32"])
def test_a_labels_logit_is_read_by_all_before_anybody_writes_over_it(size):
    """The interpreter, which runs one thread, cannot tell: the barrier stands between that load and the gradient."""
    _, result = compiled(f"loss {size} True", 90)
    dtype = size.split()[1].replace("fp", "f")
    lines = [line for line in result.asm["ttir"].splitlines() if any(word in line for word in ("tt.", "barrier"))]
    (chosen,) = [place for place, line in enumerate(lines) if "tt.load %chosen" in line and f"<{dtype}> " in line]
    (barrier,) = [place for place, line in enumerate(lines) if "barrier" in line]
    written = [place for place, line in enumerate(lines) if "tt.store" in line and f"x!tt.ptr<{dtype}>" in line]
    assert len(written) == 4, "whole tiles and the last one, of a row that does not count and of one that does"
    assert written[1] < chosen < barrier < written[2]
    _, plain = compiled(f"loss {size} False", 90)
    assert result.asm["ptx"].count("bar.sync") > plain.asm["ptx"].count("bar.sync")


def test_every_kernel_is_compiled_here():
    import triton_compiling

    variants = triton_compiling.variants()
    assert set(variants) == set(NAMES)
    launched = {id(variants[name].kernel) for name in NAMES}
    found = triton_compiling.kernels()
    assert len(found) == 9
    assert {name for name, kernel in found.items() if id(kernel) not in launched} == set()

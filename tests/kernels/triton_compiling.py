"""Every kernel as it is launched for sizes that people train, compiled without a GPU."""

import importlib
import pkgutil
import re
import subprocess
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import camshaft_kernels.triton
from camshaft_kernels.triton import adamw, launch, loss, norm, rope, swiglu

ARITHMETIC = 16
"""What Triton takes sizes and addresses to be multiples of where they are, as those of such models are."""


WIDE, LOADS, NONE = frozenset({"ld", "st"}), frozenset({"ld"}), frozenset()


UNEVEN = frozenset({"tiles", "blocks", "tokens", "count", "programs"})
"""Integers that are seldom multiples of 16."""


@dataclass(frozen=True)
class Variant:
    """One launch: pointers by their dtype, integers as sizes, floats, and compile-time values."""

    name: str
    kernel: JITFunction
    arguments: dict[str, object]
    num_warps: int
    registers: int = 128
    """At most so many a thread; spilled ones are found by themselves."""
    wide: frozenset[str] = WIDE
    """Which of loads and stores are of 16 bytes; all but ``narrow`` ones then are, if that is known."""
    narrow: int | None = 8
    """At most so many loads and stores are smaller: of numbers that a row has one of. None: of a tail that is masked
    element by element too, which adds as many as it has elements.
    """
    uneven: frozenset[str] = UNEVEN
    """Integers that are no multiples of 16."""


SIZES = {"bf16": 2, "fp32": 4}


def norms(columns, dtype="bf16", weight="fp32"):
    tall, block = launch.tile(1 << 16, columns, norm.ELEMENTS)
    common = {"count": "i32", "columns": "i32"}
    pointers = {"hidden": f"*{dtype}", "residual": f"*{dtype}", "weight": f"*{weight}", "summed": f"*{dtype}"}
    pointers |= {"normed": f"*{dtype}", "scales": "*fp32"}
    strides = {"hidden_stride": "i32", "residual_stride": "i32", "eps": "fp32"}
    for add in (False, True):
        chosen = {"ADD": add, "ROWS": tall, "BLOCK": block}
        arguments = pointers | strides | common | chosen
        name = f"norm {columns} {dtype} {weight} {add}"
        yield Variant(name, norm.forward_kernel, arguments, launch.warps(tall * block))
    pointers = {"upstream": f"*{dtype}", "extra": f"*{dtype}", "value": f"*{dtype}", "weight": f"*{weight}"}
    pointers |= {"scales": "*fp32", "gradient": f"*{dtype}", "partial": "*fp32"}
    strides = {"upstream_stride": "i32", "extra_stride": "i32", "value_stride": "i32", "tiles": "i32"}
    tall, block, warps, ahead = norm.backward_launch(1 << 16, columns, SIZES[dtype])
    for extra in (False, True):
        chosen = {"EXTRA": extra, "PARTIAL": True, "AHEAD": ahead, "ROWS": tall, "BLOCK": block}
        arguments = pointers | strides | common | chosen
        yield Variant(f"norm backward {columns} {dtype} {weight} {extra}", norm.backward_kernel, arguments, warps)
    arguments = {"partial": "*fp32", "made": f"*{weight}", "programs": "i32", "columns": "i32"}
    arguments |= dict(zip(("ROWS", "BLOCK"), norm.PARTIAL_TILE, strict=True))
    if columns == 2048 and dtype == "bf16":
        yield Variant(f"norm weight {columns} {dtype} {weight}", norm.weight_kernel, arguments, 4, wide=LOADS)


def rotations(queries, keys, width):
    block = launch.power_of_two(width // 2)
    at_once = [rope.heads_at_once(count, block) for count in (queries, keys)]
    arguments = dict.fromkeys(("q", "turned_q", "k", "turned_k"), "*bf16") | {"cos": "*fp32", "sin": "*fp32"}
    names = "q_batch q_token q_head k_batch k_token k_head cos_batch cos_token sin_batch sin_token tokens"
    arguments |= dict.fromkeys(names.split(), "i32")
    chosen = {"QUERIES": queries, "KEYS": keys, "Q_HEADS": at_once[0], "K_HEADS": at_once[1], "HALF": width // 2}
    for transposed in (False, True):
        arguments = arguments | chosen | {"BLOCK": block, "TRANSPOSED": transposed}
        name = f"rope {queries} {keys} {width} {transposed}"
        yield Variant(name, rope.rope_kernel, arguments, launch.warps(2 * at_once[0] * block))


def gates(dtype):
    sizes = {"gate_stride": "i32", "up_stride": "i32", "columns": "i32", "blocks": "i32", "BLOCK": swiglu.ELEMENTS}
    pointers = dict.fromkeys(("gate", "up", "out"), f"*{dtype}")
    warps = launch.warps(2 * swiglu.ELEMENTS)
    yield Variant(f"swiglu {dtype}", swiglu.forward_kernel, pointers | sizes, warps)
    pointers = dict.fromkeys(("upstream", "gate", "up", "into_gate", "into_up"), f"*{dtype}")
    sizes |= {"upstream_stride": "i32"}
    yield Variant(f"swiglu backward {dtype}", swiglu.backward_kernel, pointers | sizes, warps)


def losses(vocabulary, dtype):
    block = min(launch.power_of_two(vocabulary), loss.ELEMENTS)
    pointers = {"logits": f"*{dtype}", "labels": "*i64", "losses": "*fp32", "peaks": "*fp32", "totals": "*fp32"}
    even = vocabulary % ARITHMETIC == 0
    chosen = {} if even else {"uneven": UNEVEN | {"columns"}, "narrow": None}
    for in_place in (False, True):
        lanes, width, threads = loss.row_launch(vocabulary, SIZES[dtype], in_place=in_place)
        full, rest = divmod(vocabulary, lanes * width)
        arguments = pointers | {"stride": "i32", "columns": "i32", "gain": "fp32"}
        arguments |= {"IN_PLACE": in_place, "FULL": full, "TAIL": rest > 0, "LANES": lanes, "WIDTH": width}
        name = f"loss {vocabulary} {dtype} {in_place}"
        yield Variant(name, loss.loss_kernel, arguments, threads // 32, wide=WIDE if in_place else LOADS, **chosen)
    if not even:  # rows of its own logits are apart by multiples of 16 all the same; those of a caller are not
        return
    arguments = {"logits": f"*{dtype}", "stride": "i32", "labels": "*i64", "peaks": "*fp32", "totals": "*fp32"}
    arguments |= {"upstream": "*fp32", "gradient": f"*{dtype}", "columns": "i32", "blocks": "i32", "BLOCK": block}
    yield Variant(f"loss gradient {vocabulary} {dtype}", loss.gradient_kernel, arguments, launch.warps(2 * block))


def updates(parameter, aligned):
    names = "keep1 keep2 add1 add2 rate widen2 eps decay"
    arguments = {"table": "*i64", "owners": "*i32", "scale": "*fp32"} | dict.fromkeys(names.split(), "fp32")
    dtype = {"fp32": triton.language.float32, "bf16": triton.language.bfloat16}
    chosen = {"P": dtype[parameter], "G": dtype[parameter], "M": dtype["fp32"], "V": dtype["fp32"]}
    at_once = adamw.elements([{"fp32": torch.float32, "bf16": torch.bfloat16}[name] for name in (parameter, "fp32")])
    chosen |= {"SCALED": True, "ALIGNED": aligned, "ELEMENTS": at_once, "CHUNK": adamw.CHUNK}
    name, wide = f"adamw {parameter} {aligned}", WIDE if aligned else NONE
    yield Variant(name, adamw.adamw_kernel, arguments | chosen, adamw.WARPS, wide=wide, narrow=None)


def variants():
    """All of them, by name."""
    found = [
        *(variant for columns in (128, 2048, 4096, 8192) for variant in norms(columns)),
        *norms(2048, "fp32"), *norms(8192, "fp32"), *norms(2048, "bf16", "bf16"),
        *rotations(32, 8, 128), *rotations(32, 4, 64), *rotations(20, 20, 80), *gates("bf16"), *gates("fp32"),
        *losses(128_256, "bf16"), *losses(50_257, "bf16"), *losses(32_000, "fp32"),
        *updates("fp32", True), *updates("bf16", True), *updates("fp32", False),
    ]  # fmt: skip
    return {variant.name: variant for variant in found}


def kernels():
    """Every kernel of the package that is launched: those that take pointers and return nothing."""
    found = {}
    for module in pkgutil.iter_modules(camshaft_kernels.triton.__path__):
        module = importlib.import_module(f"camshaft_kernels.triton.{module.name}")
        own = {f"{module.__name__}.{name}": value for name, value in vars(module).items() if name.endswith("_kernel")}
        found |= {name: value for name, value in own.items() if isinstance(value, JITFunction)}
    return found


def compile_for(variant, capability):
    """What comes out for this compute capability, such as 90."""
    names = variant.kernel.arg_names
    assert set(names) == set(variant.arguments), set(names) ^ set(variant.arguments)
    values = {names.index(name): value for name, value in variant.arguments.items()}
    typed = {index: value for index, value in values.items() if isinstance(value, str)}
    signature = {name: typed.get(index, "constexpr") for index, name in enumerate(names)}
    divisible = [index for index, value in typed.items() if value != "fp32" and names[index] not in variant.uneven]
    source = ASTSource(
        variant.kernel,
        signature=signature,
        constexprs={(index,): value for index, value in values.items() if index not in typed},
        attrs={(index,): [["tt.divisibility", ARITHMETIC]] for index in divisible},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": variant.num_warps})


def usage(compiled, folder):
    """(Registers a thread, bytes of its stack and spilled registers) as the assembler's own tool tells them."""
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def accesses(compiled):
    """Bytes of each load and store of global memory, in the order of the code."""
    found = re.findall(r"^\s+(?:@%p\d+ )?(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+) ", flat(compiled.asm["ptx"]), re.M)
    assert found
    return [(kind, int(vector or 1) * int(bits) // 8) for kind, vector, bits in found]


def flat(ptx):
    """Instructions as one line each, without what Triton leaves between the words of some."""
    return re.sub(r"\.(?:L1|L2)::\w+", "", ptx)

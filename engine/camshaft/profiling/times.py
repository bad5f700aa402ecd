"""Time by operation and by phase.

On a device it is that of its kernels, each told by the operation that launched it: kernels of several streams overlap,
so the groups may add up to more than the window. On a CPU it is that of the thread that runs the steps, where an
operation counts without those inside of it: groups and idle time add up to the window.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from camshaft.profiling.intervals import clip, length, union
from camshaft.profiling.trace import BLOCKED, PHASE, PREFIX, START, WAIT, Slice, Trace

MATRIX, ATTENTION, ELEMENTWISE = "matrix products", "attention", "norms and elementwise"
OPTIMIZER, COMMUNICATION, DATA, OTHER, IDLE = "optimizer", "communication", "data", "other", "idle"
GROUPS = (MATRIX, ATTENTION, ELEMENTWISE, OPTIMIZER, COMMUNICATION, DATA, OTHER, IDLE)

_MATRIX_OP = re.compile(
    r"aten::(_?(addmm|baddbmm|bmm|mm|matmul|linear|mv|addmv|dot|_scaled_mm\w*|_grouped_mm|addmm_))$"
)
_MATRIX_KERNEL = re.compile(r"gemm|cutlass|nvjet|xmma|cublas|tensile|Cijk_", re.IGNORECASE)
_ATTENTION = re.compile(r"attention|flash|fmha|sdpa", re.IGNORECASE)
_COMMUNICATION = re.compile(r"^(c10d::|record_param_comms|nccl|_c10d_functional::)|ncclDev|ncclKernel|rccl")
_BOOKKEEPING = re.compile(
    r"^(autograd::|torch::autograd::|PythonDispatchMode|TorchDynamo|Torch-Compiled|CompiledFunction|Optimizer\.)"
    r"|Backward\d*$"
)
_OPTIMIZING = frozenset({f"{PHASE}clip", f"{PHASE}optimizer"})


@dataclass(slots=True)
class Spent:
    """Microseconds over all recorded windows."""

    window: float
    groups: dict[str, float] = field(default_factory=lambda: dict.fromkeys(GROUPS, 0.0))
    operations: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)
    """(group, name) to time and how often."""

    def add(self, group: str, name: str, time: float) -> None:
        """Count ``time`` of one call."""
        self.groups[group] += time
        before, calls = self.operations.get((group, name), (0.0, 0))
        self.operations[group, name] = (before + time, calls + 1)


def spent(trace: Trace) -> Spent:
    """Time by group and operation inside of the windows."""
    bounds = trace.bounds
    found = Spent(length(bounds))
    links = _attention_links(trace.host)
    if trace.kernels:
        _kernels(trace, found, links)
        busy = clip((kernel.interval for kernel in trace.kernels), bounds)
        found.groups[IDLE] = found.window - length(busy)
        return found
    main = trace.windows[0].track
    for each in trace.host:
        if each.track == main and _in_window(each):
            group = group_of(each, links)
            if group == IDLE:
                found.groups[IDLE] += each.alone
            else:
                found.add(group, _name(each), each.alone)
    return found


def _in_window(each: Slice) -> bool:
    return any(above.name == f"{PREFIX}window" for above in each.chain())


def _name(each: Slice) -> str:
    """What a table calls it: a wait is told by what is waited for."""
    if each.name != BLOCKED:
        return each.name
    wait = next((above.name for above in each.chain() if above.name.startswith(WAIT)), None)
    return "wait for another library's collective" if wait is None else f"wait {wait.removeprefix(WAIT)}"


def _kernels(trace: Trace, found: Spent, links: Mapping[int, str]) -> None:
    launchers = {each.args["External id"]: each for each in trace.host if "External id" in each.args}
    for kernel in trace.kernels:
        time = length(clip([kernel.interval], trace.bounds))
        if time:
            launcher = launchers.get(kernel.args.get("External id"))
            group = kernel_group(kernel, launcher, links)
            found.add(group, kernel.name if launcher is None else launcher.name, time)


def kernel_group(kernel: Slice, launcher: Slice | None, links: Mapping[int, str]) -> str:
    """Group of a device's kernel, by its own name and by the operation that launched it."""
    if _COMMUNICATION.search(kernel.name):
        return COMMUNICATION
    told = IDLE if launcher is None else group_of(launcher, links)
    if told in (OPTIMIZER, ATTENTION):
        return told
    if _ATTENTION.search(kernel.name):
        return ATTENTION
    if _MATRIX_KERNEL.search(kernel.name):
        return MATRIX
    return ELEMENTWISE if told in (OTHER, IDLE) else told


def group_of(each: Slice, links: Mapping[int, str]) -> str:
    """Group of a slice of the host, by its name and by what is around it."""
    if each.category == "user_annotation":
        return _range_group(each)
    above = list(each.chain())
    names = {one.name for one in above}
    if _COMMUNICATION.search(each.name):
        return COMMUNICATION
    if names & _OPTIMIZING:
        return OPTIMIZER
    if f"{PHASE}data" in names:
        return DATA
    if any(one.category == "cpu_op" and _is_attention(one, links) for one in above):
        return ATTENTION
    if _MATRIX_OP.search(each.name):
        return MATRIX
    return OTHER if _BOOKKEEPING.search(each.name) else ELEMENTWISE


def _range_group(each: Slice) -> str:
    """A range is time in which no operation runs: Python's, unless it is one that says what is waited for."""
    if each.name == BLOCKED or each.name.startswith(START):
        return COMMUNICATION
    return DATA if each.name == f"{PHASE}data" else IDLE


def _is_attention(each: Slice, links: Mapping[int, str]) -> bool:
    return _ATTENTION.search(each.name) is not None or (
        each.name.startswith("autograd::") and links.get(each.args.get("Sequence number", -1)) == ATTENTION
    )


def _attention_links(host: Iterable[Slice]) -> dict[int, str]:
    """Sequence numbers of forward operations inside of attention: autograd gives their backward the same number."""
    return {
        each.args["Sequence number"]: ATTENTION
        for each in host
        if each.category == "cpu_op"
        and "Sequence number" in each.args
        and not each.name.startswith("autograd::")
        and any(one.category == "cpu_op" and _ATTENTION.search(one.name) for one in each.chain())
    }


def phases(trace: Trace) -> dict[str, float]:
    """Microseconds of the host in each phase, and in none (``other``); they add up to the windows."""
    found: dict[str, float] = {}
    for each in trace.named(PHASE):
        name = each.name.removeprefix(PHASE)
        found[name] = found.get(name, 0.0) + each.end - each.start
    whole = length(trace.bounds)
    found["other"] = whole - length(clip((each.interval for each in trace.named(PHASE)), trace.bounds))
    return found


def ranges(trace: Trace) -> dict[str, tuple[float, int]]:
    """Time and number of the ranges that plugins opened, by name."""
    found: dict[str, tuple[float, int]] = {}
    for each in trace.host:
        ours = each.name.startswith((PREFIX, "Optimizer."))
        if each.category == "user_annotation" and not ours and _in_window(each):
            time, calls = found.get(each.name, (0.0, 0))
            found[each.name] = (time + each.end - each.start, calls + 1)
    return found


def busy(trace: Trace) -> float:
    """Microseconds of the windows in which a device (or, without one, any thread) computes."""
    slices = trace.kernels or [each for each in trace.host if each.category == "cpu_op"]
    return length(clip(union(each.interval for each in slices), trace.bounds))

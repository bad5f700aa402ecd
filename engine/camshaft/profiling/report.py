"""The findings of all ranks in words and tables, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Finding = Mapping[str, Any]
TOP = 15
_NOISE = 1.2
"""Windows before the recorded one that were so many times slower were not yet what a run's windows are."""
BARS = " ▁▂▃▄▅▆▇█"


def text(document: Finding) -> str:
    """The whole report. Tables are of rank 0, except for the last, which compares the ranks."""
    first = document["ranks"][0]
    parts = [
        _head(document, first),
        _phases(first),
        _groups(first),
        _operations(first),
        _communication(first),
        _memory(first),
        _ranges(first),
        _ranks(document["ranks"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def _table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, numbers to the right."""
    lines = [list(headers), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    texts = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[:-1], widths[:-1], strict=True)]
        texts.append("  ".join([*cells, line[-1]]).rstrip())
    return "\n".join([title, *texts])


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _head(document: Finding, first: Finding) -> str:
    window, ranks = first["window_ms"], len(document["ranks"])
    lines = [
        f"profile      {document['name']}: {first['windows']} window(s), {ranks} rank(s), {first['device']}",
        f"window       {window:.2f} ms with the profiler{_overhead(first)}",
        f"rate         {document['mfu']['tokens_per_s']:,.0f} tokens/s, {_mfu(document['mfu'])}",
    ]
    if document["left_out"]:
        lines.append(f"left out     {', '.join(document['left_out'])}: they only tell, load or save")
    return "\n".join(lines)


def _overhead(first: Finding) -> str:
    plain = first["plain_window_ms"]
    if plain is None:
        return "; what that costs takes two warm-up windows to tell"
    if plain > _NOISE * first["window_ms"]:
        return f"; the windows before took {plain:.2f} ms without it: raise --warmup to tell what it costs"
    if plain > first["window_ms"]:
        return f", {plain:.2f} ms without: what it costs is less than windows differ"
    return (
        f", {plain:.2f} ms without: it costs {_share(first['window_ms'] - plain, plain)} (rates below are without it)"
    )


def _mfu(found: Finding) -> str:
    rate = f"{found['flops_per_s_per_device'] / 1e12:.4g} TFLOP/s a device"
    if found["mfu"] is None:
        return f"{rate}; MFU unknown: {found['reason']}"
    peak = f"{found['peak_flops_per_s'] / 1e12:.4g} TFLOP/s ({found['type']}, {found['device']})"
    return f"{rate}, MFU {100 * found['mfu']:.2f} % of {peak}"


def _phases(first: Finding) -> str:
    rows = [(f"{time:.2f}", _share(time, first["window_ms"]), name) for name, time in first["phases_ms"].items()]
    return _table("phases of a window, on the host", ("ms", "share", "phase"), rows)


def _groups(first: Finding) -> str:
    where = "kernels of the device; they may overlap" if first["measured_on"] == "device" else "the rank's main thread"
    rows = [(f"{time:.2f}", _share(time, first["window_ms"]), name) for name, time in first["groups_ms"].items()]
    return _table(f"time by kind of work ({where})", ("ms", "share", "kind"), rows)


def _operations(first: Finding) -> str:
    rows = [
        (
            f"{each['ms']:.3f}",
            _share(each["ms"], first["window_ms"]),
            f"{each['calls']:g}",
            f"{each['group']}: {each['name']}",
        )
        for each in first["operations"][:TOP]
    ]
    return _table("operations that take longest", ("ms", "share", "calls", "operation"), rows)


def _communication(first: Finding) -> str:
    found = first["communication"]
    head = (
        f"communication: under way {found['under_way_ms']:.2f} ms, exposed {found['exposed_ms']:.2f} ms "
        f"({_share(found['exposed_ms'], first['window_ms'])} of the window)"
    )
    rows = [(f"{time:.3f}", name) for name, time in found["exposed_by_owner_ms"].items()][:TOP]
    return _table(head, ("exposed ms", "plugin/hook/operation/axis"), rows) if rows else head


def _memory(first: Finding) -> str:
    found = first["memory"]
    if not found["timeline"]:
        return ""
    kinds = sorted(found["peak_by_category"].items(), key=lambda item: -item[1])
    lines = [
        (
            f"memory ({found['device']}): {size(found['before_bytes'])} before the window, at most "
            f"{size(found['peak_bytes'])} after {found['peak_ms']:.2f} ms, in {found['peak_phase']}"
        ),
        f"|{curve([point[1] for point in found['timeline']])}|",
        "most in      " + ", ".join(f"{name} {size(count)}" for name, count in found["most_in_phase"].items()),
        "at the peak  " + ", ".join(f"{name} {size(count)}" for name, count in kinds),
    ]
    rows = [
        (
            size(each["bytes"]),
            _share(each["bytes"], found["peak_bytes"]),
            str(each["blocks"]),
            f"{each['category']}: {each['name']}",
        )
        for each in found["largest_owners"]
    ]
    return "\n".join([*lines, _table("largest owners at the peak", ("bytes", "share", "blocks", "owner"), rows)])


def curve(values: Sequence[int], width: int = 72) -> str:
    """Values as a line of bars from 0 to the largest, each the most of its stretch."""
    step = max(len(values) / width, 1.0)
    count = min(len(values), width)
    tops = [
        max(values[int(place * step) : max(int((place + 1) * step), int(place * step) + 1)]) for place in range(count)
    ]
    most = max(tops, default=0) or 1
    return "".join(BARS[round(top / most * (len(BARS) - 1))] for top in tops)


def _ranges(first: Finding) -> str:
    rows = [(f"{each['ms']:.3f}", f"{each['calls']:g}", each["name"]) for each in first["ranges"]]
    return _table("ranges of plugins and libraries", ("ms", "calls", "range"), rows) if rows else ""


def _ranks(ranks: Sequence[Finding]) -> str:
    if len(ranks) == 1:
        return ""
    rows = [
        (
            str(each["rank"]),
            f"{each['window_ms']:.2f}",
            f"{each['groups_ms']['idle']:.2f}",
            f"{each['communication']['exposed_ms']:.2f}",
            size(each["memory"]["peak_bytes"]),
        )
        for each in ranks
    ]
    return _table("ranks", ("rank", "window ms", "idle ms", "exposed ms", "memory at most"), rows)

"""Words of a progress line: a stable order, ``name=value``, one space between, so that grep and awk can read it."""

from __future__ import annotations

from collections.abc import Mapping

Record = Mapping[str, float | int]

_FIELDS: tuple[tuple[str, str, str], ...] = (
    ("train/loss", "loss", ".4f"),
    ("train/lr", "lr", ".2e"),
    ("train/grad_norm", "grad_norm", ".3f"),
    ("eval/loss", "eval_loss", ".4f"),
    ("eval/perplexity", "perplexity", ".2f"),
    ("eval/bits_per_byte", "bits_per_byte", ".4f"),
)
_TAIL: tuple[tuple[str, str, str], ...] = (("perf/mfu", "mfu", ".3f"),)


def words(record: Record, total_steps: int, eta_s: float | None = None) -> list[str]:
    """Words of one record; metrics that it does not have are left out.

    ``mem`` is the memory allocated on the device, ``tok/s`` counts all ranks, ``eta`` is the time to the end. A
    plugin's own numbers (``plugin/<name>/<metric>``) come last as ``<name>/<metric>=<value>``; deeper names, which
    break such a number down, are for trackers.
    """
    found = [f"step={record['progress/global_step']:.0f}/{total_steps}"]
    found += _pick(record, _FIELDS)
    if "perf/tokens_per_s" in record:
        found.append(f"tok/s={short_number(record['perf/tokens_per_s'])}")
    found += _pick(record, _TAIL)
    if "memory/allocated_gib" in record:
        found.append(f"mem={record['memory/allocated_gib']:.2f}GiB")
    if eta_s is not None:
        found.append(f"eta={duration(eta_s)}")
    own = sorted(key for key in record if key.startswith("plugin/") and key.count("/") == 2)
    return found + [f"{key.removeprefix('plugin/')}={record[key]:.6g}" for key in own]


def _pick(record: Record, fields: tuple[tuple[str, str, str], ...]) -> list[str]:
    return [f"{name}={record[key]:{form}}" for key, name, form in fields if key in record]


def short_number(value: float) -> str:
    """``5421`` as ``5.4k``, ``1234567`` as ``1.2M``; below 1000 as it is."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.99995:  # 999.96 would be printed as 1000.0
            return f"{value / size:.1f}{letter}"
    return f"{value:.1f}"


def duration(seconds: float) -> str:
    """``62`` as ``1m02s``, ``3723`` as ``1h02m``, ``200000`` as ``2d07h``; two units, rounded down."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"

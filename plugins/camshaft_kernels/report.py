"""The table that a run shows of its choices."""

from __future__ import annotations

from collections.abc import Sequence

from camshaft_kernels.choice import Choice

HEADERS = ("OPERATION", "PROVIDER", "ASKED", "WHY")


def render(choices: Sequence[Choice]) -> str:
    """One line for each operation, and below it one for each provider that was not taken."""
    lines = [HEADERS, *((each.op, each.provider, each.asked, each.why) for each in choices)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    text = []
    for line, choice in zip(lines, (None, *choices), strict=True):
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        text.append("  ".join([*cells, line[3]]).rstrip())
        text += [f"  not {name}: {reason}" for name, reason in (choice.others.items() if choice else ())]
    return "\n".join(text) + "\n"

"""A schedule as an SVG image that needs nothing else: no script, no font, no style sheet."""

from __future__ import annotations

from html import escape

from camshaft.program import Kind
from camshaft_pipeline.drawing import Measured, Row, headline, kinds, length, rows
from camshaft_pipeline.simulator import Span, Timeline

COLORS = {Kind.F: "#4c78a8", Kind.B: "#59a14f", Kind.I: "#76b7b2", Kind.W: "#edc948"}
_HEAD, _ROW, _MARGIN, _LETTER = 24, 20, 90, 6.2


def draw(timeline: Timeline, width: int = 1200, measured: Measured | None = None) -> str:
    """The image's text, ``width`` pixels wide: a row for each rank, each action with its times as a tooltip."""
    drawn = rows(timeline, measured)
    scale = (width - _MARGIN - 4) / (length(drawn) or 1)
    height = _HEAD + _ROW * len(drawn) + _HEAD
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        '<g font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="4" y="16" font-size="12">{escape(headline(timeline, drawn))}</text>',
    ]
    for index, row in enumerate(drawn):
        top = _HEAD + _ROW * index
        label = "measured" if row.measured else f"rank {row.rank}"
        parts.append(f'<text x="{16 if row.measured else 4}" y="{top + 13}">{label}</text>')
        parts.append(f'<rect x="{_MARGIN}" y="{top}" width="{width - _MARGIN - 4}" height="{_ROW - 3}" fill="#eee"/>')
        parts += _boxes(row, top, scale)
    parts += [*_legend(drawn, height - 9), "</g>", "</svg>"]
    return "\n".join(parts) + "\n"


def _boxes(row: Row, top: int, scale: float) -> list[str]:
    stages = sorted({span.action.stage for span in row.spans})
    parts = []
    for span in row.spans:
        shade = 1 - 0.45 * stages.index(span.action.stage) / max(len(stages) - 1, 1)
        left, wide = _MARGIN + span.start * scale, (span.end - span.start) * scale
        parts.append(
            f'<rect x="{left:.2f}" y="{top}" width="{wide:.2f}" height="{_ROW - 3}" fill="{COLORS[span.action.kind]}" '
            f'fill-opacity="{shade:.2f}" stroke="#fff" stroke-width="0.5"><title>{_tooltip(span)}</title></rect>'
        )
        word = f"{span.action.kind.name}{span.action.microbatch}"
        if len(word) * _LETTER <= wide:
            middle = f'x="{left + wide / 2:.2f}" y="{top + 12}" text-anchor="middle"'
            parts.append(f'<text {middle} pointer-events="none">{word}</text>')
    return parts


def _tooltip(span: Span) -> str:
    kind, microbatch, stage = span.action
    return f"{kind.value}, microbatch {microbatch}, stage {stage}: {span.start:.6g} to {span.end:.6g}"


def _legend(drawn: list[Row], baseline: int) -> list[str]:
    parts, left = [], _MARGIN
    for kind in kinds(drawn):
        parts.append(f'<rect x="{left}" y="{baseline - 9}" width="10" height="10" fill="{COLORS[kind]}"/>')
        parts.append(f'<text x="{left + 14}" y="{baseline}">{kind.name} {kind.value}</text>')
        left += 160
    return parts

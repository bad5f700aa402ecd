"""The picture of a run: every hook where it is called. Plain SVG text, one file for light and one for dark pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from tools.docs.inventory import KINDS, hooks
from tools.docs.order import BUILD, END, FIRST, OPEN, SAVE, STEP, Stage

WIDTH, MARGIN, CHIP, GAP = 960, 20, 26, 8
SIGN_WIDTH = 7.3  # of the monospaced face at 12 px, rounded up
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
SANS = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Palette:
    """Colours of one page background. ``kinds`` maps a hook's kind to fill and outline."""

    ink: str
    quiet: str
    panel: str
    line: str
    kinds: dict[str, tuple[str, str]]


def _kinds(*pairs: tuple[str, str]) -> dict[str, tuple[str, str]]:
    return dict(zip(KINDS, pairs, strict=True))


LIGHT = Palette(
    "#1f2328", "#59636e", "#f6f8fa", "#d1d9e0",
    _kinds(
        ("#ddf4ff", "#0969da"), ("#fff1e5", "#bc4c00"), ("#fbefff", "#8250df"), ("#dafbe1", "#1a7f37"),
        ("#ffeff7", "#bf3989"),
    ),
)  # fmt: skip
DARK = Palette(
    "#f0f6fc", "#9198a1", "#151b23", "#3d444d",
    _kinds(
        ("#0c2d6b", "#4493f8"), ("#5a1e02", "#f0883e"), ("#3c1e70", "#ab7df8"), ("#04360f", "#3fb950"),
        ("#5e103e", "#f778ba"),
    ),
)  # fmt: skip


@dataclass
class Canvas:
    """SVG elements so far, and the colours to draw with."""

    palette: Palette
    elements: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, size: int = 12, mono: bool = False, **style: str) -> None:
        look = {"fill": self.palette.ink, "font-size": str(size), "font-family": MONO if mono else SANS, **style}
        attributes = " ".join(f'{key.replace("_", "-")}="{value}"' for key, value in look.items())
        self.elements.append(f'<text x="{x:g}" y="{y:g}" {attributes}>{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, fill: str, line: str, **style: str) -> None:
        attributes = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" '
            f'stroke="{line}"{attributes}/>'
        )

    def chip(self, x: float, y: float, name: str, kind: str, width: float | None = None) -> float:
        """One hook; returns the width that it took."""
        width = chip_width(name) if width is None else width
        fill, line = self.palette.kinds[kind]
        self.box(x, y, width, CHIP, fill, line)
        self.text(x + width / 2, y + 17, name, mono=True, text_anchor="middle")
        return width


def chip_width(name: str) -> float:
    """Width of a hook's box, in px."""
    return round(len(name) * SIGN_WIDTH + 16)


def draw(palette: Palette) -> str:
    """The whole picture as SVG."""
    canvas, y = Canvas(palette), 20.0
    y = _legend(canvas, y)
    y = _band(canvas, y, BUILD, "once, phase after phase; inside a phase in recipe order", arrows=True)
    y = _band(canvas, y, OPEN, "once: continue an earlier run, open trackers", arrows=True)
    y = _step(canvas, y)
    y = _band(canvas, y, FIRST, "once: why a plugin had no effect, which stops the run")
    y = _band(canvas, y, SAVE, "when a checkpoint is due, when the run is asked to stop, at its end")
    y = _band(canvas, y, END, "always, in reverse recipe order")
    body = "\n".join(canvas.elements)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:g}" width="{WIDTH}" height="{y:g}" '
        f'role="img">\n<title>The hooks of a run, in order</title>\n{body}\n</svg>\n'
    )


def _legend(canvas: Canvas, y: float) -> float:
    x = float(MARGIN)
    for kind in KINDS:
        x += canvas.chip(x, y, kind, kind) + GAP
    return y + CHIP + 16


def _band(canvas: Canvas, y: float, stage: Stage, note: str, arrows: bool = False) -> float:
    """A titled panel with hooks from left to right, wrapped; returns the y below it."""
    kinds = {hook.name: hook.kind for hook in hooks()}
    rows: list[list[str]] = [[]]
    room = space = WIDTH - 4 * MARGIN
    step = 22 if arrows else GAP
    for name in stage.hooks:
        if chip_width(name) > room:
            rows.append([])
            room = space
        rows[-1].append(name)
        room -= int(chip_width(name)) + step
    height = 40 + len(rows) * (CHIP + GAP) + 4
    _panel(canvas, y, height, stage.title, note)
    last = stage.hooks[-1]
    for index, row in enumerate(rows):
        x, top = 2.0 * MARGIN, y + 40 + index * (CHIP + GAP)
        for name in row:
            x += canvas.chip(x, top, name, kinds[name])
            if arrows and name != last:
                canvas.text(x + 5, top + 17, "→", fill=canvas.palette.quiet)
            x += step
    return y + height + 14


def _panel(canvas: Canvas, y: float, height: float, title: str, note: str) -> None:
    palette = canvas.palette
    canvas.box(MARGIN, y, WIDTH - 2 * MARGIN, height, palette.panel, palette.line)
    canvas.text(2 * MARGIN, y + 24, title, 15, font_weight="600")
    canvas.text(2 * MARGIN + 10 * len(title) + 12, y + 24, note, fill=palette.quiet)


def _step(canvas: Canvas, y: float) -> float:
    """The step: one column for each kind of action, hooks below the action that calls them."""
    kinds, palette = {hook.name: hook.kind for hook in hooks()}, canvas.palette
    tallest = max(len(stage.hooks) + bool(stage.core) for stage in STEP)
    height = 40 + 34 + tallest * (CHIP + GAP) + 26
    _panel(canvas, y, height, "Step", "one window of microbatches, bound callables only")
    width = (WIDTH - 4 * MARGIN - (len(STEP) - 1) * 22) / len(STEP)
    for index, stage in enumerate(STEP):
        x, top = 2 * MARGIN + index * (width + 22), y + 44
        canvas.text(x + width / 2, top + 16, stage.title, 13, text_anchor="middle", font_weight="600")
        if index:
            canvas.text(x - 10, top + 16, "→", fill=palette.quiet)
        top += 28
        for name in stage.hooks:
            canvas.chip(x, top, name, kinds[name], width)
            top += CHIP + GAP
        if stage.core:
            canvas.text(x + width / 2, top + 16, stage.core, fill=palette.quiet, text_anchor="middle")
    _microbatch_frame(canvas, y + 40, 2 * width + 22, height - 48)
    return y + height + 14


def _microbatch_frame(canvas: Canvas, y: float, width: float, height: float) -> None:
    """Dashed frame around the actions that run once for each microbatch."""
    canvas.box(2 * MARGIN - 9, y, width + 18, height, "none", canvas.palette.quiet, stroke_dasharray="4 4")
    canvas.text(2 * MARGIN, y + height - 9, "once for each microbatch", 11, fill=canvas.palette.quiet)

"""The README's table of plugins, kept between two markers; the rest of the README is written by hand."""

from __future__ import annotations

from tools.docs.inventory import plugins

BEGIN, END = "<!-- plugins: written by `make docs` -->", "<!-- plugins end -->"


def refresh(text: str) -> str:
    """The README with a fresh table.

    Raises:
        ValueError: the markers are gone.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md needs the markers {BEGIN} and {END}, once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def table() -> str:
    """One line a plugin: its name, linked to its options, and what it is."""
    rows = [
        f"| [`{shipped.name}`](docs/recipe.md#plugins{shipped.name}) | {shipped.summary.replace('``', '`')} |"
        for shipped in plugins()
    ]
    return "\n".join(["| plugin | what it does |", "|---|---|", *rows])

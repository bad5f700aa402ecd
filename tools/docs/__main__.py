"""Write every generated page, or with ``--check`` say which ones are out of date and exit 1."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from camshaft.recipe.json_schema import build
from tools.docs import examples, hooks, picture, readme, recipe, schedules

ROOT = Path(__file__).resolve().parents[2]


def generate(root: Path) -> dict[Path, str]:
    """Path to content of every generated file. Reads the README for its hand-written part."""
    docs = root / "docs"
    return {
        docs / "hooks.md": hooks.page(),
        docs / "recipe.md": recipe.page(),
        docs / "images" / "run-light.svg": picture.draw(picture.LIGHT),
        docs / "images" / "run-dark.svg": picture.draw(picture.DARK),
        **examples.pages(docs / "plugins" / "examples"),
        **{docs / "images" / name: text for name, text in schedules.pictures().items()},
        root / "recipes" / "recipe.schema.json": json.dumps(build(), indent=2) + "\n",
        root / "README.md": readme.refresh((root / "README.md").read_text(encoding="utf-8")),
    }


def stale(root: Path) -> list[Path]:
    """Generated files whose committed content is not what the code says now."""
    return [
        path for path, text in generate(root).items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if a page is out of date")
    check = parser.parse_args().check
    pages, changed = generate(ROOT), stale(ROOT)
    for path in changed:
        print(f"{'out of date' if check else 'wrote'}: {path.relative_to(ROOT)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pages[path], encoding="utf-8")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())

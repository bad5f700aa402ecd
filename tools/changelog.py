"""Changelog fragments: ``python tools/changelog.py check`` and ``... release VERSION [--date YYYY-MM-DD]``.

Every change that a user can notice adds a file ``changelog.d/<topic>.<kind>.md`` with one or more list items. A release
moves all of them into CHANGELOG.md, so that two branches never edit the same lines.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"added": "Added", "changed": "Changed", "removed": "Removed", "fixed": "Fixed", "performance": "Performance"}
NAME = re.compile(rf"[a-z0-9][a-z0-9-]*\.({'|'.join(KINDS)})\.md")
ANCHOR = "<!-- releases, newest first -->\n"


def fragments(root: Path) -> list[Path]:
    """Every fragment, sorted by name."""
    return sorted(path for path in (root / "changelog.d").iterdir() if path.name != "README.md")


def faults(root: Path) -> list[str]:
    """What is wrong with the fragments, one line each."""
    found = []
    for path in fragments(root):
        place, lines = f"changelog.d/{path.name}", path.read_text(encoding="utf-8").splitlines()
        if not NAME.fullmatch(path.name):
            found.append(f"{place}: name it <topic>.<kind>.md; kinds are {', '.join(KINDS)}")
        elif not lines:
            found.append(f"{place}: empty")
        else:
            found += [
                f"{place}:{number}: a line starts with '- ', or with two spaces where it continues one"
                for number, line in enumerate(lines, start=1)
                if not line.startswith(("- ", "  "))
            ]
    return found


def section(root: Path, version: str, date: str) -> str:
    """The release's part of CHANGELOG.md."""
    parts = [f"## {version} ({date})"]
    for kind, title in KINDS.items():
        texts = [path.read_text(encoding="utf-8").strip() for path in fragments(root) if f".{kind}." in path.name]
        if texts:
            parts.append(f"### {title}\n\n" + "\n".join(texts))
    return "\n\n".join(parts) + "\n"


def release(root: Path, version: str, date: str) -> None:
    """Move every fragment into CHANGELOG.md.

    Raises:
        ValueError: there is nothing to release, or CHANGELOG.md lost its anchor.
    """
    changelog = root / "CHANGELOG.md"
    head, anchor, tail = changelog.read_text(encoding="utf-8").partition(ANCHOR)
    if not anchor:
        raise ValueError(f"CHANGELOG.md has no line {ANCHOR.strip()}")
    if not fragments(root):
        raise ValueError("changelog.d holds no fragment")
    changelog.write_text(f"{head}{anchor}\n{section(root, version, date)}{tail}", encoding="utf-8")
    for path in fragments(root):
        path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="exit 1 if a fragment is misnamed or empty")
    releasing = commands.add_parser("release", help="move the fragments into CHANGELOG.md")
    releasing.add_argument("version")
    releasing.add_argument("--date", default=datetime.date.today().isoformat())
    arguments = parser.parse_args()
    found = faults(ROOT)
    print("\n".join(found), end="\n" if found else "", file=sys.stderr)
    if arguments.command == "release" and not found:
        release(ROOT, arguments.version, arguments.date)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())

"""``tools/changelog.py``: the gate on fragments, and a release."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import changelog


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "changelog.d").mkdir()
    (tmp_path / "changelog.d" / "README.md").write_text("how to")
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{changelog.ANCHOR}\n## 0.1.0 (2026-01-01)\n")
    return tmp_path


def add(tree: Path, name: str, text: str) -> None:
    (tree / "changelog.d" / name).write_text(text)


def test_the_fragments_of_this_tree_are_in_order() -> None:
    assert changelog.faults(changelog.ROOT) == []


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("loop.news.md", "- x\n", "kinds are added"),
        ("Loop.added.md", "- x\n", "name it"),
        ("loop.added.txt", "- x\n", "name it"),
        ("loop.added.md", "", "empty"),
        ("loop.added.md", "- x\nand so on\n", ":2: a line starts with"),
    ],
)
def test_a_bad_fragment_is_named(tree: Path, name: str, text: str, fault: str) -> None:
    add(tree, "good.fixed.md", "- long\n  item\n")
    add(tree, name, text)
    (found,) = changelog.faults(tree)
    assert found.startswith(f"changelog.d/{name}") and fault in found


def test_a_release_moves_every_fragment_above_the_last_release(tree: Path) -> None:
    add(tree, "b.fixed.md", "- mended\n")
    add(tree, "a.added.md", "- new\n  thing\n")
    changelog.release(tree, "0.2.0", "2026-02-03")
    assert (tree / "CHANGELOG.md").read_text() == (
        f"# Changelog\n\n{changelog.ANCHOR}\n## 0.2.0 (2026-02-03)\n\n### Added\n\n- new\n  thing\n\n"
        "### Fixed\n\n- mended\n\n## 0.1.0 (2026-01-01)\n"
    )
    assert [path.name for path in (tree / "changelog.d").iterdir()] == ["README.md"]


def test_an_empty_release_is_refused_and_changes_nothing(tree: Path) -> None:
    before = (tree / "CHANGELOG.md").read_text()
    with pytest.raises(ValueError, match="no fragment"):
        changelog.release(tree, "0.2.0", "2026-02-03")
    assert (tree / "CHANGELOG.md").read_text() == before

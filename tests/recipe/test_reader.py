"""YAML 1.2's core schema, positions, and what the reader refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from camshaft.errors import RecipeError
from camshaft.recipe import scalars
from camshaft.recipe.nodes import Origin, locate, plain
from camshaft.recipe.reader import parse, read_file

FILE = Origin("file", "r.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-1.5e+3", -1500.0), ("+.5", 0.5),
        ("010", 10), ("0o10", 8), ("0x1F", 31), ("-0", 0), ("+7", 7), ("007", 7),
        ("no", "no"), ("on", "on"), ("yes", "yes"), ("Off", "Off"), ("y", "y"), ("NO", "NO"),
        ("true", True), ("False", False), ("TRUE", True), ("tRue", "tRue"),
        ("null", None), ("~", None), ("", None), ("Null", None), ("none", "none"), ("None", "None"),
        ("12:30", "12:30"), ("1_000", "1_000"), ("0b11", "0b11"), ("0o9", "0o9"), ("0xg", "0xg"), ("1e", "1e"),
        ("2024-01-01", "2024-01-01"), ("1.2.3", "1.2.3"), (".", "."), ("-", "-"), ("inf", "inf"), ("nan", "nan"),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    found = scalars.resolve(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", [".inf", "-.INF", "+.Inf", ".nan", ".NaN", "1e999", "-1e999", "9" * 101])
def test_numbers_that_are_not_finite_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        scalars.resolve(text)


def test_every_node_keeps_its_line() -> None:
    document = parse("a:\n  b: 1\n\n  c:\n    - x\n    - {d: 2,\n       e: 3}\n", FILE)
    lines = {key: locate(document.root, key).line for key in ("a", "a.b", "a.c", "a.c.0", "a.c.1.d", "a.c.1.e", "")}
    assert lines == {"a": 1, "a.b": 2, "a.c": 4, "a.c.0": 5, "a.c.1.d": 6, "a.c.1.e": 7, "": 1}
    assert locate(document.root, "a.b.missing.too").line == 2
    assert locate(document.root, "nowhere").line == 1
    assert plain(document.root) == {"a": {"b": 1, "c": ["x", {"d": 2, "e": 3}]}}


def test_quoted_and_block_scalars_are_text() -> None:
    document = parse("a: '1'\nb: \"no\"\nc: |\n  1\nd: >-\n  null\n'1': x\n\"null\": y\n", FILE)
    assert plain(document.root) == {"a": "1", "b": "no", "c": "1\n", "d": "null", "1": "x", "null": "y"}


def test_faults_that_can_be_passed_are_collected() -> None:
    document = parse("a: &x 1\nb: *x\nc: !t 2\nd: .nan\nd: 4\n5: 6\n<<: {}\ne: 7\n", FILE)
    assert [(problem.key, problem.line) for problem in document.problems] == [
        ("a", 1), ("b", 2), ("c", 3), ("d", 4), ("d", 5), ("", 6), ("", 7),
    ]  # fmt: skip
    assert plain(document.root) == {"e": 7}


def test_32_levels_are_read_and_33_are_not() -> None:
    assert plain(parse("[" * 32 + "]" * 32, FILE).root) is not None
    with pytest.raises(RecipeError, match="deeper than 32 levels"):
        parse("[" * 33 + "]" * 33, FILE)


def test_alias_bomb_does_not_expand() -> None:
    text = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))
    document = parse(text, FILE)
    assert len(document.problems) == 30 + 2 * 29


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("\ufeffa: 1\r\nb: ü\r\n".encode())
    document = read_file(path, "r.yaml")
    assert plain(document.root) == {"a": 1, "b": "ü"}
    assert locate(document.root, "b").line == 2


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null\n"])
def test_empty_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"^r\.yaml:[12]: the recipe is empty"):
        read_file(path, "r.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot be read: No such file"):
        read_file(tmp_path / "nowhere.yaml", "nowhere.yaml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        read_file(tmp_path, "folder")


def test_a_file_of_exactly_1_mib_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: 1 #".ljust((1 << 20) - 1, b"x") + b"\n")
    assert plain(read_file(path, "r.yaml").root) == {"a": 1}
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        read_file(path, "r.yaml")

"""Generated pages are what the code says, and hand-written ones point at things that exist."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal
from xml.etree import ElementTree

import pytest
from pydantic import BaseModel, Field

from camshaft.hookspecs import FAMILIES, MIDDLEWARE, SLOTS
from tools.docs import __main__ as docs
from tools.docs import inventory, readme, types
from tools.docs.order import RUN_ORDER

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SPECS = {
    name: function for family in FAMILIES for name, function in vars(family).items() if inspect.isfunction(function)
}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_generated_pages_are_up_to_date() -> None:
    assert [path.name for path in docs.stale(ROOT)] == [], "run `make docs` and commit what it writes"


@pytest.mark.parametrize("name", SPECS)
def test_a_hook_is_documented_with_its_exact_arguments(name: str) -> None:
    arguments = list(inspect.signature(SPECS[name]).parameters)[1:]
    assert re.findall(rf"^### {name}\((.*)\)$", read(ROOT / "docs" / "hooks.md"), re.MULTILINE) == [
        ", ".join(arguments)
    ]


@pytest.mark.parametrize("name", SPECS)
def test_a_hook_says_its_kind_its_version_and_when_it_is_called(name: str) -> None:
    (hook,) = (hook for hook in inventory.hooks() if hook.name == name)
    assert (hook.kind == "slot") == (name in SLOTS)
    assert (hook.kind == "middleware") == (name in MIDDLEWARE)
    assert hook.since >= 1 and len(hook.text.split()) >= 3
    assert all(word not in hook.text for word in ("Since", "hook API"))


def test_a_hook_without_kind_or_version_is_refused() -> None:
    def nameless(self: object) -> None:
        """Does something."""

    with pytest.raises(ValueError, match="'nameless': the docstring must begin with its kind"):
        inventory._hook(FAMILIES[0], "nameless", nameless)


def test_the_run_order_has_every_hook_once() -> None:
    assert sorted(RUN_ORDER) == sorted(SPECS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_picture_shows_every_hook_once_and_inside_its_borders(scheme: str) -> None:
    picture = ElementTree.fromstring(read(ROOT / "docs" / "images" / f"run-{scheme}.svg"))
    width, height = float(picture.attrib["width"]), float(picture.attrib["height"])
    shown = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert sorted(name for name in shown if name in SPECS and name != "slot") == sorted(SPECS)
    for box in picture.iter("{http://www.w3.org/2000/svg}rect"):
        right = float(box.attrib["x"]) + float(box.attrib["width"])
        bottom = float(box.attrib["y"]) + float(box.attrib["height"])
        assert right <= width and bottom <= height


def test_every_key_is_in_the_reference_with_a_meaning() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (.*) \|$", read(ROOT / "docs" / "recipe.md"), re.MULTILINE)
    options = {
        f"plugins.{shipped.name}.{field.alias or name}"
        for shipped in inventory.plugins()
        for name, field in shipped.plugin.Options.model_fields.items()
    }
    core = {"name", "model.qk_norm", "data.train.blend.weight", "launch.group_timeout_s", "run.dir"}
    assert core | options <= {key for key, _ in rows}
    assert [key for key, meaning in rows if not meaning.strip()] == []
    assert "plugins.tensor_parallel.async" in options, "a key that is no name in Python"


class Example(BaseModel):
    """A block."""

    count: Annotated[int, Field(ge=1, le=2**53)] | Literal["auto"] = "auto"
    names: list[Annotated[str, Field(min_length=1, max_length=8)]] = []
    pair: Annotated[tuple[float, float], Field(min_length=2, max_length=2)] = (0.5, 1e-8)
    part: Annotated[float, Field(gt=0, lt=1)] | None = None
    inner: Example | None = None


@pytest.mark.parametrize(
    ("name", "type_text", "default"),
    [
        ("count", "integer ≥ 1 or `auto`", "`auto`"),
        ("names", "list of text (1 to 8 characters)", "`[]`"),
        ("pair", "list of number, number (exactly 2)", "`[0.5, 1.0e-08]`"),
        ("part", "number > 0, < 1", ""),
        ("inner", "block *Example*", ""),
    ],
)
def test_types_and_defaults_are_written_for_users_of_yaml(name: str, type_text: str, default: str) -> None:
    field = Example.model_fields[name]
    assert (types.field_type(field), types.default(field)) == (type_text, default)


def test_the_readme_keeps_its_hand_written_part() -> None:
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    fresh = readme.refresh(text)
    assert fresh.startswith("before\n") and fresh.endswith("\nafter\n") and "old" not in fresh
    assert readme.refresh(fresh) == fresh
    with pytest.raises(ValueError, match="markers"):
        readme.refresh("no markers")


def anchors(page: str) -> set[str]:
    """Anchors that GitHub makes of the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    text = read(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in targets:
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(read(path)), target


def test_the_readme_names_exactly_the_commands_that_exist() -> None:
    done = subprocess.run([sys.executable, "-m", "camshaft", "--help"], capture_output=True, text=True, check=True)
    exist = set(re.findall(r"^  ([a-z][a-z-]*)  ", done.stdout, re.MULTILINE))
    named = re.findall(r"^\| `camshaft ([a-z-]+)", read(ROOT / "README.md"), re.MULTILINE)
    assert exist and sorted(named) == sorted(exist), "each once"


def test_the_readme_leads_to_every_page() -> None:
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    pages |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "plugins").glob("*.md")}
    assert pages <= set(re.findall(r"\]\((docs/[\w/.-]+)", read(ROOT / "README.md")))


def test_what_is_quoted_of_a_plan_is_what_it_prints() -> None:
    (quoted,) = re.findall(r"```console\n\$ camshaft (plan .*?)```", read(ROOT / "docs" / "memory.md"), re.DOTALL)
    command, *lines = [line for line in quoted.splitlines() if line != "..."]
    done = subprocess.run(
        [sys.executable, "-m", "camshaft", *command.split()], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(lines) >= 4 and [line for line in lines if line not in done.stdout.splitlines()] == []


def test_the_fragment_on_memory_is_legal(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", read(ROOT / "docs" / "memory.md"), re.DOTALL)
    base = ROOT / "recipes" / "llama3_8b_ddp.yaml"
    (tmp_path / "recipe.yaml").write_text(f"extends: {base}\nschema_version: 1\nname: fragment\n{text}")
    done = subprocess.run(
        [sys.executable, "-m", "camshaft", "validate", str(tmp_path / "recipe.yaml"), "--world-size", "64"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_sweep_of_the_page_is_one(tmp_path: Path) -> None:
    from camshaft.sweep.file import read as read_sweep

    (text,) = re.findall(r"```yaml\n(.*?)```", read(ROOT / "docs" / "sweeps.md"), re.DOTALL)
    (tmp_path / "quickstart.yaml").write_text(read(ROOT / "recipes" / "quickstart.yaml"))
    (tmp_path / "rates.yaml").write_text(text)
    assert read_sweep(tmp_path / "rates.yaml").total == 20


def test_the_readme_names_every_exit_status() -> None:
    from camshaft import errors

    statuses = {item.exit_status for item in vars(errors).values() if hasattr(item, "exit_status")}
    named = {int(number) for number in re.findall(r"^\| (\d+) \|", read(ROOT / "README.md"), re.MULTILINE)}
    assert named == statuses | {0}


def test_the_recipe_of_the_readme_is_valid(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", read(ROOT / "README.md"), re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "camshaft", "validate", str(tmp_path / "recipe.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "line", re.findall(r"^\$ camshaft train (.*?)\s*(?:#.*)?$", read(ROOT / "README.md"), re.MULTILINE)
)
def test_every_swap_of_the_readme_is_legal(line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "camshaft", "validate", *line.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr

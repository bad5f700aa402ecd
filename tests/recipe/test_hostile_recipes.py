"""Damaged and hostile texts: always one kind of error, never a crash, never more than seconds, never code that runs."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from recipe_cases import HIDDEN, recipe

from camshaft.cli import run
from camshaft.errors import RecipeError
from camshaft.recipe import check, load

PIECES = [
    "{", "}", "[", "]", ":", " ", "\n", "\t", "'", '"', "#", "&a ", "*a ", "!t ", "- ", "? ", "|\n", ">\n", "${env:",
    "\\", "\x00", "\x85", "\u2028", "é", "null", "~", "0x", "<<: ", "---\n", "...\n", "%YAML 1.1\n", "extends: x\n",
    "plugins:\n", '"\\ud800": 1\n', '"\\u0007": ', "data: {train: {blend: [{",
]  # fmt: skip
OVERRIDES = [
    "", "=", "a", ".=1", "seed=[", "seed={a: *x}", "seed=\udcff", "plugins=[]", "plugins={}", "plugins.adamw=null",
    "plugins.adamw.betas.0=1", "plugins.adamw=[[[]]]", "model=null", "model.0=1", 'name="\\ud800"', "batch.x.y=1",
    "data.train={blend: [null]}", "data.train.blend.0.prefix=x", "plugins={1: 2}", "launch={<<: {}}", "plugins.ddp=${",
]  # fmt: skip


def outcome(path: Path, overrides: list[str]) -> str:
    """``valid`` or ``refused``; any other exception is a fault of the loader."""
    try:
        check(load(path, overrides)).require()
    except RecipeError as error:
        assert error.problems
        assert all(str(problem) for problem in error.problems)
        return "refused"
    return "valid"


def mutated(text: str, chooser: random.Random) -> str:
    for _ in range(chooser.randint(1, 3)):
        place = chooser.randrange(len(text))
        if chooser.random() < 0.3:
            text = text[:place] + text[place + chooser.randint(1, 8) :]
        else:
            text = text[:place] + chooser.choice(PIECES) + text[place:]
    return text


def test_mutations_are_valid_or_refused(tmp_path: Path) -> None:
    chooser = random.Random(0)
    path = tmp_path / "recipe.yaml"
    seen = set()
    for _ in range(300):
        path.write_text(mutated(recipe(), chooser), encoding="utf-8")
        seen.add(outcome(path, []))
    assert seen == {"valid", "refused"}


def test_overrides_are_valid_or_refused(tmp_path: Path) -> None:
    chooser = random.Random(0)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe())
    outcomes = [outcome(path, chooser.choices(OVERRIDES, k=chooser.randint(1, 3))) for _ in range(150)]
    assert "refused" in outcomes


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"key{number}: 1\n" for number in range(5000)),
        "plugins:\n" + "".join(f"  key{number}: 1\n" for number in range(5000)),
        f"a: '{'x' * 400_000}'\n",
        f"a: '{'http://' * 50_000}'\n",
        f"a: '{'eyJ-' * 100_000}'\n",
        f"a: '{'${env:' * 50_000}'\n",
        f"data: {{train: {{files: [{'a,' * 10_000}]}}}}\n",
        f"{'k' * 100_000}: 1\n",
    ],
    ids=["keys", "plugins", "text", "urls", "tokens", "references", "files", "one key"],
)
def test_time_grows_with_size_only(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    start = time.perf_counter()
    assert outcome(path, []) == "refused"
    assert time.perf_counter() - start < 5


def test_thousands_of_faults_are_counted_not_listed(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe() + "".join(f"key{number}: 1\n" for number in range(1000)))
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert len(caught.value.problems) == 201
    assert caught.value.problems[-1].message == "800 more faults are not shown"


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.mkdir", "!!python/name:os.mkdir", "!!python/module:os", "!!python/object/new:os.mkdir"],
)
def test_nothing_runs(tag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(seed=f"seed: {tag} ['{made}']"))
    assert run(["validate", str(path)]) == 2
    assert run(["validate", str(path), f"seed={tag} ['{made}']"]) == 2
    assert "a tag" in capsys.readouterr().err
    assert not made.exists()


def test_messages_cannot_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(model='model: {preset: "a\\nerror: forged", "k\\e[31m": 1, "l\u202e": 2}'))
    assert run(["validate", str(path)]) == 2
    err = capsys.readouterr().err
    assert all(sign.isprintable() or sign == "\n" for sign in err)
    assert not any(line.startswith("error: forged") for line in err.splitlines())


def test_no_secret_of_a_faulty_recipe_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside every other fault that could quote a value, and in the error object too."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        recipe(training=f"training: {{max_steps: {{hf_token: {HIDDEN}}}}}", seed=f"seed: [{{pwd: {HIDDEN}}}]")
    )
    with pytest.raises(RecipeError) as caught:
        load(path, [f"batch={{password: {HIDDEN}}}", f"plugins.adamw.lr={{api_key: {HIDDEN}}}"])
    assert HIDDEN not in repr(caught.value.problems)
    for command in ("validate", "explain", "plan", "train"):
        assert run([command, str(path), f"launch.api_key={HIDDEN}"]) == 2
    assert HIDDEN not in "".join(capsys.readouterr())

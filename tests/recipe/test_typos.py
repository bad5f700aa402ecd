"""Every single-character typo in every key of the schema is refused, and nearly always answered by the right key."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from recipe_cases import recipe

from camshaft import host
from camshaft.errors import RecipeError
from camshaft.recipe import load
from camshaft.recipe.faults import MOST, keys_of
from camshaft.recipe.schema import BlendPart, IndexedData, Recipe, Section, TextData
from camshaft.recipe.suggest import distance, nearest

NESTED = {
    IndexedData: ("data", "train: {{blend: [{{prefix: a}}], {typos}}}"),
    TextData: ("data", "train: {{files: [a.txt], {typos}}}"),
    BlendPart: ("data", "train: {{blend: [{{prefix: a, {typos}}}]}}"),
}


def typos(word: str) -> set[str]:
    """Every deletion, swap of neighbours, doubling, and some replacements and insertions of one character."""
    letters = string.ascii_lowercase[::9] + "_"
    splits = [(word[:index], word[index:]) for index in range(len(word) + 1)]
    found = {head + tail[1:] for head, tail in splits if tail}
    found |= {head + tail[1] + tail[0] + tail[2:] for head, tail in splits if len(tail) > 1}
    found |= {head + letter + tail[1:] for head, tail in splits if tail for letter in letters}
    found |= {head + letter + tail for head, tail in splits for letter in letters}
    found |= {head + tail[:1] + tail for head, tail in splits}
    return {typo for typo in found if typo and typo != word}


def places() -> Iterator[tuple[str, type[BaseModel], str]]:
    """(name, model, text of a recipe with a place for typos) for every section of core and installed plugins."""
    yield "root", Recipe, recipe().replace("{", "{{").replace("}", "}}") + "{typos}\n"
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield name, kind, _sections(**{name: f"{name}: {{{{{_required(name)}{{typos}}}}}}"})
    for model, (name, text) in NESTED.items():
        yield model.__name__, model, _sections(**{name: f"{name}: {{{{{text}}}}}"})
    for name in host.installed():
        options = host.plugin_class(name).Options
        yield f"plugins.{name}", options, _sections(plugins=f"plugins: {{{{{name}: {{{{{{typos}}}}}}}}}}")


def _required(section: str) -> str:
    return "micro_batch_size: 2, global_batch_size: 8, " if section == "batch" else ""


def _sections(**changed: str) -> str:
    marks = {name: f"<{name}>" for name in changed}
    text = recipe(**marks).replace("{", "{{").replace("}", "}}")
    for name, mark in marks.items():
        text = text.replace(mark, changed[name])
    return text


def refusals(path: Path, text: str, words: list[str], separator: str) -> dict[str, str]:
    """Last part of the key to message, of all problems of a recipe into which ``words`` are put as keys."""
    path.write_text(text.format(typos=separator.join(f"{word}: null" for word in words)))
    with pytest.raises(RecipeError) as caught:
        load(path)
    here = [problem for problem in caught.value.problems if problem.file == str(path)]
    return {problem.key.rsplit(".", 1)[-1]: problem.message for problem in here}


@pytest.mark.parametrize(("name", "model", "text"), [pytest.param(*place, id=place[0]) for place in places()])
def test_typos(name: str, model: type[BaseModel], text: str, tmp_path: Path) -> None:
    separator, told, wrong = "\n" if name == "root" else ", ", 0, []
    for key in keys_of(model):
        words = sorted(typos(key) - set(keys_of(model)))
        for group in (words[start : start + MOST // 2] for start in range(0, len(words), MOST // 2)):
            found = refusals(tmp_path / "recipe.yaml", text, group, separator)
            assert set(group) <= set(found), f"accepted in silence: {set(group) - set(found)}"
            assert all("unknown key" in found[word] for word in group)
            told += len(group)
            wrong += [found[word] for word in group if f"Did you mean '{key}'?" not in found[word]]
    assert len(wrong) <= 0.05 * told, wrong


def test_no_key_is_a_typo_of_another() -> None:
    for name, model, _ in places():
        for key in keys_of(model):
            close = [other for other in keys_of(model) if other != key and distance(key, other) <= 1]
            assert close == [], f"{name}: '{key}' and {close} are one typo apart"


def test_distance() -> None:
    assert [distance("abc", other) for other in ("abc", "ab", "acb", "xbc", "abcd", "")] == [0, 1, 1, 1, 1, 3]
    assert distance("", "abc") == 3


def test_nearest_takes_the_closest_and_stays_silent_when_nothing_is_close() -> None:
    assert nearest("lr", ["learning", "lr_scale", "eps"]) is None
    assert nearest("batch_size", ["micro_batch_size", "prefix"]) == "micro_batch_size"
    assert nearest("Max-Steps", ["max_steps", "max_step"]) == "max_steps"
    assert nearest("x", []) is None

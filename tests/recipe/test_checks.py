"""Cross checks: batch algebra, the end of a run, plugins against one another, and what is known without faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import recipe_plugins
from recipe_cases import recipe

from camshaft import hookimpl
from camshaft.errors import PluginError, RecipeError
from camshaft.mesh import MeshShape
from camshaft.recipe import Checked, batch_plan, check, load
from camshaft.state import BatchPlan


def checked(folder: Path, world_size: int | None = None, device: str = "any", **sections: str) -> Checked:
    path = folder / "recipe.yaml"
    path.write_text(recipe(**sections))
    return check(load(path, world_size=world_size), world_size, device)


def shape(path: Path, world_size: int) -> tuple[BatchPlan, MeshShape]:
    loaded = load(path).recipe
    mesh = MeshShape.of(loaded.parallel, world_size)
    return batch_plan(loaded, mesh), mesh


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_accumulation_is_derived(tmp_path: Path, world_size: int, accumulation: int) -> None:
    found = checked(tmp_path, world_size)
    if world_size == 1:
        assert found.problems == ()
    assert found.batch == BatchPlan(2, 8, accumulation)
    assert found.mesh is not None
    assert found.mesh.batch_degree == world_size
    assert shape(tmp_path / "recipe.yaml", world_size)[0] == found.batch


def test_only_axes_that_split_the_batch_count(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe(parallel="parallel: {tensor_parallel: 2, pipeline_parallel: 2}"))
    plan, mesh = shape(tmp_path / "recipe.yaml", 8)
    assert (plan.accumulation, mesh.batch_degree) == (2, 2)


def test_world_size_comes_from_the_recipe_and_the_caller_wins(tmp_path: Path) -> None:
    assert checked(tmp_path, launch="launch: {processes: 4}").batch == BatchPlan(2, 8, 1)
    assert checked(tmp_path, 1, launch="launch: {processes: 4}").batch == BatchPlan(2, 8, 4)


def test_open_number_of_processes_leaves_the_batch_open(tmp_path: Path) -> None:
    found = checked(tmp_path, launch="")
    assert (found.batch, found.problems) == (None, ())
    assert found.mesh is not None
    assert found.mesh.world_size == 1


def test_a_given_data_parallel_settles_it(tmp_path: Path) -> None:
    assert checked(tmp_path, launch="", parallel="parallel: {data_parallel: 2}").batch == BatchPlan(2, 8, 2)


def test_the_right_accumulation_may_be_given(tmp_path: Path) -> None:
    batch = "batch: {micro_batch_size: 2, global_batch_size: 8, gradient_accumulation_steps: 2}"
    assert checked(tmp_path, batch=batch).problems == ()


def test_fixes_for_a_batch_that_does_not_divide_do_divide(tmp_path: Path) -> None:
    for micro, total, ranks in [(3, 10, 2), (4, 3, 1), (2, 7, 3), (5, 100, 7)]:
        batch = f"batch: {{micro_batch_size: {micro}, global_batch_size: {total}}}"
        (problem,) = checked(tmp_path, ranks, batch=batch).problems
        sizes = [int(word) for word in problem.fix.split(",")[0].split() if word.isdigit()]
        assert sizes
        for size in sizes:
            fixed = f"batch: {{micro_batch_size: {micro}, global_batch_size: {size}}}"
            assert checked(tmp_path, ranks, batch=fixed).problems == ()


def test_plans_and_owners_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_plugins.install(monkeypatch)
    found = checked(tmp_path, plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1}\n  needy: {}")
    assert found.owners["optimizer"] == ["adamw"]
    assert found.plans["needy"].requires == ("elementwise_magic",)
    assert {problem.line for problem in found.problems} == {12}
    with pytest.raises(RecipeError) as caught:
        found.require()
    assert caught.value.problems == found.problems


def test_plan_sees_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_plugins.install(monkeypatch)
    seen: list[str] = []
    monkeypatch.setattr(recipe_plugins, "SEEN", seen)
    text = "plugins:\n  ddp: {}\n  adamw: {lr: 1}\n  watcher: {}"
    checked(tmp_path, plugins=text)
    checked(tmp_path, device="cpu", plugins=text)
    assert seen == ["any", "cpu"]


def test_a_plan_that_raises_names_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_plugins.install(monkeypatch)
    with pytest.raises(PluginError, match="plugin 'faulty', hook 'plan': ZeroDivisionError"):
        checked(tmp_path, plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1}\n  faulty: {}")


def test_a_plan_that_returns_nothing_names_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_plugins.install(monkeypatch)
    monkeypatch.setattr(recipe_plugins.Faulty, "plan", hookimpl(lambda self: None))
    with pytest.raises(PluginError, match="plugin 'faulty', hook 'plan': returned NoneType; it must return a Plan"):
        checked(tmp_path, plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1}\n  faulty: {}")


def test_a_recipe_error_of_a_plan_is_one_of_the_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_plugins.install(monkeypatch)
    plugins = "plugins:\n  ddp: {}\n  adamw: {lr: 1}\n  refusing: {}"
    found = checked(tmp_path, plugins=plugins, training="training: {max_steps: 1, max_tokens: 1}")
    assert {problem.key for problem in found.problems} == {"plugins.refusing", "training.max_tokens"}


def test_model_is_resolved(tmp_path: Path) -> None:
    config = checked(tmp_path, model="model: {preset: llama-tiny, num_hidden_layers: 3}").config
    assert config is not None
    assert config.num_hidden_layers == 3


def test_every_check_still_runs_when_other_sections_are_faulty(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        recipe(
            seed="seed: x",
            training="training: {}",
            batch="batch: {micro_batch_size: 3, global_batch_size: 8}",
            plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1}\n  sgd: {lr: 1}",
        )
    )
    with pytest.raises(RecipeError) as caught:
        load(path)
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {"seed", "training", "batch.global_batch_size", "plugins.sgd"}


def test_a_faulty_optimizer_section_is_not_a_missing_optimizer(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(plugins="plugins:\n  ddp: {}\n  adamw: {lr: x}"))
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert [problem.key for problem in caught.value.problems] == ["plugins.adamw.lr"]

"""Hybrid data parallel in a whole recipe: batch algebra, and what is derived."""

import pytest
import yaml

from camshaft.recipe import check, load

RECIPE = {
    "schema_version": 1,
    "name": "hybrid",
    "model": {"preset": "llama-nano"},
    "tokenizer": {"type": "byte"},
    "data": {"sequence_length": 32},
    "batch": {"micro_batch_size": 1, "global_batch_size": 24},
    "training": {"max_steps": 4},
    "plugins": {"ddp": {}, "adamw": {"lr": 1e-3}},
}


@pytest.fixture
def recipe(tmp_path):
    def make(world_size=None, **parallel):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**RECIPE, "parallel": parallel}))
        resolved = load(path, world_size=world_size)
        return resolved, check(resolved, world_size)

    return make


def test_both_halves_split_the_batch(recipe):
    _, found = recipe(12, data_parallel_shard=2, tensor_parallel=2)
    assert found.mesh.batch_degree == 6 and found.batch.accumulation == 4


def test_two_halves_settle_an_open_number_of_processes(recipe):
    _, found = recipe(data_parallel_shard=2, data_parallel_replicate=3)
    assert found.problems == () and found.mesh.world_size == 6 and found.batch.accumulation == 4
    _, found = recipe(data_parallel_shard=2)
    assert found.problems == () and found.mesh.world_size == 2 and found.batch is None


def test_what_is_derived_is_told(recipe):
    resolved, _ = recipe(6, data_parallel_shard=2)
    assert resolved.derived["parallel.data_parallel"] == (6, "derived from 6 process(es)")
    assert resolved.derived["parallel.data_parallel_replicate"] == (3, "derived: 6 data-parallel ranks")
    assert "parallel.data_parallel_shard" not in resolved.derived


def test_without_hybrid_nothing_of_it_is_derived(recipe):
    resolved, _ = recipe(6)
    assert [key for key in resolved.derived if key.startswith("parallel")] == ["parallel.data_parallel"]


def test_a_degree_that_does_not_divide_is_a_problem_of_its_line(recipe):
    _, found = recipe(4, data_parallel_shard=3)
    (problem,) = [problem for problem in found.problems if problem.key == "parallel.data_parallel_shard"]
    assert problem.line is not None and "1, 2, 4" in problem.fix

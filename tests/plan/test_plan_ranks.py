"""What ``camshaft plan`` says of single ranks, with plugins that divide the model by arithmetic alone."""

import dataclasses
import itertools
import time

import pytest

from camshaft import Claim, Plan
from camshaft.boxes import Box
from camshaft.cli import estimate
from camshaft.cli import ranks as pages
from camshaft.errors import PluginError
from camshaft.estimate import Estimate, Sent
from camshaft.host import Host
from camshaft.mesh import MeshShape
from camshaft.plugin import Plugin, hookimpl
from camshaft.recipe import check
from camshaft.recipe.schema import Parallel

PLUGINS = {"ddp": {}, "adamw": {"lr": 1e-3}}


class Halves(Plugin):
    """Rows of every matrix over ``tp``, the first ranks one more; vectors in copies."""

    @hookimpl
    def plan(self):
        return Plan(claims=(Claim("parameter.layout", "tp"),))

    @hookimpl
    def shapes(self, context, parameters, rank):
        degree, place = context.mesh["tp"].degree, context.mesh.coordinates(rank)["tp"]
        for each in parameters:
            rows = each.shape[0]
            if len(each.shape) == 1:
                yield dataclasses.replace(each, box=Box(each.shape, (0,), degree))
                continue
            begin, end = (min(rows, at * -(-rows // degree)) for at in (place, place + 1))
            shape = (end - begin, *each.shape[1:])
            yield dataclasses.replace(each, shape=shape, box=Box(each.shape, (begin, 0)))


class Cuts(Plugin):
    """Layer i of L in stage i p / L of p; the last stage borrows a tied table from the first."""

    @hookimpl
    def plan(self):
        return Plan(claims=(Claim("activation.layout", "pp"),))

    @hookimpl
    def shapes(self, context, parameters, rank):
        degree, place = context.mesh["pp"].degree, context.mesh.coordinates(rank)["pp"]
        layers = max(each.layer for each in parameters)
        found = []
        for each in parameters:
            if min(max(each.layer, 0) * degree // layers, degree - 1) == place:
                found.append(dataclasses.replace(each, stage=place))
            elif each.tied and place == degree - 1:
                found.append(dataclasses.replace(each, owned=False, tied=(), layer=layers, stage=place))
        return found

    @hookimpl
    def estimate(self, context, sizes):
        return Estimate(sent=(Sent("pp", "send", 100 + sizes.rank),), notes=("a bubble of a quarter",))


class ElementsOnly(Plugin):
    """Tells nothing of shapes."""

    @hookimpl
    def shapes(self):
        return None


def planned(make_recipe, world_size, parallel, plugins=None, model=None, **changes):
    changes = {"batch": {"micro_batch_size": 1, "global_batch_size": 16}, "parallel": parallel} | changes
    changes["model"] = make_recipe(PLUGINS).tree["model"] | (model or {})
    resolved = make_recipe(PLUGINS, world_size, **changes)
    checked = check(resolved, world_size)
    own = {"halves": Halves(), "cuts": Cuts()} if plugins is None else plugins
    return checked, Host.of(resolved.recipe.plugins, own)


def whole(checked):
    return estimate.sizes(checked, Host({})).elements


@pytest.mark.parametrize("parallel", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}])
@pytest.mark.parametrize("tied", [True, False])
def test_ranks_along_a_dividing_axis_hold_the_whole_model_once(make_recipe, parallel, tied):
    """Uneven rows (the vocabulary is 259), copies of vectors and a borrowed table: everything counts once."""
    checked, host = planned(make_recipe, 4, parallel, model={"tie_word_embeddings": tied, "num_hidden_layers": 3})
    (axis,) = [axis for axis in ("tp", "pp") if checked.mesh[axis].degree > 1]
    found = [estimate.sizes(checked, host, rank) for rank in checked.mesh.along(1, axis)]
    counted = sum(each.elements / each.copies for sizes in found for each in sizes.parameters)
    assert counted == whole(checked)
    assert all(sizes.elements == sizes.trained == sum(e.elements for e in sizes.parameters) for sizes in found)
    assert sum(bool(sizes.borrowed) for sizes in found) == (tied and axis == "pp")
    assert found[0].whole == found[1].whole and found[0].config == checked.config


def test_both_orders_of_two_dividing_plugins_are_the_same(make_recipe):
    degrees = {"tensor_parallel": 2, "pipeline_parallel": 2}
    orders = [{"a": Halves(), "b": Cuts()}, {"a": Cuts(), "b": Halves()}]
    (checked, one), (_, other) = (planned(make_recipe, 4, degrees, plugins) for plugins in orders)
    for rank in range(4):
        assert estimate.sizes(checked, one, rank) == estimate.sizes(checked, other, rank)
    found = [estimate.sizes(checked, one, rank) for rank in range(4)]
    assert sum(e.elements / e.copies for sizes in found for e in sizes.parameters) == whole(checked)


def test_storage_and_sums_count_the_ranks_own_elements(make_recipe):
    checked, host = planned(make_recipe, 8, {"tensor_parallel": 2, "pipeline_parallel": 2})
    for rank in range(8):
        sizes, found = estimate.sizes(checked, host, rank), estimate.estimate(checked, host, rank)
        assert found.state.parameters == found.state.gradients == 4 * sizes.elements
        sums = {entry.axis: entry.bytes for entry in found.sent}
        assert sums == {"dp": 4 * sizes.elements, "pp": 100 + rank}


def test_a_borrowed_table_is_memory_and_no_parameter(make_recipe):
    checked, host = planned(make_recipe, 2, {"pipeline_parallel": 2, "data_parallel": 1})
    first, last = (estimate.estimate(checked, host, rank) for rank in range(2))
    more = {"copies of another stage's parameters, with gradients": 259 * 20 * 8}
    assert dict(last.buffers) == {**dict(first.buffers), **more}


def test_ranks_that_see_other_samples_hold_the_same(make_recipe):
    checked, host = planned(make_recipe, 8, {"pipeline_parallel": 2, "data_parallel_shard": 2})
    found = pages.Ranks(checked, host)
    assert [each.rank for each in found.representatives] == pages.places(checked.mesh) == [0, 4]
    for rank in range(8):
        twin = found.representatives[rank // 4]
        assert dataclasses.replace(estimate.sizes(checked, host, rank), rank=twin.rank) == twin.sizes


def test_the_fullest_rank_is_shown_with_a_line_for_each_stage(make_recipe):
    checked, host = planned(
        make_recipe,
        8,
        {"pipeline_parallel": 4, "tensor_parallel": 2},
        model={"num_hidden_layers": 8, "tie_word_embeddings": False},
    )
    found = pages.Ranks(checked, host)
    assert found.fullest.rank == 6 and found.fullest.memory == max(found.holding(rank).memory for rank in range(8))
    text = pages.show(found, None)
    lines = text.split("\n\n")[0].splitlines()
    assert lines[1].split()[:3] == ["pp", "stages", "holds"]
    assert lines[2].startswith("0   0       embedding, layers 0..1  ")
    assert lines[5].startswith("3   3       layers 6..7, last norm and head  ")
    assert "rank 6 of 8, which holds most" in text and "model state of rank 6\n" in text
    assert text.endswith("a bubble of a quarter")


def test_any_rank_can_be_asked_for(make_recipe):
    checked, host = planned(make_recipe, 16, {"pipeline_parallel": 2, "tensor_parallel": 2, "data_parallel_shard": 2})
    text = pages.show(pages.Ranks(checked, host), 13)
    assert "place        pp=1  dp_replicate=1  dp_shard=0  cp=0  tp=1  dp=2\n" in text
    rows = {line.split()[1]: line.split("  ")[-1].strip() for line in text.splitlines() if line.startswith("along")}
    assert rows == {
        "pp": "5, 13 (2)", "dp_replicate": "9, 13 (2)", "dp_shard": "13, 15 (2)", "tp": "12..13 (2)",
        "dp": "9, 11, 13, 15 (4)",
    }  # fmt: skip
    assert "of them in copies that other ranks have too" in text and "by place along pp" not in text


def test_4096_ranks_are_counted_by_their_places(make_recipe):
    degrees = {"tensor_parallel": 8, "pipeline_parallel": 16}
    model = {
        "num_hidden_layers": 126, "hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128,
        "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    batch = {"micro_batch_size": 1, "global_batch_size": 2048}
    checked, host = planned(make_recipe, 4096, degrees, model=model, batch=batch)
    began = time.process_time()
    text = pages.show(pages.Ranks(checked, host), None)
    assert time.process_time() - began < 3
    assert "rank 0 of 4096, which holds most" in text and "0, 8, 16, 24, 32, 40, 48, ..., 248 (32)" in text


def test_with_data_ranks_alone_one_table_is_for_all(make_recipe):
    checked, host = planned(make_recipe, 4, {})
    text = pages.show(pages.Ranks(checked, host), None)
    assert text.startswith("model state per rank\n") and "sent per rank and step\n" in text
    assert "model state of rank 3\n" in pages.show(pages.Ranks(checked, host), 3)


class Lies(Plugin):
    @hookimpl
    def shapes(self):
        return [7]


def test_an_answer_of_another_type_is_the_plugins_fault(make_recipe):
    checked, host = planned(make_recipe, 1, {}, {"lies": Lies()})
    with pytest.raises(PluginError, match="plugin 'lies', hook 'shapes': must return ParameterShapes or None, got int"):
        estimate.sizes(checked, host)


def test_a_plugin_may_leave_shapes_alone(make_recipe):
    checked, host = planned(make_recipe, 1, {}, {"quiet": ElementsOnly()})
    assert estimate.sizes(checked, host).elements == whole(checked)


@pytest.mark.parametrize("halves", [{}, {"data_parallel_shard": 3}, {"data_parallel_replicate": 3}])
def test_ranks_along_axes_are_those_of_the_same_place_elsewhere(halves):
    parallel = {"pipeline_parallel": 2, "context_parallel": 2, "tensor_parallel": 3, **halves}
    mesh = MeshShape.of(Parallel(**parallel), 2 * 6 * 2 * 3)
    coordinates = [mesh.coordinates(rank) for rank in range(mesh.world_size)]
    for size in (1, 2):
        for names in itertools.combinations(mesh.names, size):
            moving = {member for name in names for member in mesh.members(name)}
            fixed = [axis.name for axis in mesh.axes if axis.name not in moving]
            for rank in (0, 17, mesh.world_size - 1):
                same = [
                    other for other, place in enumerate(coordinates)
                    if all(place[name] == coordinates[rank][name] for name in fixed)
                ]  # fmt: skip
                assert list(mesh.along(rank, *names)) == same


@pytest.mark.parametrize(
    ("numbers", "limit", "text"),
    [
        ([], None, ""),
        ([5], 2, "5"),
        ([0, 1], None, "0..1"),
        ([0, 1, 2, 4, 6, 7], None, "0..2, 4, 6..7"),
        ([0, 1], 4, "0..1 (2)"),
        (range(0, 64, 8), 4, "0, 8, 16, ..., 56 (8)"),
        (range(4096), 4, "0..4095 (4096)"),
    ],
)
def test_numbers_are_written_as_runs(numbers, limit, text):
    assert pages.ranges(numbers, limit) == text

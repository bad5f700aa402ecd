"""What is compiled, how often, and what a run says of it."""

import logging
from types import SimpleNamespace

import pytest
import torch
from compile_cases import EXACT, MODEL, TRACED, Seen, assert_within, compare, recipe, records_of, run
from torch import nn

from camshaft.errors import CamshaftError
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.ranks import RankFailed, run_ranks
from camshaft_compile.counting import Counting, Events
from camshaft_compile.watching import Watcher


def counted(rank, world_size, scenario):
    """Runs in a fork, so that no test sees what another has compiled."""
    import warnings

    warnings.simplefilter("ignore")
    return scenario()


def in_fork(scenario):
    return run_ranks(1, counted, scenario, timeout_s=100)[0]


def _function():
    def function(value):
        return value.sin() * 2

    return function


def _plain_counts():
    counting, compiled = Counting(), torch.compile(_function(), backend="aot_eager", dynamic=False)
    first = (compiled(torch.ones(3)), counting.take())[1]
    again = (compiled(torch.zeros(3)), counting.take())[1]
    other = (compiled(torch.ones(4)), counting.take())[1]
    return first, again, other


def test_torchs_private_records_say_what_is_compiled_and_why():
    first, again, other = in_fork(_plain_counts)
    assert (first.graphs, first.recompiles, first.breaks) == (1, [], []) and first.seconds > 0
    assert not again
    assert other.graphs == 1 and len(other.recompiles) == 1 and not other.breaks
    assert "size mismatch" in other.recompiles[0] and "expected 3, actual 4" in other.recompiles[0]


def _broken_counts():
    def breaks(value):
        value = value.sin()
        torch._dynamo.graph_break()
        return value.cos()

    counting, compiled = Counting(), torch.compile(breaks, backend="aot_eager")
    compiled(torch.ones(3))
    first = counting.take()
    compiled(torch.ones(3))
    return first, counting.take()


def test_a_graph_break_is_counted_with_its_reason():
    first, again = in_fork(_broken_counts)
    assert len(first.breaks) == 1 and "graph_break" in first.breaks[0]
    assert not again


def _many_counts():
    counting, seen = Counting(), 0
    for size in range(1, 100):  # more than the records that torch keeps
        torch.compile(_function(), backend="eager", dynamic=False)(torch.ones(size))
        torch._dynamo.reset()
        seen += counting.take().graphs
    return seen


def test_no_record_is_counted_twice_where_torch_forgets_the_oldest():
    assert in_fork(_many_counts) == 99


class Told(Plugin):
    """Writes what the plugin logs where the parent process finds it."""

    def __init__(self, path):
        super().__init__()
        self._path = path

    @hookimpl
    def bind(self):
        handler = logging.FileHandler(self._path)
        logger = logging.getLogger("camshaft_compile")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


@pytest.mark.parametrize("layers", [2, 4])
def test_one_graph_for_all_layers(layers, make_recipe, tmp_path):
    resolved = recipe(make_recipe, 1, TRACED, model={"num_hidden_layers": layers})
    run(resolved, 1, {"told": Told(tmp_path / "told")})
    (line,) = (tmp_path / "told").read_text().splitlines()
    assert f"training: compiled 1 graph(s) for {layers} module(s) in" in line
    assert "with 0 graph break(s)" in line


def test_evaluation_compiles_once(make_recipe, tmp_path):
    data_of_eval = {"max_steps": 4, "log_every": 1, "eval_every": 1, "eval_samples": 5}
    resolved = recipe(make_recipe, 1, TRACED, training=data_of_eval)
    resolved.recipe.data.__dict__["validation_fraction"] = 0.1
    run(resolved, 1, {"seen": Seen(tmp_path / "seen"), "told": Told(tmp_path / "told")})
    lines = (tmp_path / "told").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["training", "evaluation"]
    records = records_of(tmp_path / "seen")
    assert sum("eval/loss" in record for record in records) == 5
    assert all(record["plugin/compile/recompiles"] == 0 for record in records if "train/loss" in record)


class Disturbing(Plugin):
    """Changes an attribute that the graph of a layer depends on, in every window from the third on."""

    @hookimpl
    def pre_forward(self, state):
        for layer in state.model.model.layers if state.step >= 2 else ():
            layer.mlp.ops.rms_norm, layer.input_layernorm.eps = layer.mlp.ops.rms_norm, 1e-6 * (1 + state.step)


def test_a_recompilation_is_counted_and_told_with_the_guard_that_failed(make_recipe, tmp_path):
    resolved = recipe(make_recipe, 1, {"backend": "aot_eager"})
    observers = {"z": Disturbing(), "seen": Seen(tmp_path / "seen"), "told": Told(tmp_path / "told")}
    run(resolved, 1, observers)
    assert [record["plugin/compile/recompiles"] for record in records_of(tmp_path / "seen")] == [0, 0, 1, 1]
    warnings = (tmp_path / "told").read_text().splitlines()[1:]
    assert len(warnings) == 2
    assert "training recompiled after warm-up, at step 3" in warnings[0] and "eps" in warnings[0]


def test_strict_ends_the_run(make_recipe):
    with pytest.raises(RankFailed, match=r"recompiled after warm-up, at step 3.*eps"):
        run(recipe(make_recipe, 1, TRACED), 1, {"z": Disturbing()})
    assert issubclass(CamshaftError, Exception)


def test_counts_add_up_until_they_are_recorded():
    world, window = SimpleNamespace(is_main=True), SimpleNamespace(batches=[None])
    state = SimpleNamespace(extras={}, step=0, world=world, window=window)
    watcher = Watcher(state, "compile", SimpleNamespace(compiled=True, names=["a"]), strict=False)
    events = iter(
        [Events(graphs=1, breaks=["a"]), Events(recompiles=["b"]), Events(recompiles=["b", "c"], breaks=["d"])]
    )
    watcher._counting.take = lambda: next(events)
    for _ in range(3):
        watcher.end_window()
    assert state.extras == {"plugin/compile/graph_breaks": 2, "plugin/compile/recompiles": 3}


class Narrow(Plugin):
    """No room for more than one row from the third window on."""

    draws = False

    @hookimpl
    def pre_forward(self, state, batch):
        if state.step >= 2 and len(batch.tokens) > 1:
            raise torch.OutOfMemoryError("tried to allocate 2 rows")


def test_halves_of_microbatches_are_compiled_once_and_are_no_fault(make_recipe, tmp_path):
    wanted = run(recipe(make_recipe, 1, None))
    halves = {"micro_batch_size": 2, "global_batch_size": 8, "on_out_of_memory": "halve"}
    observers = {"narrow": Narrow(), "seen": Seen(tmp_path / "seen"), "told": Told(tmp_path / "told")}
    found = run(recipe(make_recipe, 1, TRACED, batch=halves), 1, observers)
    assert_within(compare(found, wanted), EXACT)
    records = records_of(tmp_path / "seen")
    assert [record["plugin/compile/recompiles"] for record in records] == [0] * 4
    assert [record.get("memory/halvings", 0) for record in records] == [0, 0, 1, 1]
    lines = (tmp_path / "told").read_text().splitlines()
    assert len(lines) == 2 and all("training: compiled 1 graph(s)" in line for line in lines)


class Broken(nn.Module):
    """A layer with a graph break."""

    def forward(self, hidden):
        torch._dynamo.graph_break()
        return hidden


class BreakingModel(Plugin):
    """Owns ``build_model``: each layer breaks its graph once."""

    @hookimpl
    def build_model(self, config, world):
        from camshaft.models.llama import Llama

        model = Llama(config, world.ops)
        for layer in model.model.layers:
            layer.mlp.down_proj.register_forward_pre_hook(_breaking)
        return model


def _breaking(module, arguments):
    torch._dynamo.graph_break()


def test_graph_breaks_of_the_warm_up_are_in_the_metrics_and_then_zero(make_recipe, tmp_path):
    resolved = recipe(make_recipe, 1, TRACED)
    run(resolved, 1, {"model": BreakingModel(), "seen": Seen(tmp_path / "seen"), "told": Told(tmp_path / "told")})
    breaks = [record["plugin/compile/graph_breaks"] for record in records_of(tmp_path / "seen")]
    assert breaks[0] == 0 and breaks[1] >= 1 and breaks[2:] == [0, 0]
    assert "graph_break" in (tmp_path / "told").read_text()


def test_names_and_the_state_dict_are_those_of_the_uncompiled_model(monkeypatch):
    from camshaft.models.config import ModelConfig
    from camshaft.models.llama import Llama
    from camshaft_compile import Options
    from camshaft_compile.blocks import Blocks

    class World:
        pieces = set()
        stages = {}

    fields = {"num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "head_dim": 4}
    model = Llama(ModelConfig(**(MODEL | fields)))
    names, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    model.model.layers[1].forward = recomputed = model.model.layers[1].forward  # of another plugin, such as recompute
    whole = []
    monkeypatch.setattr(torch, "compile", lambda inner, **named: (inner, whole.append(named["fullgraph"]))[0])
    blocks = Blocks(Options(backend="eager"), World, model, "compile")
    assert whole == [False, True, False], "what recomputes is one graph or nothing"
    assert World.pieces == {"model.layers.0", "model.layers.1", "model.layers.2"}
    assert list(model.state_dict()) == names and [name for name, _ in model.named_modules()] == modules
    own = [vars(layer).get("forward") for layer in model.model.layers]
    assert all(own)
    blocks.close()
    assert vars(model.model.layers[1]).pop("forward") is recomputed
    assert not any("forward" in vars(module) for module in model.modules())

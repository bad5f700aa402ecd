"""What the model may be: frozen stages, splits of any kind, a table, a model of a third party."""

import pipeline_runs as runs
import pytest
import torch
from torch import nn

from camshaft.errors import RecipeError
from camshaft.models.llama import Llama
from camshaft.models.stages import Cuttable
from camshaft.plugin import Plugin, hookimpl
from camshaft_pipeline import table
from camshaft_pipeline.schedules import make


class Frozen(Plugin):
    """Owns ``build_model``: parameters whose name begins with one of ``names`` do not train."""

    def __init__(self, *names):
        super().__init__()
        self.names = names

    def freeze(self, model):
        for name, parameter in model.named_parameters():
            if name.startswith(self.names):
                parameter.requires_grad_(False)

    @hookimpl
    def build_model(self, config):
        model = Llama(config)
        self.freeze(model)
        return model


BEFORE = ("model.embed_tokens", *(f"model.layers.{index}." for index in range(5)))
MIDDLE = tuple(f"model.layers.{index}." for index in range(3, 6))
NORMS = ("model.embed_tokens", "model.layers.0.input", *(f"model.layers.{i}.post_att" for i in range(9)))


@pytest.mark.parametrize(
    ("names", "schedule"),
    [(BEFORE, "1f1b"), (BEFORE, "zb_h1"), (MIDDLE, "zbv"), (NORMS, "zb_h1")],
    ids=["stages-without-gradient", "split-stages-without-gradient", "middle", "norms"],
)
def test_frozen_parameters(make_recipe, schedule, names):
    """In the first case no gradient goes back beyond layer 5: nothing is sent there, and stage 0 does nothing."""
    model = {"num_hidden_layers": 8, "tie_word_embeddings": names is MIDDLE}
    frozen = Frozen(*names)
    wanted = runs.reference(runs.recipe(make_recipe, 1, model=model), prepare_model=frozen.freeze)
    resolved = runs.recipe(make_recipe, 2, {"schedule": schedule}, model=model)
    runs.assert_equal(resolved, 2, wanted, {"frozen": frozen})


def test_a_frozen_tied_table(make_recipe):
    frozen = Frozen("model.embed_tokens")
    wanted = runs.reference(runs.recipe(make_recipe, 1), prepare_model=frozen.freeze)
    runs.assert_equal(runs.recipe(make_recipe, 2, {"schedule": "zb_h1"}), 2, wanted, {"frozen": frozen})


SPLITS = [
    ({"schedule": "interleaved_1f1b", "virtual_stages": 3, "split": {"layers": [1, 1, 2, 1, 3, 1]}}, {}),
    ({"schedule": "gpipe", "virtual_stages": 2, "split": {"balance": "layers"}}, {}),
    ({"split": {"starts": ["model.layers.0", "model.layers.7"]}}, {"attention_bias": True, "qk_norm": True}),
    ({"schedule": "zb_h1", "split": {"times": [3, 1, 1, 1, 1, 1, 1, 1, 1, 9, 5]}}, {"attention_bias": True}),
]


@pytest.mark.parametrize(("options", "model"), SPLITS, ids=["numbers", "layers", "starts", "times"])
def test_splits(make_recipe, options, model):
    model = {"num_hidden_layers": 9} | model
    wanted = runs.reference(runs.recipe(make_recipe, 1, model=model))
    runs.assert_equal(runs.recipe(make_recipe, 2, options, model=model), 2, wanted)


def test_a_schedule_from_a_table(make_recipe, tmp_path):
    """Backwards of one rank are split, those of the other are not; transfers are put in."""
    schedule = make("zb_h1", 2, 8)
    path = tmp_path / "mine.csv"
    rows = [[str(action) for action in program if action.kind.name in "FBIW"] for program in schedule.programs]
    whole = [cell.replace("I", "B") for cell in rows[1] if not cell.startswith("W")]
    path.write_text("\n".join(",".join(row) for row in (rows[0], whole)) + "\n")
    assert table.read(path.read_text()).placement == (0, 1)
    wanted = runs.reference(runs.recipe(make_recipe, 1))
    runs.assert_equal(runs.recipe(make_recipe, 2, {"table": str(path)}), 2, wanted)


class Stack(nn.Module):
    """A model of a third party: other names, two tensors' worth of work before the layers, a linear head with bias."""

    pipeline = Cuttable("blocks", ("table", "lift"), ("head",))

    def __init__(self, vocabulary, width, depth):
        super().__init__()
        self.spans = {}
        self.table = nn.Embedding(vocabulary, width)
        self.lift = nn.Linear(width, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, batch):
        span = None if batch.stage is None else self.spans[batch.stage]
        hidden = self.lift(self.table(batch.tokens)) if span is None or span.first else batch.hidden
        for index in range(len(self.blocks)) if span is None else range(span.begin, span.end):
            hidden = hidden + torch.tanh(self.blocks.get_submodule(str(index))(hidden))
        if span is not None and not span.last:
            return hidden
        scores = self.head(hidden).flatten(0, 1)
        return nn.functional.cross_entropy(scores.double(), batch.labels.flatten(), reduction="sum")


class Builds(Plugin):
    """Owns ``build_model``: makes ``model``, whatever the recipe says."""

    def __init__(self, make_model):
        super().__init__()
        self.make_model = make_model

    @hookimpl
    def build_model(self):
        return self.make_model()


def stack():
    return Stack(259, 12, 5)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_a_model_of_a_third_party(make_recipe, schedule):
    builds = {"builds": Builds(stack)}
    alone = runs.recipe(make_recipe, 1)
    wanted = runs.record_ranks(alone, 1, builds)[0]
    assert all(record.norm > runs.MAX_NORM for record in wanted)
    runs.assert_equal(runs.recipe(make_recipe, 2, {"schedule": schedule}), 2, wanted, builds)


class Opaque(Stack):
    pipeline = None


class Stray(Stack):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.empty(3))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: Opaque(259, 12, 5), "Opaque does not say how it can be cut into stages.*camshaft.models.stages"),
        (lambda: Stray(259, 12, 5), "parameter 'scale' is neither in the layers nor before nor after them"),
        (lambda: Stack(259, 12, 1), "2 stages, and the model has 1 layers: each stage needs one"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(make_recipe, model, said):
    from camshaft.testing.ranks import RankFailed

    with pytest.raises(RankFailed, match=f"(?s)RecipeError.*{said}"):
        runs.record_ranks(runs.recipe(make_recipe, 2, {}), 2, {"builds": Builds(model)})
    assert issubclass(RecipeError, Exception)

"""What ``validate`` and ``train`` say of a recipe's kernels, what is chosen, and what a run tells of it."""

import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoint

import kernel_plugins
import pytest

from camshaft import host
from camshaft.errors import PluginError, RecipeError
from camshaft.ops import Kernel, Ops, cross_entropy, swiglu
from camshaft.recipe import check, load
from camshaft.testing.compare import assert_bit_equal
from camshaft.testing.ranks import RankFailed
from camshaft.testing.run import record_rank, record_ranks

THEIRS = {"theirs": "Kernels", "their_model": "Model", "deaf": "Deaf", "rival": "Rival"}


@pytest.fixture
def strangers(monkeypatch):
    """The test's plugins, installed."""
    points = {name: EntryPoint(name, f"kernel_plugins:{kind}", host.GROUP) for name, kind in THEIRS.items()}
    points |= host.installed()
    monkeypatch.setattr(host, "installed", lambda: points)
    kernel_plugins.CALLS.clear()
    return points


@pytest.fixture(autouse=True)
def no_table_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return tmp_path / "cache" / "camshaft" / "kernels"


@pytest.fixture
def recipe(make_recipe):
    def make(kernels, plugins=None, world_size=1, **sections):
        chosen = {"ddp": None, **(plugins or {}), "kernels": kernels, "adamw": {"lr": 3e-3}, "clip": {"max_norm": 0.1}}
        small = {"training": {"max_steps": 2, "log_every": 1}, "batch": {"micro_batch_size": 2, "global_batch_size": 4}}
        return make_recipe(chosen, world_size, **(small | sections))

    return make


def told(resolved, device="cpu"):
    """Every problem, as a user sees it."""
    return [str(problem) for problem in check(resolved, device=device).problems]


REFUSED = {
    "nothing": (
        {},
        "plugins.kernels: no operation gets another implementation than it has without this plugin.*Fix: na",
    ),
    "own-forms": ({"rope": "torch", "linear_cross_entropy": "unfused"}, "no operation gets another implementation"),
    "no-gpu": ({"rope": "triton"}, r"plugins.kernels.rope: 'triton' needs a GPU, and this run is on a CPU. Fix: name"),
    "apex": ({"rms_norm": "apex"}, "'apex' needs a GPU"),
    "flash": ({"document_attention": "flash_attention"}, "document_mask is off|needs a GPU"),
    "misspelt": ({"swiglu": "tritn"}, "nobody offers 'tritn' of swiglu. Did you mean 'triton'.*Fix: use 'triton'"),
    "unknown": (
        {"swiglu": "zzz"},
        "nobody offers 'zzz' of swiglu.*take one of torch, triton, liger, auto, or enable a",
    ),
    "not-of-it": ({"rope": "apex"}, "'apex' has no rope.*Fix: take one of torch, triton, liger, auto"),
    "no-such-layer": (
        {"grouped_matmul": "torch", "layer_norm": "liger"},
        "'liger' would have no effect: the built-in de",
    ),
    "no-documents": ({"document_attention": "torch_segments"}, "would have no effect: data.document_mask is off"),
    "two-losses": (
        {"linear_cross_entropy": "torch", "cross_entropy": "liger"},
        "'liger' would have no effect: linear_cross_entropy makes the loss, and no logits",
    ),
    "their-op": ({"others": {"twice": "mine"}}, "plugins.kernels.others.twice: nobody offers 'mine' of twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(recipe, case):
    kernels, pattern = REFUSED[case]
    problems = told(recipe(kernels))
    assert problems
    assert any(re.search(pattern, problem) for problem in problems), problems
    assert all("recipe1.yaml:" in problem for problem in problems), "place in the file"


def test_an_unknown_operation_names_the_nearest(recipe):
    with pytest.raises(RecipeError, match=r"unknown key 'rms_nrm'.*rms_norm"):
        recipe({"rms_nrm": "auto"})


def test_documents_leave_plain_attention_without_effect(recipe):
    data = recipe({"all": "auto"}).tree["data"] | {"pack": True, "document_mask": True}
    (problem,) = told(recipe({"attention": "flash_attention"}, data=data), device="any")
    assert "would have no effect: data.document_mask makes every attention one inside of documents" in problem
    assert told(recipe({"document_attention": "torch_segments"}, data=data)) == []


@pytest.mark.parametrize("op", ["linear_cross_entropy", "cross_entropy"])
def test_losses_are_refused_where_the_vocabulary_is_divided(recipe, op):
    provider = {"linear_cross_entropy": "torch", "cross_entropy": "triton"}[op]
    parallel = {"parallel": {"tensor_parallel": 2}, "launch": {"device": "cuda", "processes": 2}}
    model = recipe({"all": "auto"}).tree["model"] | {"num_attention_heads": 4, "num_key_value_heads": 2}
    plugins = {"tensor_parallel": {}}
    (problem,) = told(recipe({op: provider}, plugins, 2, model=model, **parallel), device="any")
    assert f"plugins.kernels.{op}: '{provider}' would have no effect: tensor parallel divides the vocabulary" in problem
    assert told(recipe({"all": "auto"}, plugins, 2, model=model, **parallel), device="any") == []


def test_planned_for_another_machine_nothing_of_this_one_counts(recipe):
    free = recipe({"rms_norm": "apex", "rope": "triton"}, launch={"device": "auto"})
    assert told(free, device="any") == []
    absent = told(free, device="cuda")
    assert (
        len(absent) == 1 and "NVIDIA apex is not installed. Fix: build NVIDIA's with tools/install_apex.sh" in absent[0]
    )
    assert told(recipe({"rope": "triton"}), device="any") != [], "the recipe itself says that it is for a CPU"


def test_the_other_apex_is_recognised(recipe, monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (problem,) = told(recipe({"rms_norm": "apex"}, launch={"device": "auto"}), device="cuda")
    assert "unrelated web package" in problem and "tools/install_apex.sh" in problem
    assert "apex" not in sys.modules


def test_segments_are_refused_under_a_compiler(recipe):
    data = recipe({"all": "auto"}).tree["data"] | {"pack": True, "document_mask": True}
    problems = told(recipe({"document_attention": "torch_segments"}, {"compile": {}}, data=data))
    assert any("'compile' would trace anew for every batch" in problem for problem in problems)


def test_validate_needs_no_torch(recipe, tmp_path):
    recipe({"linear_cross_entropy": "torch", "rms_norm": "auto"})
    code = (
        "import sys; from camshaft.cli import run; status = run(['validate', sys.argv[1]]); "
        "assert not {'torch', 'triton'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "recipe1.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_plugins_that_replace_one_operation_collide(recipe, strangers):
    (problem,) = told(recipe({"swiglu": "triton"}, {"rival": {}}, launch={"device": "auto"}), device="any")
    assert "plugins 'rival' and 'kernels' both claim module.implementation [ops.swiglu]" in problem
    assert told(recipe({"linear_cross_entropy": "torch"}, {"rival": {}})) == []


def log_of(tmp_path):
    return (tmp_path / "run1" / "kernels.txt").read_text()


def test_a_run_tells_what_was_chosen_and_why_not_the_others(recipe, tmp_path, caplog):
    caplog.set_level("INFO", logger="camshaft.kernels")
    record_rank(0, 1, recipe({"all": "auto", "cross_entropy": "torch"}))
    lines = log_of(tmp_path).splitlines()
    rows = {line.split()[0]: line for line in lines if not line.startswith(" ")}
    assert rows["linear_cross_entropy"].split()[1:3] == ["torch", "auto"]
    assert "not measured; the same products as apart" in rows["linear_cross_entropy"]
    assert rows["cross_entropy"].split()[1:3] == ["torch", "torch"]
    after = lines[lines.index(rows["swiglu"]) + 1 :]
    assert after[0] == "  not triton: 'triton' needs a GPU, and this run is on a CPU"
    assert [record.message.split("\n", 1)[1] for record in caplog.records] == [log_of(tmp_path).rstrip()]


def test_auto_takes_no_loss_that_nobody_calls(recipe, tmp_path, monkeypatch):
    from camshaft_kernels import table

    fused, loss = table.Rule(("torch",), "fused"), table.Rule(("mine",), "apart")
    monkeypatch.setattr(table, "rules", lambda: {"cpu": {"linear_cross_entropy": fused, "cross_entropy": loss}})
    kernel = Kernel("cross_entropy", "mine", lambda: {"cross_entropy": cross_entropy})
    for fuses, wanted in (("auto", "torch"), ("unfused", "mine")):
        resolved = recipe({"linear_cross_entropy": fuses, "cross_entropy": "auto"}, run={"dir": str(tmp_path / fuses)})
        record_rank(0, 1, resolved, {"theirs": Offers(kernel)})
        rows = (tmp_path / fuses / "kernels.txt").read_text().splitlines()
        (row,) = [row for row in rows if row.startswith("cross_entropy ")]
        assert row.split()[1] == wanted and ("makes the loss, and no logits" in row) == (fuses == "auto")


class Offers(kernel_plugins.camshaft.Plugin):
    """Offers one kernel."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    @kernel_plugins.camshaft.hookimpl
    def kernels(self):
        yield self.kernel


def test_what_auto_passes_over_is_told_and_no_fault_of_who_offers_it(recipe, strangers, tmp_path):
    """A recipe for a GPU goes on where there is none, with somebody else's kernels too."""
    record_rank(0, 1, recipe({"all": "auto"}, {"theirs": {}}))
    lines = log_of(tmp_path).splitlines()
    assert "  not absent: its card is not plugged in" in lines
    assert "  not mine: not measured: camshaft bench kernels" in lines
    with pytest.raises(RecipeError, match="none of the implementations of operations that it offers was taken"):
        record_rank(0, 1, recipe({"linear_cross_entropy": "torch"}, {"theirs": {}}))


def test_auto_that_leaves_everything_as_it_is_is_legal(recipe):
    records = record_rank(0, 1, recipe({"rope": "auto", "swiglu": "auto"}))
    assert len(records) == 2


def write_table(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"op": "linear_cross_entropy", "dtype": "fp32", "size": 100, "shape": "s", "ms": {"torch": 2, "unfused": 1}},
        {"op": "linear_cross_entropy", "dtype": "fp32", "size": 10**9, "shape": "l", "ms": {"torch": 1, "unfused": 2}},
        {"op": "swiglu", "dtype": "fp32", "size": 100, "shape": "s", "ms": {"torch": 2, "triton": 1}},
    ]
    tree = {"format": 1, "device": "cpu", "machine": {"name": "x"}, "rows": rows} | changes
    (folder / "cpu.json").write_text(json.dumps(tree))


def chosen(tmp_path):
    lines = [line.split() for line in log_of(tmp_path).splitlines() if not line.startswith(" ")]
    return {line[0]: line[1] for line in lines[1:]}


@pytest.mark.parametrize(("rows", "wanted"), [(1, "unfused"), (4, "torch")], ids=["small", "large"])
def test_auto_takes_the_fastest_of_the_nearest_size(recipe, tmp_path, no_table_of_the_user, rows, wanted):
    """Rows of 100 and 10^9 logits: their geometric mean, 3 x 10^5, lies between those of 1 and of 4 samples."""
    write_table(no_table_of_the_user)
    model = recipe({"all": "auto"}).tree["model"] | {"vocab_size": 4000}
    batch = {"micro_batch_size": rows, "global_batch_size": 4}
    record_rank(0, 1, recipe({"linear_cross_entropy": "auto", "swiglu": "auto"}, model=model, batch=batch))
    assert chosen(tmp_path) == {"linear_cross_entropy": wanted, "swiglu": "torch"}
    assert "the fastest measured here" in log_of(tmp_path)
    assert "  not triton: 'triton' needs a GPU" in log_of(tmp_path), "measured, and not here"


BROKEN = [{"format": 2}, {"device": "cuda:9.0"}, {"rows": [{"op": "rope"}]}, {"rows": 3}, {"machine": None}]


@pytest.mark.parametrize("change", BROKEN, ids=str)
def test_a_broken_table_is_told_and_left_out(recipe, tmp_path, no_table_of_the_user, caplog, change):
    write_table(no_table_of_the_user, **change)
    record_rank(0, 1, recipe({"linear_cross_entropy": "auto"}))
    assert chosen(tmp_path) == {"linear_cross_entropy": "torch"}
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "is no table of kernels" in warning and "camshaft bench kernels" in warning


def test_another_plugins_provider_and_operation(recipe, strangers, tmp_path):
    """The same numbers in every bit, by implementations that were really called."""
    layout = {"their_model": {}}
    plain = record_rank(0, 1, recipe({"rope": "auto"}, layout))
    kernel_plugins.CALLS.clear()
    wishes = {"swiglu": "mine", "others": {"twice": "mine"}}
    resolved = recipe(wishes, {"theirs": {}, **layout}, run={"dir": str(tmp_path / "second")})
    assert told(resolved) == []
    assert_bit_equal(record_rank(0, 1, resolved), plain)
    assert kernel_plugins.CALLS.count("swiglu") == 2 * 2 * 3, "steps x microbatches x layers"
    assert kernel_plugins.CALLS.count("twice") == 2 * 2


def test_another_plugins_norm_without_the_form_for_residuals_is_every_norm(recipe, strangers, tmp_path):
    plain = record_rank(0, 1, recipe({"rope": "auto"}))
    resolved = recipe({"rms_norm": "mine"}, {"theirs": {}}, run={"dir": str(tmp_path / "second")})
    assert_bit_equal(record_rank(0, 1, resolved), plain)
    assert kernel_plugins.CALLS.count("rms_norm") == 2 * 2 * (2 * 3 + 1), "steps x microbatches x norms"


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"swiglu": "wrong"}, "'wrong' of swiglu brings swiglu, rope, and has to bring 'swiglu' alone"),
        ({"rope": "none"}, "'none' of rope brings nothing, and has to bring 'rope' alone"),
        ({"others": {"twice": "bare"}}, "'bare' of twice brings twice, and has to bring 'others.twice' alone"),
    ],
    ids=["more", "nothing", "another name"],
)
def test_an_offer_that_brings_something_else_is_refused(recipe, strangers, wish, message):
    with pytest.raises(PluginError, match=message):
        record_rank(0, 1, recipe(wish, {"theirs": {}}))


def test_another_plugins_provider_has_to_be_enabled(recipe, strangers):
    (problem,) = told(recipe({"swiglu": "other"}, {"theirs": {}}))
    assert "plugin 'kernels' needs 'kernel:swiglu/other', which no enabled plugin provides" in problem


def test_another_plugins_reason_is_told(recipe, strangers):
    with pytest.raises(RecipeError, match="'absent' cannot be used: its card is not plugged in"):
        record_rank(0, 1, recipe({"swiglu": "absent"}, {"theirs": {}}))


@pytest.mark.parametrize(
    ("wishes", "plugins", "idle"),
    [
        ({"swiglu": "mine"}, {"theirs": {}, "deaf": {}}, "swiglu"),
        ({"linear_cross_entropy": "torch"}, {"deaf": {}}, "linear_cross_entropy"),
        ({"swiglu": "mine", "others": {"twice": "mine"}}, {"theirs": {}}, "twice"),
    ],
    ids=["model", "loss", "operation"],
)
def test_what_nothing_calls_stops_the_run(recipe, strangers, wishes, plugins, idle):
    with pytest.raises(RecipeError, match=rf"did nothing by the end of step 1: {idle}: replaced, and nothing in Llama"):
        record_rank(0, 1, recipe(wishes, plugins))


def test_a_model_outside_of_the_recipe_is_seen_too(recipe):
    with pytest.raises(
        RecipeError, match="linear_cross_entropy: replaced, and nothing in Llama or its optimizer calls"
    ):
        record_rank(0, 1, recipe({"linear_cross_entropy": "torch"}), {"model": kernel_plugins.Deaf()})


def test_ranks_choose_alike(recipe, tmp_path, monkeypatch):
    """Each rank has a table of its own, of which rank 0's counts."""
    from camshaft_kernels import table

    read = table.load

    def of_this_rank(device):
        import torch.distributed as dist

        write_table(tmp_path / f"rank{dist.get_rank()}")
        if dist.get_rank() == 1:
            text = (tmp_path / "rank1" / "cpu.json").read_text()
            (tmp_path / "rank1" / "cpu.json").write_text(
                text.replace('"torch": 2, "unfused": 1', '"torch": 1, "unfused": 2')
            )
        monkeypatch.setattr(table, "place", lambda device: tmp_path / f"rank{dist.get_rank()}" / "cpu.json")
        return read(device)

    monkeypatch.setattr(table, "load", of_this_rank)
    wish = {"linear_cross_entropy": "auto"}
    model = recipe(wish).tree["model"] | {"vocab_size": 300}
    batch = {"micro_batch_size": 1, "global_batch_size": 4}
    resolved = recipe(wish, {"ddp": {"bucket_size_mb": 0.005}}, 2, model=model, batch=batch)
    taken = record_ranks(resolved, 2, {"seen": Tells()}, timeout_s=60)
    assert len(taken) == 2
    assert (tmp_path / "fused0").read_text() == (tmp_path / "fused1").read_text() == "False"


class Tells(kernel_plugins.camshaft.Plugin):
    """Writes whether the loss is fused on its rank beside the run."""

    @kernel_plugins.camshaft.hookimpl
    def rewrite(self, world, config):
        place = world.run.path.parent / f"fused{world.rank}"
        place.write_text(str(world.ops.linear_cross_entropy is not None))


def test_a_rank_that_lacks_what_rank_0_chose_says_so(recipe, strangers, monkeypatch):
    from camshaft_kernels import table

    rule = table.Rule(("mine",), "a test's")
    monkeypatch.setattr(table, "rules", lambda: {"cpu": {"swiglu": rule}})
    monkeypatch.setattr(kernel_plugins.Kernels, "kernels", kernel_plugins.camshaft.hookimpl(_only_on_rank_0))
    layout = {"theirs": {}, "ddp": {"bucket_size_mb": 0.005}}
    batch = {"micro_batch_size": 1, "global_batch_size": 4}
    with pytest.raises(RankFailed, match="rank 0 chose 'mine' for swiglu, which cannot be used on rank 1: not here"):
        record_ranks(recipe({"swiglu": "auto"}, layout, 2, batch=batch), 2, timeout_s=60)


def _only_on_rank_0(self, world):
    from camshaft.ops import Kernel

    reason = None if world.rank == 0 else "not here"
    yield Kernel("swiglu", "mine", lambda: {"swiglu": swiglu}, lambda world: reason)


def test_the_table_of_operations_takes_no_unknown_entry():
    ops = Ops()
    ops.replace({"updates.adamw": 1, "others.anything": 2})
    assert (ops.updates, ops.others) == ({"adamw": 1}, {"anything": 2})
    for wrong in ("swigul", "updates", "others", "swiglu.x"):
        with pytest.raises(ValueError, match="there is no operation"):
            ops.replace({wrong: 1})


def test_a_recipe_with_kernels_can_be_loaded_twice(recipe, tmp_path):
    """A second run of the same recipe in the same folder keeps one table."""
    resolved = recipe({"linear_cross_entropy": "torch"})
    record_rank(0, 1, resolved)
    record_rank(0, 1, load(tmp_path / "recipe1.yaml"))
    assert [path.name for path in (tmp_path / "run1").glob("kernels*")] == ["kernels.txt"]

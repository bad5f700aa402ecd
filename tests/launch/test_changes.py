"""What a continued run says about values that are no longer those of its first start."""

from camshaft.cli.launch.changes import since_the_start
from camshaft.recipe import load

RECIPE = """
schema_version: 1
name: small
model: {vocab_size: 258, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
        num_key_value_heads: 1, max_position_embeddings: 64}
tokenizer: {type: byte}
data: {train: {files: [text.jsonl]}, validation_fraction: 0, sequence_length: 32}
batch: {micro_batch_size: 1, global_batch_size: 4}
training: {max_steps: 60}
launch: {processes: 1, device: cpu}
"""
PLUGINS = ("adamw: {lr: 1.0e-6}", "clip: {max_norm: 1}")


def resolved(folder, plugins=PLUGINS, *overrides):
    (folder / "text.jsonl").write_text('{"text": "lorem ipsum"}\n' * 40)
    (folder / "r.yaml").write_text(RECIPE + "plugins:\n" + "".join(f"  {plugin}\n" for plugin in plugins))
    return load(folder / "r.yaml", overrides)


def test_the_same_values_are_no_change_however_they_are_written(tmp_path):
    kept = tmp_path / "resolved.yaml"
    kept.write_text(resolved(tmp_path).dump())
    same = resolved(tmp_path, ("adamw: {lr: 0.000001}", "clip: {max_norm: 1.0}"), "run.dir=x")
    assert since_the_start(kept, same) == []


def test_many_changes_are_counted(tmp_path):
    kept = tmp_path / "resolved.yaml"
    kept.write_text(resolved(tmp_path).dump())
    sizes = ("hidden_size=64", "intermediate_size=32", "num_hidden_layers=3", "num_attention_heads=4")
    others = ("training.max_steps=9", "training.log_every=3", "seed=4", "name=other", "batch.global_batch_size=8")
    now = resolved(tmp_path, PLUGINS, *(f"model.{size}" for size in sizes), *others)
    lines = since_the_start(kept, now)
    assert len(lines) == 9 and lines[-1].startswith("and 1 more changed since the run began")
    assert "changed since the run began: model.hidden_size 32 -> 64" in lines


def test_numbers_and_texts_read_as_they_are_written(tmp_path):
    kept = tmp_path / "resolved.yaml"
    kept.write_text(resolved(tmp_path).dump())
    lines = since_the_start(kept, resolved(tmp_path, PLUGINS, "plugins.adamw.lr=9e-5", "name=other", "seed=7"))
    assert sorted(line.removeprefix("changed since the run began: ").split(" ", 1)[0] for line in lines) == [
        "name",
        "plugins.adamw.lr",
        "seed",
    ]
    assert "changed since the run began: plugins.adamw.lr 1e-06 -> 9e-05" in lines
    assert "changed since the run began: name small -> other" in lines


def test_another_order_of_plugins_is_a_change(tmp_path):
    kept = tmp_path / "resolved.yaml"
    kept.write_text(resolved(tmp_path).dump())
    lines = since_the_start(kept, resolved(tmp_path, PLUGINS[::-1]))
    assert lines == ["changed since the run began: order of plugins adamw, clip -> clip, adamw"]


def test_no_file_or_a_torn_one_says_nothing(tmp_path):
    now = resolved(tmp_path)
    assert since_the_start(tmp_path / "none", now) == []
    for text in ("a: [", "just words", ""):
        (tmp_path / "torn").write_text(text)
        assert since_the_start(tmp_path / "torn", now) == []

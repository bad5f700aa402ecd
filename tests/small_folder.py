"""A folder with a small recipe over a small corpus, as a user of the commands has one; and packages beside it."""

import json

import yaml

MODEL = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
DATA = {
    "train": {"files": ["text.jsonl"]},
    "validation_fraction": 0,
    "sequence_length": 32,
    "cache_dir": "cache",
}
TWO = {"processes": 2, "device": "cpu", "threads_per_rank": 1, "launcher": "torchrun", "group_timeout_s": 60}
ONE = ["launch.processes=1", "plugins.ddp=null"]
"""Changes that make a recipe for ``TWO`` one for a single process."""


def recipe(name="small", model=(), data=(), **sections):
    """The text of a recipe; ``model`` and ``data`` are over those above, other sections are given whole."""
    tree = {
        "schema_version": 1,
        "name": name,
        "model": MODEL | dict(model),
        "tokenizer": {"type": "byte"},
        "data": DATA | dict(data),
        **sections,
    }
    return yaml.safe_dump(tree, sort_keys=False)


def fill(folder, text, documents=60, name="small"):
    """Write a corpus of documents of seven lengths, and the recipe ``text``, whose path is returned."""
    lines = [
        json.dumps({"text": f"document {number}: " + "lorem ipsum " * (number % 7 + 1)}) for number in range(documents)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines))
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def enter(folder, monkeypatch):
    """Work in ``folder``, as nobody's rank."""
    monkeypatch.chdir(folder)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def install(site, name, text):
    """Put a distribution with the one plugin ``name`` into the folder ``site``."""
    information = site / f"{name}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[camshaft.plugins]\n{name} = {name}:Plugin\n")
    (site / f"{name}.py").write_text(text)

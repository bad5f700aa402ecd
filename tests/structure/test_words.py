"""What the core may say: no name of a strategy, of what plugins offer, or of a package that only a plugin uses."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from camshaft import Plugin, host

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "engine" / "camshaft"
NAMES = {path.parent.name.removeprefix("camshaft_") for path in (ROOT / "plugins").glob("*/__init__.py")}

# A name is either a strategy's, which the core may not say, or a plain word that the core needs for itself.
PLAIN_WORDS = {
    "auto": "the word for: decide for me",
    "checkpoint": "what the slots save and load are for",
    "compile": "Python's own word for it, and the start of a phase",
    "clip": "the slot and the program's action CLIP",
    "console": "rich's class for a terminal",
    "jsonl": "a file format that the data reader knows",
    "kernels": "a hook, and what it collects",
    "pipeline": "what an axis of the mesh and the stages of a model are for",
    "precision": "the slot",
    "recompute": "a phase, and a resource",
    "tensor_parallel": "the recipe's key of an axis of the mesh",
    "torch": "what everything is made of",
}
KNOWN = {
    "adam",
    "fsdp",
    "zero1",
    "zero2",
    "zero3",
    "megatron",
    "cosine",
    "nccl_ub",
    "lora",
    "muon",
    "lion",
    "lamb",
    "sgd",
}
"""Strategies of this field, whether or not there is a plugin of that name."""


def declared(plugin: type[Plugin]) -> set[str]:
    """Names that a plugin says are its own: of what its options understand, and of packages that it uses."""
    offers = {name for names in plugin.taken.values() for name in names}
    return {word.replace("-", "_") for word in offers | {*plugin.packages, *plugin.packages.values()}}


def own_plugins() -> dict[str, type[Plugin]]:
    return {name: plugin for name, plugin in host.classes() if name in NAMES}


FORBIDDEN = NAMES.union(KNOWN, *map(declared, own_plugins().values())) - {*PLAIN_WORDS}
# (glob of files, word): why they have to say it. An entry that is not needed any more fails too.
LAUNCHER = "DeepSpeed's launcher starts ranks as torchrun does, whatever plugins there are"
ALLOWED = {
    ("environment.py", "deepspeed"): LAUNCHER,
    ("processes.py", "deepspeed"): LAUNCHER,
    ("recipe/schema.py", "deepspeed"): LAUNCHER,
    ("cli/launch/*.py", "deepspeed"): LAUNCHER,
    ("cli/closing.py", "deepspeed"): LAUNCHER,
    ("cli/__init__.py", "deepspeed"): "doctor looks for the launcher",
    ("cli/doctor.py", "deepspeed"): "doctor looks for the launcher",
    ("cli/inventory.py", "deepspeed"): "env.json lists the version of every dependency, and the launcher's is one",
    ("cli/sweep.py", "wandb"): "the last line says which command takes the file that was written: it is W&B's format",
    ("sweep/agents.py", "wandb"): "the file's head says which command takes it: it is W&B's format",
    ("scaffold/templates/kinds.yaml", "gpipe"): "what is written is a strategy: a schedule, which says whose it varies",
    ("scaffold/templates/schedule.py.in", "gpipe"): "what is written is a strategy: a schedule, with its paper",
    ("scaffold/templates/sharder.py.in", "zero"): "what is written is a strategy: a sharder, with its paper",
    ("scaffold/templates/textbook.py.in", "sgd"): "torch's own class, which the written optimizer is compared with",
}


def words_of(path: Path) -> Iterator[str]:
    """Words of a file of the core. Of modules, comments and docstrings do not count; of templates, everything does."""
    if path.suffix != ".py":
        yield from split(path.read_text(encoding="utf-8"))
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        for value in (getattr(node, field, None) for field in ("id", "attr", "name", "arg", "module", "asname")):
            if isinstance(value, str):
                yield from split(value)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield from split(node.value)


def split(text: str) -> set[str]:
    """Lower-case words of an identifier or a sentence, camel, snake and kebab case taken apart, and the whole too."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)
    wholes = (text.lower(), text.lower().replace("-", "_"))
    return {word for whole in wholes for word in re.findall(r"[a-z0-9_]+", whole)} | {
        *re.findall(r"[a-z0-9]+", spaced.lower())
    }


def files() -> list[Path]:
    return [path for path in sorted(CORE.rglob("*")) if path.suffix in (".py", ".in", ".yaml", ".json")]


def test_the_core_says_no_strategys_name() -> None:
    said = {(path.relative_to(CORE).as_posix(), word) for path in files() for word in words_of(path)}
    said = {(path, word) for path, word in said if word in FORBIDDEN}
    allowed = {
        (path, word) for path, word in said for glob, name in ALLOWED if fnmatchcase(path, glob) and word == name
    }
    assert said - allowed == set(), "ask it of the installed plugins: Plugin.usual, .taken, .packages, .commands"
    unused = [
        (glob, name)
        for glob, name in ALLOWED
        if not any(fnmatchcase(path, glob) and word == name for path, word in said)
    ]
    assert unused == []


def test_what_plugins_declare_is_forbidden() -> None:
    assert {
        "ddp",
        "zero",
        "adamw",
        "gpipe",
        "1f1b",
        "zb_h1",
        "triton",
        "apex",
        "liger",
        "liger_kernel",
        "wandb",
    } <= FORBIDDEN
    assert not {word for plugin in own_plugins().values() for word in declared(plugin)} - FORBIDDEN - {*PLAIN_WORDS}
    assert {*PLAIN_WORDS} <= NAMES.union(*map(declared, own_plugins().values())), "a plain word that nobody's name is"


@pytest.mark.parametrize("text", ["use_ddp", "DdpState", "plugins.ddp: {}", "camshaft_ddp", "a ddp plugin", "ddp"])
def test_a_strategys_name_is_found_however_it_is_written(text: str) -> None:
    assert "ddp" in split(text)


@pytest.mark.parametrize("text", ["flash-attn", "flash_attn", "pip install flash-attn>=2"])
def test_a_packages_name_is_found_however_it_is_written(text: str) -> None:
    assert "flash_attn" in split(text)


def test_each_need_has_one_usual_choice() -> None:
    needs = [need for plugin in own_plugins().values() for need in plugin.usual]
    assert sorted(needs) == sorted(set(needs))
    assert {"optimizer", "data_parallel", "tensor_parallel", "pipeline_parallel", "kernels"} <= {*needs}
    assert host.usual("optimizer") == ("adamw", "{lr: 3e-4}") and host.usual("no such need") is None

"""What the table of broken recipes is made of: a good recipe, and cases that change it.

A case changes sections of a good recipe. Lines marked ``#!`` are where a problem must be reported, one for each entry
of ``expect`` and in the same order; an entry is (key, piece of the message, piece of the fix).
"""

from __future__ import annotations

from dataclasses import dataclass, field

GOOD = {
    "schema_version": "schema_version: 1",
    "name": "name: good",
    "model": "model: {preset: llama-tiny}",
    "tokenizer": "tokenizer: {type: byte}",
    "data": "data: {train: python-docs, sequence_length: 64}",
    "batch": "batch: {micro_batch_size: 2, global_batch_size: 8}",
    "training": "training: {max_steps: 5}",
    "launch": "launch: {processes: 2}",
    "plugins": "plugins:\n  ddp: {}\n  adamw: {lr: 1e-3}",
}


def recipe(**sections: str) -> str:
    """The good recipe with some sections replaced, added or (empty text) left out."""
    return "\n".join(text for text in {**GOOD, **sections}.values() if text) + "\n"


@dataclass(frozen=True)
class Case:
    name: str
    text: str | bytes
    expect: tuple[tuple[str, str, str], ...]
    overrides: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()


def one(name: str, key: str, message: str, fix: str = "", /, *, text: str | bytes = "", **sections: str) -> Case:
    """A case with one problem, in a section that is changed."""
    return Case(name, text or recipe(**sections), ((key, message, fix),))


def override(name: str, text: str, key: str, message: str, fix: str = "") -> Case:
    """A case with one problem, in an override of the good recipe."""
    return Case(name, recipe(), ((key, message, fix),), overrides=(text,))


def data(rest: str) -> str:
    return f"data: {{sequence_length: 64, {rest}}}  #!"


HIDDEN = "Xq7fVerySecretValue"
"""A value that no output may ever show."""

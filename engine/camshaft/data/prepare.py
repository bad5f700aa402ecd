"""From the data section of a recipe to datasets of samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from camshaft.data import cache, sources
from camshaft.data.blend import BlendedDataset
from camshaft.data.build import Progress
from camshaft.data.indexed import IndexedDataset
from camshaft.data.packing import PackedDataset, UnpackedDataset
from camshaft.data.samples import SampleDataset
from camshaft.data.stdlib import Kind
from camshaft.data.stream import TokenStream
from camshaft.data.tokenizer import Tokenizer
from camshaft.errors import RecipeError
from camshaft.recipe.schema import IndexedData, TextData

if TYPE_CHECKING:
    from camshaft.recipe import Resolved


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run reads.

    ``validation`` is None where nothing is held out; ``tokenizer``, ``vocab_size`` and ``token_bytes`` (int32
    [vocab_size], bytes of text that each id stands for) where the data comes tokenised and no tokenizer is
    named. ``fingerprint`` is the sha256 of everything that decides what a sample holds, except the seed.
    """

    train: SampleDataset
    validation: SampleDataset | None
    tokenizer: Tokenizer | None
    vocab_size: int | None
    token_bytes: NDArray[np.int32] | None
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Part:
    """One opened dataset: the key that names it, its share, its tokens, the hash of its content."""

    key: str
    weight: float
    stream: TokenStream
    content: str


def prepare(resolved: Resolved, progress: Progress | None = None) -> Prepared:
    """Open what the recipe names; train the tokenizer and tokenise text where the cache does not hold it yet.

    Every rank may call this at the same time: one builds, the others wait.

    Raises:
        RecipeError: data is missing, damaged, too short, or does not fit the model's vocabulary.
        MachineError: the cache folder cannot be used.
    """
    data = resolved.recipe.data
    tokenizer = sources.given_tokenizer(resolved)
    train, tokenizer = _open(resolved, "data.train", data.train, tokenizer, progress)
    held_out: list[Part] = []
    if data.validation is not None:
        held_out, _ = _open(resolved, "data.validation", data.validation, tokenizer, progress)
    elif data.validation_fraction > 0 and not _whole(resolved, train):
        train, held_out = _split(resolved, train)
    return Prepared(
        train=_dataset(resolved, train),
        validation=_dataset(resolved, held_out, shortest=1) if held_out else None,
        tokenizer=tokenizer,
        vocab_size=None if tokenizer is None else tokenizer.vocab_size,
        token_bytes=None if tokenizer is None else tokenizer.token_bytes(),
        fingerprint=_fingerprint(resolved, [*train, *held_out], tokenizer),
    )


def model_vocabulary(resolved: Resolved) -> int | None:
    """Rows of the model's embedding; None where the model section is not usable (its own check says why)."""
    from camshaft.models.config import resolve

    try:
        return resolve(resolved.recipe.model, sources.vocab_size(resolved)).vocab_size
    except RecipeError:
        return None


def _open(
    resolved: Resolved,
    key: str,
    source: Kind | IndexedData | TextData,
    tokenizer: Tokenizer | None,
    progress: Progress | None,
) -> tuple[list[Part], Tokenizer | None]:
    vocabulary = model_vocabulary(resolved)
    if isinstance(source, IndexedData):
        parts = []
        for number, part in enumerate(source.blend):
            part_key = f"{key}.blend.{number}"
            with sources.blame(resolved, f"{part_key}.prefix"):
                data = IndexedDataset(sources.locate(resolved, part.prefix))
                stream = TokenStream(data, vocabulary, None if tokenizer is None else tokenizer.eod_id)
            parts.append(Part(part_key, part.weight, stream, data.fingerprint()))
        return parts, tokenizer
    root = sources.cache_folder(resolved)
    with sources.blame(resolved, key):
        entry, tokenizer = sources.tokenised(
            sources.corpus_of(resolved, source, root),
            tokenizer,
            resolved.recipe.tokenizer.vocab_size or sources.DEFAULT_VOCABULARY,
            root,
            progress,
        )
        stream = TokenStream(IndexedDataset(entry / "tokens"), vocabulary, tokenizer.eod_id)
    return [Part(key, 1.0, stream, cache.content_key(entry))], tokenizer


def _whole(resolved: Resolved, parts: Sequence[Part]) -> bool:
    """Whether to leave the data whole: it is a single document, and nobody asked for a validation set."""
    data = resolved.tree.get("data")
    asked = isinstance(data, dict) and "validation_fraction" in data
    single = len(parts) == 1 and parts[0].stream.documents == 1
    return single and not asked and resolved.recipe.training.eval_every is None


def _split(resolved: Resolved, parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    fraction = resolved.recipe.data.validation_fraction
    train, held_out = [], []
    for part in parts:
        if part.stream.documents < 2:
            raise RecipeError(
                resolved.problem(
                    part.key,
                    f"{part.stream.data.prefix} holds one document, which data.validation_fraction={fraction:g}"
                    " cannot split",
                    "set data.validation_fraction=0, or name a validation set in data.validation",
                )
            )
        head, tail = part.stream.split(fraction)
        train.append(Part(part.key, part.weight, head, part.content))
        held_out.append(Part(part.key, part.weight, tail, part.content))
    return train, held_out


def _dataset(resolved: Resolved, parts: Sequence[Part], shortest: int | None = None) -> SampleDataset:
    """The samples of ``parts``; each must hold ``shortest`` tokens, by default one sample."""
    data, seed = resolved.recipe.data, resolved.recipe.seed
    needed = (data.sequence_length if data.pack else 1) if shortest is None else shortest
    made: list[SampleDataset] = []
    for part in parts:
        if len(part.stream) < max(needed, 2):
            raise RecipeError(
                resolved.problem(
                    part.key,
                    f"holds {len(part.stream)} token(s) in {part.stream.documents} document(s), and one sample"
                    f" takes {max(needed, 2)}",
                    "name more text, or lower data.sequence_length",
                )
            )
        made.append(
            PackedDataset(part.stream, data.sequence_length, seed, document_mask=data.document_mask)
            if data.pack
            else UnpackedDataset(part.stream, data.sequence_length)
        )
    if len(made) == 1:
        return made[0]
    try:
        return BlendedDataset(made, [part.weight for part in parts], seed)
    except ValueError as error:
        key = f"{parts[error.args[0]].key}.weight"
        raise RecipeError(
            resolved.problem(key, "is too small for the part to ever be read", "raise it, or remove the part")
        ) from error


def _fingerprint(resolved: Resolved, parts: Sequence[Part], tokenizer: Tokenizer | None) -> str:
    data = resolved.recipe.data
    text = json.dumps(
        {
            "sequence_length": data.sequence_length,
            "pack": data.pack,
            "document_mask": data.document_mask,
            "parts": [
                (part.weight, part.content, part.stream.first, part.stream.stop, part.stream.append) for part in parts
            ],
            "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        }
    )
    return hashlib.sha256(text.encode()).hexdigest()

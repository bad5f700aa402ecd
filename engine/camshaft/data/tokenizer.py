"""Text to token ids and back: trained byte-level BPE, single bytes, or a local ``tokenizer.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from camshaft.data.samples import Ids
from camshaft.errors import Problem, RecipeError

EOD = "<|endoftext|>"
EOD_NAMES = (EOD, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")


class Tokenizer(Protocol):
    """What the data pipeline needs of a tokenizer.

    ``vocab_size``: one above the highest id; ``eod_id``: the id that ends a document; ``fingerprint``:
    sha256 of all that decides the ids.
    """

    vocab_size: int
    eod_id: int
    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, int64, without eod. Names of special tokens in the text are ordinary text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        ...

    def token_bytes(self) -> NDArray[np.int32] | None:
        """[vocab_size] How many bytes of UTF-8 each id stands for, 0 for special ones; None where that is
        unknown.

        The sum over a text's ids is the number of its bytes, so loss / sum / ln 2 is bits per byte.
        """
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""

    vocab_size = 257
    eod_id = 256
    fingerprint = hashlib.sha256(b"camshaft byte tokenizer 1").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See ``Tokenizer``."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer``."""
        return bytes(value for value in ids if value < self.eod_id).decode(errors="replace")

    def token_bytes(self) -> NDArray[np.int32]:
        """See ``Tokenizer``."""
        return np.array([1] * 256 + [0], np.int32)


class FileTokenizer:
    """A ``tokenizer.json`` of the ``tokenizers`` library. Adds no special tokens of its own to a text.

    Args:
        path: the file.
        vocab_size: at least so many ids, for a trained vocabulary that came out smaller than asked for.

    Raises:
        RecipeError: the file is missing or is no tokenizer, or has no token that ends a document.
    """

    def __init__(self, path: Path, vocab_size: int = 0) -> None:
        from tokenizers import Tokenizer as Implementation

        try:
            content = path.read_bytes()
            self._json: dict[str, Any] = json.loads(content)
            self._implementation = Implementation.from_str(content.decode())
        except OSError as error:
            fix = "give the path of a tokenizer.json"
            raise RecipeError(Problem(f"cannot be read: {error.strerror}", file=str(path), fix=fix)) from error
        except Exception as error:  # the library raises bare Exception for a file that it cannot parse
            raise RecipeError(Problem(f"is no tokenizer.json: {error}", file=str(path))) from error
        self._implementation.encode_special_tokens = True
        self._implementation.no_padding()
        self._implementation.no_truncation()
        self._vocabulary: dict[str, int] = self._implementation.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab_size, 1 + max(self._vocabulary.values(), default=-1))
        self.eod_id = self._find_eod(path)
        self.fingerprint = hashlib.sha256(content + b"%d" % self.vocab_size).hexdigest()

    def _find_eod(self, path: Path) -> int:
        for name in EOD_NAMES:
            if name in self._vocabulary:
                return self._vocabulary[name]
        raise RecipeError(
            Problem(
                f"has none of the tokens {', '.join(EOD_NAMES)} that end a document",
                file=str(path),
                fix=f"add '{EOD}' to the tokenizer's added_tokens",
            )
        )

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See ``Tokenizer``."""
        found = self._implementation.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(item.ids, np.int64) for item in found]

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer``."""
        text: str = self._implementation.decode(list(ids), skip_special_tokens=True)
        return text

    def token_bytes(self) -> NDArray[np.int32] | None:
        """See ``Tokenizer``. Known for byte-level BPE (exact, unless the file normalises the text), and for
        BPE with byte fallback, where ``▁`` stands for a space (the space that some put before a text is
        counted too).
        """
        kinds = _kinds(self._json.get("pre_tokenizer")) | _kinds(self._json.get("decoder"))
        kinds |= _kinds(self._json.get("normalizer"))
        if "ByteLevel" in kinds:
            length: Callable[[str], int] = len  # one character of a byte-level token is one byte
        elif "ByteFallback" in kinds or "Metaspace" in kinds:
            length = _sentencepiece_bytes
        else:
            return None
        counts = np.zeros(self.vocab_size, np.int32)
        for token, place in self._vocabulary.items():
            counts[place] = length(token)
        for added in self._json.get("added_tokens") or ():
            counts[added["id"]] = 0 if added.get("special") else len(added["content"].encode())
        return counts


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Train byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) and return its ``tokenizer.json``.

    Deterministic. A corpus without enough repetition gives fewer than ``vocab_size`` tokens.
    """
    from tokenizers import Tokenizer as Implementation
    from tokenizers import decoders, models, pre_tokenizers, trainers

    implementation = Implementation(models.BPE())
    implementation.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    implementation.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    implementation.train_from_iterator(texts, trainer)
    text: str = implementation.to_str()
    return text


def _kinds(node: Any) -> set[str]:
    """Every ``type`` in a section of a tokenizer.json, which nests sequences."""
    if isinstance(node, dict):
        return {str(node.get("type"))}.union(*map(_kinds, node.values()))
    if isinstance(node, list):
        return set().union(*map(_kinds, node))
    return set()


def _sentencepiece_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("▁", " ").encode())

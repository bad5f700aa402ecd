"""How many tokens a fused loss takes at a time: for the forms that do, and for ``camshaft plan``. Without torch."""

from __future__ import annotations

CHUNK_BYTES = 1 << 30
"""Logits at a time in Triton's form. The weight's gradient is read and written once a chunk: with chunks of a few
thousand tokens that is little beside the products, with few hundreds it is most of the time."""

ROUND = 128
"""Its chunks are multiples of so many tokens, which matrix products like."""

ALIGNED = 16
"""Elements of which the distance between its rows of logits is a multiple."""

FEWEST = 256
"""Tokens of a chunk of torch's form at least: fewer leave the processor waiting for memory."""


def chunk_tokens(tokens: int, vocabulary: int, itemsize: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Tokens of a chunk of Triton's form: as even as multiples of ``ROUND`` allow, with logits of ``chunk_bytes`` if
    those do.
    """
    most = max(chunk_bytes // (vocabulary * itemsize) // ROUND, 1) * ROUND
    even = -(-tokens // max(-(-tokens // most), 1))
    return min(-(-even // ROUND) * ROUND, tokens)


def chunk_size(tokens: int, vocabulary: int, width: int) -> int:
    """Tokens of a chunk of torch's form: its logits have about as many elements as all hidden states."""
    return min(max(FEWEST, -(-tokens * width // vocabulary)), max(tokens, 1))


def row_elements(vocabulary: int) -> int:
    """Elements from one row of Triton's logits to the next."""
    return -(-vocabulary // ALIGNED) * ALIGNED

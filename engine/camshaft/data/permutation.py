"""Shuffling without a table: a keyed permutation of 0..n-1 that is evaluated one value at a time.

A balanced Feistel network over the smallest domain of 4^k values that holds n is a bijection whatever its
round function is (Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom
functions", 1988). Values that fall outside 0..n-1 are encrypted again until they fall inside ("cycle
walking": Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), which keeps it a bijection of
0..n-1; the domain is below 4 n, so fewer than four turns are expected. Memory O(1), no start-up cost, any
place of any epoch at once.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_WORD = 0xFFFF_FFFF_FFFF_FFFF


def number(*key: int | str) -> int:
    """A 64-bit number that depends on ``key`` only, equal on every machine."""
    text = "\x00".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Permutation:
    """A bijection of 0..size-1, chosen by ``key``."""

    def __init__(self, size: int, *key: int | str) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one value, not {size}")
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._keys = tuple(number(*key, "round", turn) for turn in range(_ROUNDS))

    def __call__(self, value: int) -> int:
        """Where ``value`` goes. Raises IndexError outside 0..size-1."""
        if not 0 <= value < self.size:
            raise IndexError(f"{value} is not in 0..{self.size - 1}")
        while True:
            value = self._encrypt(value)
            if value < self.size:
                return value

    def _encrypt(self, value: int) -> int:
        half, mask = self._half, self._mask
        left, right = value >> half, value & mask
        for key in self._keys:
            # One round of SplitMix64's finaliser (Steele, Lea, Flood 2014) mixes the half with the round's
            # key.
            mixed = ((right ^ key) * 0xBF58476D1CE4E5B9) & _WORD
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _WORD
            left, right = right, left ^ ((mixed >> 31) & mask)
        return (left << half) | right


def shuffled(size: int, *key: int | str) -> NDArray[np.int64]:
    """All of 0..size-1 in an order chosen by ``key``: a sort by hash, equal with every numpy."""
    with np.errstate(over="ignore"):
        mixed = np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(number(*key))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
    return np.argsort(mixed, kind="stable")

"""Bytes of activations by the literature's formula, to be compared with what is counted. No torch.

Korthikanti et al. (arXiv:2205.05198), sections 4.1 and 5: L layers, b sequences of s tokens, h features, a heads; two
bytes an element, one byte an element of a dropout's mask.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpt:
    """A transformer as in the paper, and its microbatch."""

    layers: int
    sequence: int
    batch: int
    hidden: int
    heads: int

    @property
    def _unit(self) -> int:
        return self.layers * self.sequence * self.batch * self.hidden

    @property
    def scores(self) -> float:
        """Bytes of softmax, its dropout and that dropout's mask: the part 5 a s / h."""
        return self._unit * 5 * self.heads * self.sequence / self.hidden

    @property
    def everything(self) -> float:
        """L s b h (34 + 5 a s / h): without recomputation."""
        return self._unit * 34 + self.scores

    @property
    def selective(self) -> float:
        """34 L s b h: attention's core is made again."""
        return self._unit * 34.0

    @property
    def full(self) -> float:
        """2 L s b h: each layer's input."""
        return self._unit * 2.0


GPT3_175B = Gpt(layers=96, sequence=2048, batch=1, hidden=12288, heads=96)
"""Brown et al. (arXiv:2005.14165), table 2.1."""

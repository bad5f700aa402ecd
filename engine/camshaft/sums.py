"""Sums over whole parameters where ranks hold only pieces of them: what a trust ratio needs (``parameter_sums``).

Works under any owner of storage whose pieces are disjoint along ``parts.channel``, also where an axis divides the
parameters themselves: then what several ranks hold counts for each of them as its share. Without any nothing travels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from camshaft.errors import Problem, RecipeError
from camshaft.parts import Part, Parts

_KEPT = 16
"""Sets of parts whose columns are kept."""


class ParameterSums:
    """Sums of squares over whole parameters: one all-reduce, whatever the number of parameters.

    ``names`` are those of all parameters, in one order on all ranks; ``device`` is the parts'. Collective: all ranks of
    ``parts.holders`` must construct it, and call it equally often. Traffic of a call: one fp64 number for each name and
    summand.

    Raises:
        RecipeError: parameters are laid out in a way that pieces cannot express, or pieces are not disjoint.
    """

    def __init__(self, parts: Parts, names: Iterable[str], device: torch.device) -> None:
        refuse_dtensors(parts)
        self._parts, self._device = parts, device
        self._columns = {name: column for column, name in enumerate(names)}
        self._version = parts.version
        self._known: dict[tuple[Part, ...], tuple[Tensor, Tensor | None]] = {}
        self._check_cover()

    @torch.no_grad()
    def __call__(self, *values: Mapping[Part, Tensor]) -> Tensor:
        """Sums of squares, fp64 [len(values), number of names], equal in every bit on all ranks.

        Each mapping has tensors laid out as the parts' own; what it leaves out counts as 0. Pieces are summed in fp32,
        or wider if they are.
        """
        sums = self._zeros(len(values))
        for row, mapping in zip(sums, values, strict=True):
            slices = [flat for part, value in mapping.items() for _, flat in part.slices(value)]
            if slices:
                wide = torch.promote_types(slices[0].dtype, torch.float32)
                norms = torch.stack(torch._foreach_norm(slices, 2.0, dtype=wide))
                columns, shares = self._look_up(mapping)
                squares = norms.double().square_()
                row.index_add_(0, columns, squares if shares is None else squares.mul_(shares))
        self._add_up(sums, "step")
        return sums

    def columns(self, parts: Iterable[Part]) -> Tensor:
        """Column of each piece of ``parts``, in their order: int64, on the device, and not to be changed."""
        return self._look_up(parts)[0]

    def _look_up(self, parts: Iterable[Part]) -> tuple[Tensor, Tensor | None]:
        """Column of each piece, and 1 / copies of it where any has copies; kept, so that no step waits for a copy."""
        if self._version != self._parts.version:
            self._version = self._parts.version
            self._known.clear()
        key = tuple(parts)
        if key not in self._known:
            if len(self._known) == _KEPT:  # which parameters have gradients may differ from step to step
                self._known.clear()
            pieces = [piece for part in key for piece in part.pieces]
            columns = [self._columns[piece.name] for piece in pieces]
            shares = [1 / piece.copies for piece in pieces]
            self._known[key] = (
                torch.tensor(columns, dtype=torch.int64, device=self._device),
                torch.tensor(shares, dtype=torch.float64, device=self._device) if min(shares, default=1) < 1 else None,
            )
        return self._known[key]

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, len(self._columns), dtype=torch.float64, device=self._device)

    def _add_up(self, sums: Tensor, hook: str) -> None:
        holders = self._parts.holders
        if holders is not None and holders.size > 1:
            holders.all_reduce(sums, hook).wait()

    def _check_cover(self) -> None:
        """An element that two ranks count, or none, would make every sum wrong and no step fail."""
        pieces = [piece for part in self._parts for piece in part.pieces]
        counts = self._zeros(1)
        lengths = torch.tensor([piece.length / piece.copies for piece in pieces], dtype=torch.float64)
        counts[0].index_add_(0, self.columns(self._parts), lengths.to(self._device))
        self._add_up(counts, "optimizer")
        found = counts[0].tolist()
        self.sizes = counts[0].round_()
        """Elements of each whole parameter, by column, fp64 on the device."""
        for piece in pieces:
            held, size = found[self._columns[piece.name]], prod(piece.whole_shape)
            if abs(held - size) > 0.5 / piece.copies:  # thirds do not add up to ones
                raise not_disjoint(piece.name, f"ranks hold {held:.0f} elements of its {size}")


def not_disjoint(name: str, reason: str) -> RecipeError:
    """The fault of an owner of storage that divides a parameter otherwise than it says."""
    return RecipeError(
        Problem(
            f"parameter '{name}' is not divided into disjoint pieces: {reason}",
            fix="report it to the plugin that lays out the optimizer's part, and take an optimizer that works element "
            "by element until then",
        )
    )


def refuse_dtensors(parts: Parts) -> None:
    """Pieces are ranges of a flattened parameter; shards of a DTensor are not.

    Raises:
        RecipeError: a part is a DTensor.
    """
    for part in parts:
        if hasattr(part.tensor, "placements"):
            raise RecipeError(
                Problem(
                    f"the optimizer needs whole parameters, and '{part.pieces[0].name}' is a DTensor, of which it sees "
                    "a shard",
                    fix="take an optimizer that works element by element, or storage that divides flat buffers",
                )
            )

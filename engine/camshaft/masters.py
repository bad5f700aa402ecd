"""Master weights for narrow parameters (Micikevicius et al., arXiv:1710.03740), where no owner of storage keeps them.

Each parameter that trains has a copy in the policy's master dtype, which the optimizer updates; the parameter is that
copy rounded. Memory: one master value a parameter, and its gradient in the master dtype from ``reduce`` to ``release``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import Module, Parameter

from camshaft.parts import Part, Parts, Piece


def whole_parts(model: Module, roles: Mapping[str, str]) -> Parts:
    """Each parameter that trains as a part of its own."""
    return Parts(
        Part(parameter, roles[name], (Piece(name, tuple(parameter.shape), 0, 0, parameter.numel()),))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


class Masters:
    """Copies in the master dtype of a model that holds master values now, and that is narrowed to ``param``."""

    def __init__(self, model: Module, roles: Mapping[str, str], param: torch.dtype) -> None:
        live = whole_parts(model, roles)
        self._parameters = live.tensors
        self._copies = [Parameter(parameter.data) for parameter in self._parameters]
        for parameter in model.parameters():
            parameter.data = parameter.data.to(param)
        self.parts = Parts(Part(copy, part.role, part.pieces) for copy, part in zip(self._copies, live, strict=True))

    def take_gradients(self) -> None:
        """Widen the summed gradients."""
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            copy.grad = None if parameter.grad is None else parameter.grad.to(copy.dtype)

    @torch.no_grad()
    def give_weights(self) -> None:
        """Round the updated masters into the parameters."""
        torch._foreach_copy_([*self._parameters], [*self._copies])

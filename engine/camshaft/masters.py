"""Master weights for narrow parameters (Micikevicius et al., arXiv:1710.03740), where no owner of storage keeps them.

Each parameter that trains has a copy in the policy's master dtype, which the optimizer updates; the parameter is that
copy rounded. Memory: one master value a parameter, and its gradient in the master dtype from ``reduce`` to ``release``
(no second one where gradients are kept in that dtype anyway).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from camshaft.parts import Part, Parts, Piece

if TYPE_CHECKING:
    from camshaft.state import Policy


def whole_parts(model: Module, roles: Mapping[str, str]) -> Parts:
    """Each parameter that trains as a part of its own."""
    return Parts(
        Part(parameter, roles[name], (Piece(name, tuple(parameter.shape), 0, 0, parameter.numel()),))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


class Masters:
    """Copies in the master dtype of a model that holds master values now, and that is narrowed to ``policy.param``.

    Parameters that do not train are rounded and have no copy. Gradients are added up and kept in ``policy.kept``:
    where that is ``param``, the sum of a window's microbatches is rounded to it after each of them.
    """

    def __init__(self, model: Module, roles: Mapping[str, str], policy: Policy) -> None:
        live = whole_parts(model, roles)
        self._parameters = live.tensors
        self._copies = [Parameter(parameter.data.to(policy.master)) for parameter in self._parameters]
        for parameter in model.parameters():
            _round(parameter, policy)
        self.parts = Parts(Part(copy, part.role, part.pieces) for copy, part in zip(self._copies, live, strict=True))

    def take_gradients(self) -> None:
        """Widen the summed gradients; those that are kept in the master dtype are handed over, not copied."""
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            copy.grad = None if parameter.grad is None else parameter.grad.to(copy.dtype)

    def drop_gradients(self) -> None:
        """Let go of the widened gradients; the parameters' own belong to the owner of ``release``."""
        for copy in self._copies:
            copy.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        """Round the masters into the parameters: after a step, or after masters were loaded."""
        torch._foreach_copy_(_locals(self._parameters), _locals(self._copies))


def _round(parameter: Parameter, policy: Policy) -> None:
    """Give a parameter its narrow values; the object stays, and with it ties, attributes and references."""
    narrow = parameter.data.to(policy.param)
    if hasattr(parameter, "to_local"):  # a DTensor keeps its shard in itself, which `data` does not reach
        fresh = Parameter(narrow, requires_grad=parameter.requires_grad)
        fresh.__dict__.update(parameter.__dict__)
        torch.utils.swap_tensors(parameter, fresh)  # type: ignore[no-untyped-call]
    else:
        parameter.data = narrow
    if parameter.requires_grad:
        parameter.grad_dtype = policy.kept


def _locals(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's shards of DTensors, told by their method; other tensors as they are."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]

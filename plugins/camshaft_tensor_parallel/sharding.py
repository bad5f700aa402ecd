"""A model divided: boxes of its parameters, what its modules exchange, and which gradients are partial."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from camshaft.boxes import Box
from camshaft.errors import RecipeError
from camshaft_tensor_parallel.agreement import tied_otherwise
from camshaft_tensor_parallel.copies import Copies, sharers
from camshaft_tensor_parallel.division import box
from camshaft_tensor_parallel.drawing import Drawing
from camshaft_tensor_parallel.fitting import check, read_plan
from camshaft_tensor_parallel.install import Installed, narrow_parameter
from camshaft_tensor_parallel.line import Line
from camshaft_tensor_parallel.placing import places
from camshaft_tensor_parallel.shares import Shares

if TYPE_CHECKING:
    from camshaft.state import World


class Sharding:
    """What ``shard_compute`` does to ``model``, which is on meta."""

    def __init__(self, options: Any, world: World, model: nn.Module, plugin: str) -> None:
        """Divide it.

        Raises:
            RecipeError: it has no plan, the plan does not fit it, or its sizes do not divide.
        """
        channel = world.mesh.channel(plugin, "tp")
        assert channel is not None, "plan refuses one rank"
        self.plan = read_plan(model, options.plan, plugin)
        self.line = Line(channel, sequence=options.sequence_parallel)
        check(self.plan, model, world, plugin, sequence=self.line.sequence)
        styles = {name: (module, self.plan.style(name)) for name, module in model.named_modules()}
        self._installed = Installed(self.line, overlap=options.overlap)
        self._pieces = world.pieces
        self._drawing = Drawing(Shares(self.line), world.device, f"plugins.{plugin}")
        for name, place in places(self.plan, model, self.line).items():
            self._installed.draw(styles[name][0], place, self._drawing)
        self._installed.install({name: (module, style) for name, (module, style) in styles.items() if style})
        self.partial: dict[str, int] = {}
        """Names of parameters whose gradients are partial, and how many ranks have the same copy."""
        self._divide(world, model)

    def copies(self, world: World, model: nn.Module, plugin: str) -> tuple[Copies, ...]:
        """Sums of partial gradients, one for each number of ranks that have the same copy. All ranks call this."""
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        return tuple(
            Copies(
                world.parts,
                {name: shapes[name] for name, copies in self.partial.items() if copies == count},
                sharers(world, count, plugin),
            )
            for count in sorted(set(self.partial.values()))
        )

    def end_window(self) -> None:
        """Regions may do from now on what they learned, and draws that nobody understands were refused by now."""
        if self._drawing.watching:
            self._drawing.end_window(self._pieces)
        for each in self._installed.ahead:
            each.end_window()

    def close(self) -> None:
        """Undo what was put on modules."""
        self._installed.close()

    def _divide(self, world: World, model: nn.Module) -> None:
        known: dict[int, tuple[str, Box]] = {}
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            first, before = known.get(id(parameter), (name, None))
            shape = tuple(parameter.shape) if before is None else before.shape
            found, local = box(name, shape, self.plan, self.line.size, self.line.rank)
            if before is not None:
                _check_tie(first, name, before == found, self.plan.key)
                continue
            known[id(parameter)], world.boxes[name] = (name, found), found
            narrow_parameter(parameter, local)
            if parameter.requires_grad and found.copies > 1 and self._is_partial(name):
                self.partial[name] = found.copies

    def _is_partial(self, name: str) -> bool:
        """Whether each rank computes a part of the gradient: from its tokens, or from its heads."""
        style = self.plan.style(name.rpartition(".")[0])
        return self.line.sequence or (style is not None and style.kind in ("inner", "shared"))


def _check_tie(first: str, name: str, same: bool, key: str) -> None:
    if not same:
        raise RecipeError(tied_otherwise(first, name, key))

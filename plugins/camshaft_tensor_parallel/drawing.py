"""Random numbers that a user's module draws with functions of torch, where ranks have parts of what one process has.

Forwards of such modules run in a function mode. It lets dropout and its like draw for the whole tensor and takes this
rank's part, and refuses what it cannot do so. In the first window every such module runs so, and all other functions
are watched too: one that moves a generator is refused before any weight has changed. Behind it only modules stay in the
mode that called a function that draws. What is not seen: kernels that draw without telling torch, and noise that a
function draws again which a checkpoint of the user's own holds (of a dropout there torch sees it, and refuses).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from camshaft.errors import Problem, RecipeError
from camshaft_tensor_parallel.dropout import masked
from camshaft_tensor_parallel.shares import Place, Share, Shares, Unclear

Function = Callable[..., Any]
Handler = Callable[["Drawing", Function, tuple[Any, ...], dict[str, Any]], Any]


class Drawing:
    """Makes forwards for the modules of one model. ``key``: of the plugin, which problems name."""

    def __init__(self, shares: Shares, device: torch.device, key: str) -> None:
        self.shares, self.key, self._device = shares, key, device
        self.watching = True
        """Whether the first window is still under way."""
        self._seen: set[str] = set()
        self._visits: list[tuple[Place, list[Function]]] = []
        self._apart = False
        """Whether what is drawn now is drawn by one of the forwards of this class."""
        self._mode = _Mode(self)

    @property
    def place(self) -> Place:
        """Of the module that runs."""
        return self._visits[-1][0]

    @property
    def divided(self) -> bool:
        """Whether tensors of the module that runs may be parts."""
        return self.place.inside or self.shares.line.sequence

    def around(self, place: Place, inner: Function) -> Function:
        """A forward in the mode, as long as there is a reason for it."""

        def forward(*arguments: Any, **named: Any) -> Any:
            if not (self.watching or self._visits or place.name in self._seen):
                return inner(*arguments, **named)
            outermost = not self._visits
            self._visits.append((place, []))
            try:
                if not outermost:
                    return inner(*arguments, **named)
                with self._mode:
                    return inner(*arguments, **named)
            finally:
                self._visits.pop()

        return forward

    def dropout(self, module: Any, place: Place) -> Function:
        """A forward for ``torch.nn.Dropout`` itself, which needs no mode."""
        plain = module.forward

        def forward(hidden: Tensor) -> Tensor:
            if not (module.training and module.p > 0.0):
                return plain(hidden)  # type: ignore[no-any-return]
            share = self._share(place, (), F.dropout, hidden)
            if not self._visits:
                return self._dropped(module, plain, hidden, share)
            self._apart = True
            try:
                return self._dropped(module, plain, hidden, share)
            finally:
                self._apart = False

        return forward

    def _dropped(self, module: Any, plain: Function, hidden: Tensor, share: Share) -> Tensor:
        made: Tensor = plain(hidden) if share is None else masked(F.dropout, hidden, module.p, share, module.inplace)
        return made

    def end_window(self, pieces: Iterable[str]) -> None:
        """The first window is over. ``pieces``: names of modules that are compiled from now on.

        Raises:
            RecipeError: one of them would be traced in the mode, which no compiler follows reliably.
        """
        self.watching = False
        for name, piece in itertools.product(sorted(self._seen), sorted(pieces)):
            if f"{name}.".startswith(f"{piece}.") or not name or piece.startswith(f"{name}."):
                raise RecipeError(
                    Problem(
                        f"{_told(name)} draws random numbers with functions where ranks have parts of what one process "
                        f"has, and '{piece}' is compiled: a compiler does not follow what makes them right",
                        key=self.key,
                        fix=f"draw them with a torch.nn.Dropout that {self.key}.plan knows, or do not compile that",
                    )
                )

    def noticed(self) -> None:
        """The module that runs may draw: it stays in the mode."""
        if self.divided:
            self._seen.add(self.place.name)

    def call(self, function: Function, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What the mode does for one function."""
        if self._apart:
            return function(*arguments, **named)
        handler = HANDLERS.get(function)
        if handler is not None:
            return handler(self, function, arguments, named)
        if not (self.watching and self.divided):
            return function(*arguments, **named)
        before = self._states()
        made = function(*arguments, **named)
        if not all(torch.equal(was, now) for was, now in zip(before, self._states(), strict=True)):
            shape = made.shape if isinstance(made, Tensor) else (-1,)
            if self.share_of_shape(function, tuple(shape)) is not None:
                raise self.refusal(function, "nobody knows how to draw it for the whole")
        return made

    def share(self, function: Function, own: Tensor) -> Share:
        """Which part ``own`` is.

        Raises:
            RecipeError: nobody can tell.
        """
        place, calls = self._visits[-1]
        calls.append(function)
        return self._share(place, (len(calls), function), function, own)

    def _share(self, place: Place, call: tuple[object, ...], function: Function, own: Tensor) -> Share:
        try:
            return self.shares.of(own, place, call)
        except Unclear as error:
            raise self.refusal(function, f"{list(own.shape)}: {error}", place) from None

    def share_of_shape(self, function: Function, shape: tuple[int, ...]) -> Share:
        """The same of memory without values."""
        try:
            return self.shares.of_shape(shape, self.place)
        except Unclear as error:
            raise self.refusal(function, f"{list(shape)}: {error}") from None

    def refusal(self, function: Function, why: str, place: Place | None = None) -> RecipeError:
        """What to tell of the module at ``place``, or of the one that runs."""
        place = place or self.place
        name, sequence = place.name, self.shares.line.sequence and not place.inside
        off = f", or set {self.key}.sequence_parallel=false" if sequence else ""
        return RecipeError(
            Problem(
                f"{_told(name)} draws random numbers with {resolve_name(function)}, where ranks have parts of what one "
                f"process has ({why}): they would not be those of one process",
                key=self.key,
                fix=f"draw them with a torch.nn.Dropout that {self.key}.plan knows (inner for a rank's own features or "
                f"heads, outer for what is between regions), or as noise like a tensor, with randn_like{off}",
            )
        )

    def _states(self) -> list[Tensor]:
        """Of the generators that a forward may draw from; reading them waits for nothing."""
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states


def _told(name: str) -> str:
    return f"module '{name}'" if name else "the model itself"


class _Mode(TorchFunctionMode):
    def __init__(self, drawing: Drawing) -> None:
        super().__init__()
        self._drawing = drawing

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._drawing.call(func, args, kwargs or {})


def _settings(
    function: Function, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Tensor, float, bool, bool]:
    """(input, rate, whether it drops, whether in place) of a dropout's call."""
    if function in BUILT_IN:
        given = dict(zip(("input", "p", "train"), arguments, strict=False)) | named
        return given["input"], given["p"], given["train"], False
    bound = inspect.signature(function).bind(*arguments, **named)
    bound.apply_defaults()
    given = bound.arguments
    return given["input"], given["p"], given["training"], given["inplace"]


def _drop(drawing: Drawing, function: Function, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """A mask that multiplies."""
    drawing.noticed()
    own, rate, drops, inplace = _settings(function, arguments, named)
    share = drawing.share(function, own) if drops and rate > 0 else None
    if share is None:
        return function(*arguments, **named)
    return masked(function, own, rate, share, inplace)


def _drop_otherwise(drawing: Drawing, function: Function, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Not a product: done on the whole, with zeros for what other ranks have."""
    drawing.noticed()
    own, rate, drops, inplace = _settings(function, arguments, named)
    share = drawing.share(function, own) if drops and rate > 0 else None
    if share is None:
        return function(*arguments, **named)
    made = share.take(function(share.put(own), rate, True))
    return own.copy_(made) if inplace else made


def _like(drawing: Drawing, function: Function, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """A tensor as large as another one, or drawn with its values as probabilities."""
    drawing.noticed()
    own, *rest = arguments or (named.pop("input"),)
    share = drawing.share(function, own)
    if share is None:
        return function(own, *rest, **named)
    if named.get("out") is not None:
        raise drawing.refusal(function, "into memory of its own")
    return share.take(function(share.put(own), *rest, **named))


def _fill(drawing: Drawing, function: Function, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """In place, into memory whose values say nothing."""
    drawing.noticed()
    own, *rest = arguments
    share = drawing.share_of_shape(function, tuple(own.shape))
    if share is None:
        return function(own, *rest, **named)
    if any(isinstance(each, Tensor) and each.ndim for each in (*rest, *named.values())):
        raise drawing.refusal(function, "with a value for each element")
    return own.copy_(share.take(function(share.blank(own, 0.0), *rest, **named)))


def _attend(drawing: Drawing, function: Function, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Kernels number their masks in ways of their own, which no part can follow."""
    rate = named.get("dropout_p", arguments[4] if len(arguments) > 4 else None)
    if rate is not None:
        drawing.noticed()
    if rate and drawing.divided:
        raise drawing.refusal(function, f"dropout_p={rate}, whose mask is the kernel's")
    return function(*arguments, **named)


BUILT_IN = (torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout)
HANDLERS: dict[Function, Handler] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout), _drop),
    **dict.fromkeys(
        (F.alpha_dropout, F.feature_alpha_dropout, torch.alpha_dropout, torch.feature_alpha_dropout), _drop_otherwise
    ),
    **dict.fromkeys((torch.rand_like, torch.randn_like, torch.randint_like, torch.bernoulli, Tensor.bernoulli), _like),
    **dict.fromkeys(
        (
            *(Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.exponential_, Tensor.geometric_),
            *(Tensor.log_normal_, Tensor.cauchy_, Tensor.random_),
        ),
        _fill,
    ),
    F.scaled_dot_product_attention: _attend,
}

QUIET = ("camshaft.models.", "torch.nn.")
"""Packages whose modules draw nothing, but for those of ``LOUD``."""
LOUD = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU),
    *(nn.RNNBase, nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)


def may_draw(module: nn.Module) -> bool:
    """Whether nobody knows that the forward of a module draws nothing by itself."""
    writer = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    if writer is nn.Module:  # a list, which has none
        return False
    return not writer.__module__.startswith(QUIET) or isinstance(module, LOUD)

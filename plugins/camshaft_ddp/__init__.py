"""Data parallel by bucketed all-reduce, overlapped with backward (Li et al., arXiv:2006.15704).

Parameters, gradients and optimizer state are replicated on ``dp``. Gradients are views into flat buckets, filled in
the order in which backward produces them; each bucket is summed over ``dp`` asynchronously while backward goes on,
once a window, whatever the accumulation. The engine has divided the loss by the global weight before backward, so
the sum is final: nothing is averaged here. A bucket is of one pipeline stage: that of a stage whose last backward is
over travels while the rank's other stages work.

Invariant: after ``reduce`` every rank holds bit-equal gradients; a parameter that no rank used has none, as in one
process. Memory: the gradients themselves (one copy), padded to 16 elements a parameter, and for a moment the fresh
ones: of one parameter on a CPU, of buckets that backward has not filled yet on a GPU. Traffic a rank and step, for N
ranks and P gradient elements: 2 (N-1)/N P elements. Claims the layout and the reduction of gradients on ``dp``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

import camshaft
from camshaft.halving import QUIET
from camshaft.mesh import stated_data_parallel
from camshaft_ddp.limits import FIRST_BYTES

if TYPE_CHECKING:
    from camshaft.estimate import Estimate, Sizes
    from camshaft.state import State
    from camshaft_ddp.reducer import Reducer


class Options(camshaft.Options):
    """How gradients travel."""

    bucket_size_mb: Annotated[float, Field(gt=0, le=2**20)] = 25.0
    """Largest size of a bucket in MiB, 1 for the first: smaller ones start earlier, larger ones have less overhead.
    A larger parameter is a bucket of its own."""
    overlap: bool = True
    """Reduce while backward goes on; off, all buckets are reduced after it. The numbers are bit-equal."""


class Plugin(camshaft.Plugin):
    """Data parallel: bucketed all-reduce of gradients, overlapped with backward."""

    Options = Options
    draws = False
    usual: ClassVar[dict[str, str]] = {"data_parallel": "{}"}
    _reducer: Reducer | None = None
    _order: list[str] | None = None

    @camshaft.hookimpl
    def plan(self, context: camshaft.PlanContext) -> camshaft.Plan:
        """Own gradients and their sum on ``dp``. A recipe that asks for one data rank asks for none of it."""
        problems: tuple[camshaft.Problem, ...] = ()
        if stated_data_parallel(context.recipe.parallel) == 1:
            problems = (
                camshaft.Problem(
                    f"'{self.name}' works along the data axis alone, and the recipe gives that axis one rank",
                    key=f"plugins.{self.name}",
                    fix=f"remove plugins.{self.name}, or set parallel.data_parallel=auto",
                ),
            )
        return camshaft.Plan(
            claims=(camshaft.Claim("gradient.layout", "dp"), camshaft.Claim("gradient.reduce", "dp")),
            provides=("reduced_gradients@dp", *(() if self._overlaps(context) else (QUIET,))),
            problems=problems,
        )

    @camshaft.hookimpl
    def misfits(self, context: camshaft.PlanContext, sizes: Sizes) -> Iterator[camshaft.Problem]:
        """Asked to overlap, and with one bucket there is nothing that backward could go on beside."""
        trained = [each for each in sizes.parameters or () if each.trains]
        if not self._asked or context.mesh["dp"].degree == 1 or len({each.stage for each in trained}) != 1:
            return
        size = sizes.trained * sizes.widths.gradient
        if len(trained) == 1 or size <= min(self._bucket_bytes, FIRST_BYTES):
            key, said = f"plugins.{self.name}", self._one_bucket(size)
            yield camshaft.Problem(said, key=f"{key}.overlap", fix=f"lower {key}.bucket_size_mb, or remove overlap")

    @property
    def _asked(self) -> bool:
        return "overlap" in self.options.model_fields_set and bool(self.options.overlap)

    @property
    def _bucket_bytes(self) -> int:
        return int(self.options.bucket_size_mb * 2**20)

    def _one_bucket(self, size: int) -> str:
        return f"overlap has nothing to overlap: all gradients fit into one bucket, of {size / 2**20:.3g} MiB"

    def _overlaps(self, context: camshaft.PlanContext) -> bool:
        """Whether buckets travel during backward."""
        return bool(self.options.overlap) and context.mesh["dp"].degree > 1

    @camshaft.hookimpl
    def estimate(self, context: camshaft.PlanContext, sizes: Sizes) -> Estimate:
        """Everything on every rank, what buckets take besides, and the sum's traffic."""
        from camshaft.estimate import Sent, replicated

        ranks, widths = context.mesh["dp"].degree, sizes.widths
        whole = replicated(sizes)
        if ranks == 1:
            return whole
        largest = max((each.elements for each in sizes.parameters or () if each.trains), default=0) * widths.gradient
        bucket = min(max(self._bucket_bytes, largest), sizes.trained * widths.gradient)
        buffers = [("fresh gradients, of one bucket", bucket)]
        if widths.reduce != widths.gradient:
            buffers.append(("gradients in the dtype of the wire, until they are summed", sizes.trained * widths.reduce))
        sent = Sent("dp", "all_reduce", round(2 * (ranks - 1) / ranks * sizes.trained * widths.reduce))
        return replace(whole, buffers=(*whole.buffers, *buffers), sent=(sent,))

    @camshaft.hookimpl
    def bind(self, state: State) -> None:
        """Put buckets under the gradients. With one data rank there is nothing to exchange, and nothing is done."""
        self._parameters = tuple(state.model.parameters())
        mesh = state.world.mesh
        if mesh.degree("dp") == 1:
            return
        from camshaft_ddp.reducer import Reducer

        channel = mesh.channel(self.name, "dp")
        assert channel is not None
        self._reducer = Reducer(
            state,
            channel,
            bucket_bytes=self._bucket_bytes,
            overlap=self.options.overlap,
            reduce_dtype=state.world.policy.reduce,
        )

    @camshaft.hookimpl
    def post_backward(self) -> None:
        """Take the gradients of buckets that this backward filled only in part."""
        if self._reducer is not None:
            self._reducer.end_backward()

    @camshaft.hookimpl
    def reduce(self) -> None:
        """Wait until every bucket is summed."""
        if self._reducer is not None:
            self._reducer.finish()

    @camshaft.hookimpl
    def release(self) -> None:
        """Drop the gradients; after the first window, order the buckets as backward filled them."""
        if self._reducer is not None:
            self._reducer.release()
            return
        for parameter in self._parameters:
            parameter.grad = None

    @camshaft.hookimpl
    def inert(self) -> str | None:
        """Asked to overlap, and with one bucket there is nothing that backward could go on beside."""
        if not self._asked or self._reducer is None or len(self._reducer.buckets) != 1:
            return None
        (bucket,) = self._reducer.buckets
        said = self._one_bucket(bucket.flat.numel() * bucket.flat.element_size())
        return f"{said}; lower plugins.{self.name}.bucket_size_mb, or remove overlap"

    @camshaft.hookimpl
    def state_dict(self) -> Mapping[str, Any]:
        """The order of parameters in the buckets: sums of more than two ranks depend on it in the last bit."""
        if self._reducer is not None:
            return {"order": self._reducer.order}
        return {"order": self._order}

    @camshaft.hookimpl
    def load_state_dict(self, entries: Mapping[str, Any]) -> None:
        """Lay the buckets out as the saved run had them."""
        self._order = entries["order"]
        if self._reducer is not None and self._order is not None:
            self._reducer.adopt_order(self._order)

    @camshaft.hookimpl
    def close(self) -> None:
        """Remove the hooks from the parameters."""
        if self._reducer is not None:
            self._reducer.close()
            self._reducer = None

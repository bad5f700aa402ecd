"""The reducer: hooks on parameters fill buckets, and full buckets start their sum while backward goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from camshaft.comm import Channel
from camshaft.stages import Stages, stages_of, strange_stage
from camshaft.state import State
from camshaft_ddp.bucket import Bucket, fill


class Reducer:
    """Sums the gradients of all parameters that train over the ranks of ``channel``, once a window.

    Collectives run in the order of the buckets on every rank, also where ranks use different parameters: a bucket waits
    for those before it, and what backward does not complete is started when the last backward of its stage is over. A
    bucket never mixes pipeline stages; a parameter that several use is in one that is complete when all of them are.
    """

    def __init__(
        self,
        state: State,
        channel: Channel,
        *,
        bucket_bytes: int,
        overlap: bool,
        reduce_dtype: torch.dtype,
    ) -> None:
        self._state, self._channel = state, channel
        self._bucket_bytes, self._overlap, self._dtype = bucket_bytes, overlap, reduce_dtype
        self._named = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
        self._names = {parameter: name for name, parameter in self._named.items()}
        self._stages = stages_of(state.model, state.world.stages)
        self._done: set[int] = set()
        """Stages whose last backward of this window is over."""
        self._pipeline = state.world.mesh.degree("pp")
        self._everyones: list[str] | None = None
        self._seen: list[Parameter] | None = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.buckets: list[Bucket] = []
        # Backward runs roughly against the order of registration; the first window tells exactly.
        self._lay_out(list(reversed(self._named.values())))

    @property
    def order(self) -> list[str] | None:
        """Names in bucket order, once it is settled; those of all pipeline ranks, equal on all of them."""
        if self._seen is not None:
            return None
        own = [self._names[parameter] for bucket in self.buckets for parameter in bucket.parameters]
        return own if self._everyones is None else self._everyones

    def adopt_order(self, names: Sequence[str]) -> None:
        """Lay the buckets out in a saved order; parameters that it does not name come last."""
        known = [self._named[name] for name in names if name in self._named]
        chosen = set(known)
        self._lay_out(known + [parameter for parameter in self._named.values() if parameter not in chosen])
        self._seen = None
        self._everyones = list(names) if self._pipeline > 1 else None

    def _lay_out(self, parameters: Sequence[Parameter]) -> None:
        for handle in self._handles:
            handle.remove()
        # Let go of the old buffers first: each is a whole copy of the gradients.
        self._handles, self.buckets = [], []
        by_stage, limit = dict[Stages, list[Parameter]](), self._bucket_bytes
        for parameter in parameters:
            by_stage.setdefault(self._stages[parameter], []).append(parameter)
        self.buckets = [each for stages, members in by_stage.items() for each in fill(members, limit, stages)]
        self._next = 0
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(bucket, view))  # type: ignore[no-untyped-call]
            for bucket in self.buckets
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True)
        ]

    def _closes(self, bucket: Bucket) -> bool:
        """Whether the backward that runs is the last that brings gradients of ``bucket``."""
        state = self._state
        return state.final_backward and bucket.stages <= self._done | {state.stage}

    def _hook(self, bucket: Bucket, view: Tensor) -> Callable[[Tensor], None]:
        size = len(bucket.parameters)
        # On a CPU a gradient is copied while it is still in the cache; on a GPU one launch for a bucket is cheaper.
        at_once = view.is_cpu

        def ready(parameter: Tensor) -> None:
            gradient = parameter.grad
            if at_once and gradient is not view and gradient is not None:
                view.copy_(gradient)
                parameter.grad = view
            if self._state.stage not in bucket.stages:
                raise strange_stage(self._names[parameter], self._state.stage, bucket.stages)  # type: ignore[index]
            closes = self._closes(bucket)
            if self._seen is not None and closes:
                self._seen.append(parameter)  # type: ignore[arg-type]  # torch hands over the Parameter itself
            bucket.ready += 1
            if bucket.ready > size:
                raise self._twice(parameter)
            if bucket.ready == size:
                bucket.adopt()
                if closes:
                    bucket.complete = True
                    if self._overlap:
                        self._launch_complete()

        return ready

    def _twice(self, parameter: Tensor) -> RuntimeError:
        name = self._names[parameter]  # type: ignore[index]  # torch hands over the Parameter itself
        return RuntimeError(
            f"the gradient of '{name}' came after its bucket was full: backward made some gradient of this bucket "
            "twice, as reentrant activation checkpointing does with a shared parameter; use use_reentrant=False"
        )

    def _launch_complete(self) -> None:
        while self._next < len(self.buckets) and self.buckets[self._next].complete:
            self.buckets[self._next].launch(self._channel, self._dtype)
            self._next += 1

    def end_backward(self) -> None:
        """After each backward: adopt what buckets of its stage got that did not fill up, and count anew.

        After a stage's last one nothing more will come to its buckets.
        """
        state = self._state
        for bucket in self.buckets:
            if state.stage in bucket.stages:
                if 0 < bucket.ready < len(bucket.parameters):
                    bucket.adopt()
                bucket.ready = 0
                bucket.complete = bucket.complete or self._closes(bucket)
        if state.final_backward:
            self._done.add(state.stage)
            if self._overlap:
                self._launch_complete()

    def finish(self) -> None:
        """Start what nothing has started, and wait for every sum."""
        for bucket in self.buckets[self._next :]:
            bucket.launch(self._channel, self._dtype)
        for bucket in self.buckets:
            bucket.finish()

    def release(self) -> None:
        """Drop all gradients; after the first window settle the order of the buckets."""
        self._next = 0
        self._reset()
        if self._seen is not None:
            self._settle(self._seen)

    def _settle(self, seen: Sequence[Parameter]) -> None:
        """Every rank takes the first rank's order, since ranks may have used different parameters."""
        names = list(self._named)
        observed = dict.fromkeys(self._names[parameter] for parameter in seen)
        order = [*observed, *(name for name in names if name not in observed)]
        if order:  # nothing of a rank's pipeline stages may train
            device = next(iter(self._named.values())).device
            indexes = torch.tensor([names.index(name) for name in order], dtype=torch.int64, device=device)
            self._channel.broadcast(indexes, 0, "release").wait()
            order = [names[index] for index in indexes.tolist()]
        self.adopt_order(order)
        if self._pipeline > 1:  # a checkpoint keeps one list for all ranks
            every: list[Any] = [None] * self._pipeline
            dist.all_gather_object(every, self._everyones, group=self._state.world.mesh.group("pp"))
            self._everyones = list(dict.fromkeys(name for names in every for name in names))

    def close(self) -> None:
        """Remove every hook and let go of the buckets."""
        for handle in self._handles:
            handle.remove()
        self._reset()
        self._handles, self.buckets = [], []

    def _reset(self) -> None:
        self._done.clear()
        for bucket in self.buckets:
            bucket.reset()

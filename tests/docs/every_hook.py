"""A run that records the order in which hooks are called: ``python every_hook.py RECORD train RECIPE ...``.

The plugin ``every_hook`` implements each hook that no plugin of the recipe owns; calls of all plugins are recorded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import camshaft
from camshaft import hookimpl, host
from camshaft.claims import Claim, Plan
from camshaft.hookspecs import MIDDLEWARE
from camshaft.program import accumulate

calls: list[str] = []


class Plugin(camshaft.Plugin):
    """Does in each hook what the core would do without it."""

    @hookimpl
    def plan(self) -> Plan:
        return Plan(claims=(Claim("module.recompute", target="nothing.*"),))

    @hookimpl
    def kernels(self):
        return ()

    @hookimpl
    def rewrite(self) -> None: ...

    @hookimpl
    def build_model(self, config):
        from camshaft.models.llama import Llama

        return Llama(config)

    @hookimpl
    def split(self, model):
        return model

    @hookimpl
    def shard_compute(self) -> None: ...

    @hookimpl
    def recompute(self) -> None: ...

    @hookimpl
    def compile_model(self) -> None: ...

    @hookimpl
    def shard_storage(self) -> None: ...

    @hookimpl
    def materialize(self, world, model) -> None:
        from camshaft.models.init import materialize

        materialize(model, seed=world.recipe.seed, device=world.device, dtype=world.policy.param)

    @hookimpl
    def schedule(self, microbatches):
        return accumulate(microbatches)

    @hookimpl
    def handlers(self):
        return {}

    @hookimpl
    def bind(self) -> None: ...

    @hookimpl
    def post_load(self) -> None: ...

    @hookimpl
    def pre_run(self) -> None: ...

    @hookimpl
    def pre_forward(self) -> None: ...

    @hookimpl
    def around_forward(self, call):
        return lambda batch: call(batch)

    @hookimpl
    def post_backward(self) -> None: ...

    @hookimpl
    def reduce_parts(self) -> None: ...

    @hookimpl
    def post_reduce(self) -> None: ...

    @hookimpl
    def inert(self) -> None: ...

    @hookimpl
    def reduce(self) -> None: ...

    @hookimpl
    def around_step(self, call):
        return lambda: call()

    @hookimpl
    def step(self, state) -> None:
        state.optimizer.step()

    @hookimpl
    def release(self, state) -> None:
        state.optimizer.zero_grad()

    @hookimpl
    def post_step(self) -> None: ...

    @hookimpl
    def log(self) -> None: ...

    @hookimpl
    def state_dict(self):
        return {"kept": 1}

    @hookimpl
    def load_state_dict(self, entries) -> None:
        assert entries == {"kept": 1}

    @hookimpl
    def close(self) -> None: ...


def recorded(hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, noting each call; of middleware, each call of what it returns."""

    def call(*arguments: Any) -> Any:
        if hook not in MIDDLEWARE:
            calls.append(hook)
            return function(*arguments)
        wrapped = function(*arguments)
        return lambda *inner: (calls.append(hook), wrapped(*inner))[1]

    return call


def main() -> None:
    implementations = host.Host.implementations

    def recording(self: host.Host, hook: str) -> list[tuple[str, Callable[..., Any]]]:
        return [(name, recorded(hook, function)) for name, function in implementations(self, hook)]

    host.Host.implementations = recording
    from camshaft.cli import main as camshaft_main

    try:
        camshaft_main(sys.argv[2:])
    finally:
        Path(sys.argv[1]).write_text(json.dumps(calls))


if __name__ == "__main__":
    main()

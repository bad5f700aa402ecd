"""What the tracker tests share: a state with a real recipe and a run directory, without a model or a process group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from camshaft import Plugin
from camshaft.recipe.schema import Batch, Recipe, Training

Build = Callable[..., Any]


@pytest.fixture
def make_state(tmp_path: Path) -> Build:
    """``make_state(plugins={...}, step=0, is_main=True, total=300)``; the run directory is ``tmp_path / "run"``."""

    def build(plugins: dict[str, Plugin] | None = None, step: int = 0, is_main: bool = True, total: int = 300) -> Any:
        recipe = Recipe(
            schema_version=1,
            name="quickstart",
            batch=Batch(micro_batch_size=8, global_batch_size=16),
            training=Training(max_steps=total),
            plugins={name: plugin.options for name, plugin in (plugins or {}).items()},
        )
        path = tmp_path / "run"
        path.mkdir(exist_ok=True)
        run = SimpleNamespace(path=path, metrics=path / "metrics.jsonl", logs=path / "logs")
        world = SimpleNamespace(recipe=recipe, run=run, is_main=is_main, total_steps=total)
        return SimpleNamespace(world=world, step=step, consumed_tokens=step * 2048)

    return build

"""Each row's own undisturbed run is made once, and saved in its middle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grid_cases import run_grid
from reshard_cases import HALF, Ran, run

Written = Callable[..., tuple[Ran, Path]]


@pytest.fixture(scope="session")
def written_once(tmp_path_factory: pytest.TempPathFactory) -> Written:
    cache: dict[tuple[Any, ...], tuple[Ran, Path]] = {}

    def get(
        make: Any, row: str, *, optimizer: str = "adamw", scalar: bool | None = True, **precision: str
    ) -> tuple[Ran, Path]:
        key = (row, optimizer, scalar, tuple(sorted(precision.items())))
        if key not in cache:
            path = tmp_path_factory.mktemp("written")
            saves = {"optimizer": optimizer, "precision": precision, "every_steps": HALF}
            grid = scalar is None
            ran = run_grid(make, row, path, **saves) if grid else run(make, row, path, scalar=scalar, **saves)
            cache[key] = ran, path / "checkpoints" / f"step_{HALF:08d}"
        return cache[key]

    return get


@pytest.fixture
def written(written_once: Written, make_recipe: Any) -> Written:
    """(undisturbed run, its checkpoint after half of the steps) of a row."""
    return lambda row, **options: written_once(make_recipe, row, **options)


@pytest.fixture
def continued(make_recipe: Any, tmp_path: Path) -> Callable[..., Ran]:
    """A row that goes on from a checkpoint."""

    def get(row: str, checkpoint: Path, *, optimizer: str = "adamw", scalar: bool = True, **precision: str) -> Ran:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        return run(
            make_recipe, row, path, optimizer=optimizer, precision=precision, scalar=scalar, resume=str(checkpoint)
        )

    return get


@pytest.fixture
def written_grid(written_once: Written, make_recipe: Any) -> Written:
    """As ``written``, of a layout of ``grid_cases``."""
    return lambda row, **options: written_once(make_recipe, row, scalar=None, **options)


@pytest.fixture
def continued_grid(make_recipe: Any, tmp_path: Path) -> Callable[..., Ran]:
    """As ``continued``, of a layout of ``grid_cases``."""

    def get(row: str, checkpoint: Path, *, optimizer: str = "adamw", **precision: str) -> Ran:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        return run_grid(make_recipe, row, path, optimizer=optimizer, precision=precision, resume=str(checkpoint))

    return get

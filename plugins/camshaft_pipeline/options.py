"""The plugin's section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

import camshaft

Name = Literal["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zbv", "dualpipe_v"]


class Split(camshaft.Options):
    """Which layers are in which stage. Stages are numbered in the order of the model. At most one of the lists."""

    balance: Literal["parameters", "layers"] = "parameters"
    """What every stage gets about as much of: `parameters` counts the embedding, the last norm and the output
    projection too (a tied one in both stages that use it); `layers` counts layers alone."""
    layers: list[Annotated[int, Field(ge=1)]] | None = None
    """Number of layers of each stage."""
    starts: list[str] | None = None
    """Name of the first layer of each stage, such as `model.layers.0`."""
    times: list[Annotated[float, Field(ge=0, le=1e12)]] | None = None
    """Measured time of each layer, in any one unit, which is balanced then; with two more numbers, the first is what
    comes before the layers and the last what comes after."""


class Options(camshaft.Options):
    """How the model is cut, and in which order its stages work."""

    schedule: Name | str = "1f1b"
    """Order of forwards and backwards: `gpipe`, `1f1b`, `interleaved_1f1b`, `zb_h1`, `zbv` or `dualpipe_v`, or one that
    another package offers (`camshaft.schedules`)."""
    virtual_stages: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Stages of each rank; the fewest that the schedule can have when absent."""
    table: str | None = None
    """CSV file with a schedule of your own: a row for each rank along `pp`, a cell an action such as `F3@2`."""
    split: Split = Split()
    """Which layers are in which stage."""
    trace: bool = False
    """Measure every action of the third step of a run (or the last, if there are fewer), and write
    `pipeline.trace.json` (for Perfetto) and `pipeline.svg` into the run directory, beside what the simulator says of
    the same times."""

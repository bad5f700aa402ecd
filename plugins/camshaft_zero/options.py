"""Options of `zero`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

import camshaft

Placed = Literal["replicate", "shard"]


class Options(camshaft.Options):
    """What is divided over data-parallel ranks, and how it travels."""

    stage: Literal[1, 2, 3] | None = None
    """1: optimizer state and master weights are divided; 2: gradients too; 3: parameters too."""
    parameters: Placed | dict[str, Placed] | None = None
    """Instead of `stage`: placement of parameters, one word or one a data axis."""
    gradients: Placed | dict[str, Placed] | None = None
    """Instead of `stage`: placement of gradients."""
    optimizer: Placed | dict[str, Placed] | None = None
    """Instead of `stage`: placement of optimizer state and master weights."""
    provider: Literal["native", "torch"] = "native"
    """`native`: flat buffers; `torch`: `fully_shard` (stages 2 and 3), for models whose modules defeat the flat
    ones.
    """
    reduce: Literal["each", "last"] | None = None
    """Under accumulation, sum gradients over ranks after `each` microbatch, or once after the `last`, which sends less
    and keeps full gradients. Default: `last` where gradients are replicated, else `each`."""
    overlap: bool = True
    """Sum gradients while backward goes on, gather parameters while forward does. The numbers are bit-equal. In stages
    1 and 2 a model that begins to read a parameter before the module that holds it is called, and did not do so in
    the first step, must switch this off."""
    bucket_size_mb: Annotated[float, Field(gt=0, le=2**20)] = 25.0
    """Stages 1 and 2: largest size of a bucket of parameters in MiB, less where a model would fill few; a larger one
    is a bucket of its own."""
    units: list[str] | None = None
    """Stage 3: patterns of module names that are gathered as one, `*` within one level (`model.layers.*`); nested ones
    allowed. Default: members of ModuleLists, and large modules beside them."""
    unit_size_mb: Annotated[float, Field(ge=0, le=2**20)] = 0.0
    """Stage 3: join neighbouring units until they hold this many MiB."""
    reshard_after_forward: bool = True
    """Stage 3: free parameters after forward and gather them again for backward; off, they stay until it is over."""
    prefetch: Annotated[int, Field(ge=0, le=8)] = 1
    """Stage 3: units that are gathered ahead of their use, in the order of use that the first microbatch showed."""

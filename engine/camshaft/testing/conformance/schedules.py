"""A schedule on every size: who owns the slot checks it where it plans, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from camshaft.errors import RecipeError
from camshaft.host import Host
from camshaft.program import window_program
from camshaft.recipe import check
from camshaft.testing.conformance.trial import BATCH

if TYPE_CHECKING:
    from camshaft.testing.conformance.trial import Trial

RANKS = (2, 3, 4)
LAYERS = 8
"""Two stages for each of four ranks."""


def unsound(trial: Trial, microbatches: Iterable[int]) -> list[str]:
    """One line for each number of ranks and microbatches that the schedule is refused for.

    Programs are asked for twice and must be equal: a schedule is a pure function.
    """
    found = []
    for ranks in RANKS:
        for count in microbatches:
            try:
                resolved = trial.resolve(
                    ranks,
                    parallel={"pipeline_parallel": ranks},
                    batch={"micro_batch_size": BATCH, "global_batch_size": BATCH * count},
                    model={"num_hidden_layers": LAYERS},
                )
            except RecipeError as error:
                found.append(f"{ranks} ranks, {count} microbatches: {error}")
                continue
            mesh = check(resolved, ranks, device="cpu").mesh
            assert mesh is not None
            twice = [
                [window_program(Host.of(resolved.recipe.plugins), mesh, rank, count) for rank in range(ranks)]
                for _ in range(2)
            ]
            assert twice[0] == twice[1], f"{ranks} ranks, {count} microbatches: two answers"
    return found

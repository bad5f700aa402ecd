"""What is wrong with a schedule, said so that it can be mended."""

from __future__ import annotations

from camshaft.errors import CamshaftError, Problem
from camshaft.program import Action


class ScheduleError(CamshaftError, ValueError):
    """A schedule that cannot be made, read or run: on which rank, at which action, why, and what to do."""

    exit_status = 2

    def __init__(self, reason: str, *, rank: int | None = None, action: Action | None = None, fix: str = "") -> None:
        self.reason, self.rank, self.action, self.fix = reason, rank, action, fix
        place = [] if rank is None else [f"rank {rank}"]
        if action is not None:
            place.append(str(action))
        self.place = ", ".join(place)
        super().__init__(str(self.problem()))

    def problem(self, key: str = "") -> Problem:
        """The same as a fault of the recipe's ``key``."""
        return Problem(f"{self.place}: {self.reason}" if self.place else self.reason, key=key, fix=self.fix)

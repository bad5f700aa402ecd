"""Errors that users meet, and the exit status that each one ends a run with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of a recipe or of what it names: where it is, what is wrong, what to do about it."""

    message: str
    key: str = ""
    file: str = ""
    line: int | None = None
    fix: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file and self.line else self.file
        head = ": ".join(part for part in (place, self.key) if part)
        text = f"{head}: {self.message}" if head else self.message
        if not self.fix:
            return text
        return f"{text}{'' if text.endswith(('.', '?', '!')) else '.'} Fix: {self.fix}"


class CamshaftError(Exception):
    """Base of every error that is shown without a traceback."""

    exit_status: ClassVar[int] = 1


class RecipeError(CamshaftError):
    """A recipe, or a file that it names, is not usable. Carries every fault found, not only the first."""

    exit_status = 2

    def __init__(self, problems: Sequence[Problem] | Problem | str) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        if isinstance(problems, Problem):
            problems = (problems,)
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class MachineError(CamshaftError):
    """The machine, its packages, its launcher or its disk cannot do what the recipe asks."""

    exit_status = 3


class RanksDiverged(CamshaftError):
    """Ranks made different collectives: what one of them waits for, another will never send."""

    exit_status = 3


class CheckpointError(MachineError):
    """A checkpoint is torn, altered or does not fit; nothing has been loaded from it."""


class OutOfMemory(CamshaftError):
    """Memory of the device or of the host ran out."""

    exit_status = 4


class NonFiniteLoss(CamshaftError):
    """The loss or the gradient norm became NaN or infinite."""

    exit_status = 5


class Interrupted(CamshaftError):
    """The run was asked to stop and stopped after writing a checkpoint."""

    exit_status = 130


_OUT_OF_MEMORY = (
    "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
    "Error [CUDA]: out of memory",
)  # fmt: skip
"""What plain RuntimeErrors say: torch's CPU allocator, CUDA outside torch's own allocator, cuBLAS, cuDNN, and Triton
where it loads a kernel's code.
"""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of host or device ran out; told by names and texts, without importing torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


class PluginError(CamshaftError):
    """A plugin raised, or broke the contract of a hook. Names the plugin and the hook."""

    def __init__(self, plugin: str, hook: str, message: str) -> None:
        self.plugin, self.hook = plugin, hook
        super().__init__(f"plugin '{plugin}', hook '{hook}': {message}")

"""What a model says of itself, so that a pipeline can cut it, and what it is told in turn. Imports no torch.

A model that can be cut has three attributes and understands two fields of the batch:

- ``pipeline: Cuttable``, which of its modules belong to the layers and which come before and after them;
- ``spans: dict[int, Span]``, empty at first: the plugin that owns ``split`` fills it with the stages of this rank, and
  removes the modules that no stage of this rank needs. All other modules stay on every rank;
- its ``forward(batch)`` runs all of the model where ``batch.stage`` is None, and else ``spans[batch.stage]`` alone: it
  starts from the tokens where the span is the first and from ``batch.hidden`` elsewhere, and returns one tensor for the
  next stage, or the loss where the span is the last. What follows from the batch alone (angles, masks) is computed anew
  in each stage.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cuttable:
    """Names of modules. ``layers`` holds the layers (a ``ModuleList``), in the order in which they run."""

    layers: str
    before: tuple[str, ...]
    """Only the first stage needs them."""
    after: tuple[str, ...]
    """Only the last stage needs them."""


@dataclass(frozen=True, slots=True)
class Span:
    """Layers ``begin`` to ``end`` - 1 of ``of``: one stage."""

    begin: int
    end: int
    of: int

    @property
    def first(self) -> bool:
        """Whether the stage starts from the tokens."""
        return self.begin == 0

    @property
    def last(self) -> bool:
        """Whether the stage makes the loss."""
        return self.end == self.of


LLAMA = Cuttable("model.layers", ("model.embed_tokens",), ("model.norm", "lm_head"))
"""The built-in decoder."""


def stage_of(name: str, spans: tuple[Span, ...], pipeline: Cuttable) -> int:
    """Stage of parameter or module ``name``, where ``spans`` are all stages of the model in their order.

    What is neither a layer nor before or after the layers is of stage 0.
    """
    if any(_inside(name, part) for part in pipeline.after):
        return len(spans) - 1
    if not _inside(name, pipeline.layers) or name == pipeline.layers:
        return 0
    layer = int(name[len(pipeline.layers) + 1 :].split(".")[0])
    return next(stage for stage, span in enumerate(spans) if span.begin <= layer < span.end)


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")

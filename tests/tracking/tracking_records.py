"""Records as the loop makes them."""

from __future__ import annotations


def train_record(step: int, **more: float) -> dict[str, float | int]:
    """A record as the loop makes it, with digits that a rounding tracker would lose."""
    return {
        "train/loss": 5.1234 / step + 0.1,
        "train/grad_norm": 1.0 / 3.0,
        "train/lr": 2e-3,
        "perf/tokens_per_s": 5421.0,
        "progress/global_step": step,
        "progress/consumed_samples": step * 16,
        "progress/consumed_tokens": step * 2048,
        **more,
    }


def eval_record(step: int, loss: float = 4.5) -> dict[str, float | int]:
    return {"eval/loss": loss, "eval/perplexity": 90.0171313, "eval/bits_per_byte": 1.25, "progress/global_step": step}

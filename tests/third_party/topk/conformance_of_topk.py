"""The promises of every Camshaft plugin where all entries travel; and what is kept back where few do."""

from __future__ import annotations

import torch

import camshaft.testing
from camshaft.comm import Channel
from camshaft.testing.compare import assert_bit_equal
from camshaft.testing.conformance import runs
from camshaft.testing.ranks import run_ranks

ADAMW = {"adamw": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.0}}
LOSSY = "sends few entries, which changes the numbers by intention"


class TestTopk(camshaft.testing.Conformance):
    plugin = "topk"
    kind = "reducer"
    recipe = {"plugins": {"topk": {"ratio": 1.0}, **ADAMW}}
    ranks = (2, 4)
    except_for = {"ranks": "with one data rank it sends nothing and keeps nothing beside the optimizer's state"}

    def reference_optimizer(self, model):
        return WithoutErrors(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)


class WithoutErrors(torch.optim.AdamW):
    """torch's AdamW, with the errors of a dense sum beside its state: none."""

    def step(self):
        super().step()
        for weight, state in self.state.items():
            state.setdefault("topk.error", torch.zeros_like(weight, requires_grad=False))


class TestFewEntries(camshaft.testing.Conformance):
    plugin = "topk"
    kind = "reducer"
    recipe = {"plugins": {"topk": {"ratio": 0.1}, **ADAMW}}
    except_for = {
        "test_equals_the_reference": LOSSY,
        "test_equals_the_reference_beside_others": LOSSY,
        "test_frozen_and_unused_parameters": LOSSY,
        "test_goes_on_after_a_checkpoint": LOSSY + ": compared with its own undisturbed run below",
    }

    def test_equals_the_reference(self, trial):
        """Not equal, but every rank alike, and nothing lost: sent and kept sum to the dense gradients."""
        resolved = trial.resolve(2, plugins={"clip": None})
        ranks = run_ranks(2, watched, resolved, timeout_s=120)
        for step, (totals, gradients) in enumerate(zip(ranks[0][0], ranks[0][1], strict=True)):
            for name, total in totals.items():
                kept = ranks[0][2][step][name] + ranks[1][2][step][name]
                assert torch.allclose(gradients[name].flatten() + kept, total, rtol=1e-12, atol=1e-15), (step, name)
        assert any(each.abs().max() > 0 for each in ranks[0][2][-1].values()), "nothing was kept back"

    def test_goes_on_after_a_checkpoint(self, trial):
        """Bit-equal on as many ranks, errors and all; on twice as many the errors still sum to the same."""
        saving = {"checkpoint": {"every_steps": 2, "keep_last": 2}}
        whole = run_ranks(2, runs.trained, trial.resolve(2, run="whole", plugins=saving), timeout_s=120)
        run_ranks(2, runs.trained, trial.resolve(2, run="halves", plugins=saving), 2, timeout_s=120)
        rest = run_ranks(2, runs.trained, trial.resolve(2, run="halves", plugins=saving), timeout_s=120)
        assert [record.step for record in rest[0].records] == [3, 4]
        assert_bit_equal(rest[0].records, whole[0].records[2:])
        errors = {key: value for key, value in rest[0].records[-1].optimizer.items() if key.endswith("/topk.error")}
        assert errors and any(value.abs().max() > 0 for value in errors.values()), "no error was saved"


def watched(rank, world_size, resolved):
    """(sums of corrected gradients, gradients, errors of this rank) by step."""
    from camshaft_topk.sparse import Sparse

    totals, gradients, kept = [], [], []
    original = Sparse.reduce

    def reduce(self):
        dense = {}
        for name, parameter in self._named.items():
            dense[name] = self._errors[name] + parameter.grad.flatten()
            Channel.all_reduce(self._channel, dense[name], "reduce").wait()
        totals.append(dense)
        original(self)
        gradients.append({name: parameter.grad.clone() for name, parameter in self._named.items()})
        kept.append({name: error.clone() for name, error in self._errors.items()})

    Sparse.reduce = reduce
    runs.trained(rank, world_size, resolved)
    return totals, gradients, kept

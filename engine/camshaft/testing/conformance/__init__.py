"""The conformance kit: what every plugin must keep to, ours and anybody's, as one class to subclass.

::

    import camshaft.testing

    class TestMine(camshaft.testing.Conformance):
        plugin = "mine"
        kind = "observer"
        recipe = {"plugins": {"mine": {"every": 2}}}

pytest finds the tests in the class: nothing is registered with pytest, so other projects' runs load nothing of this.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from camshaft.errors import RecipeError
from camshaft.host import Host, plugin_class
from camshaft.recipe import check
from camshaft.testing.conformance import rules
from camshaft.testing.conformance.companions import shipped, slots
from camshaft.testing.conformance.trial import STEPS, Refused, Trial, merge, write_corpus

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from camshaft.models.llama import Llama
    from camshaft.recipe import Resolved
    from camshaft.testing.conformance.kernels import References
    from camshaft.testing.conformance.runs import Ran
    from camshaft.testing.record import StepRecord

EXACT = {"gradients": 1e-12, "norm": 1e-12, "weights": 1e-12, "optimizer": 1e-12, "loss": 1e-12, "lr": 1e-15}
BOUNDS = {
    "fp64": EXACT,
    "fp32": {"gradients": 1e-4, "norm": 2e-6, "weights": 1e-5, "optimizer": 1e-5, "loss": 2e-6, "lr": 1e-15},
    "bf16": {"loss": 1e-3, "norm": 5e-3, "weights": 1e-2},
}
"""Worst relative deviations that are noise: of sums in another order, in each precision."""
DIVIDING = ("split", "shard_compute", "shard_storage")
"""Hooks of plugins that divide something."""
MICROBATCHES = (1, 3)
QUICK = {2: (1,)}
"""Processes to microbatches of parity where CAMSHAFT_FULL_CONFORMANCE is not set; the last of all for other numbers."""
_references: dict[str, list[StepRecord]] = {}
_inspected: dict[type, list[Ran]] = {}


class Conformance:
    """Standard tests of one plugin. Subclass it, name the plugin, and say what a recipe needs for it.

    The recipe is ``recipe`` merged over the kit's own small one; an optimizer, clipping, fp64 and a sum over data ranks
    are added where the plugin is not one of them. A test that is replaced, a bound, precision or number of ranks that
    is changed needs its reason in ``except_for``; a test that is in ``except_for`` and not replaced is left out.
    """

    plugin: ClassVar[str] = ""
    """Name of the entry point; of the plugin that a schedule is for, where the kind is ``schedule``."""
    kind: ClassVar[str] = "observer"
    """``observer``, ``reducer``, ``sharder``, ``schedule``, ``kernel`` or ``optimizer``: which tests there are."""
    recipe: ClassVar[Mapping[str, Any]] = {}
    """Part of a recipe that enables the plugin; ``{"plugins": {<plugin>: {}}}`` by default."""
    ranks: ClassVar[tuple[int, ...]] = (1, 2, 4)
    """Numbers of processes; those that the recipe's degrees do not divide are left out."""
    compute: ClassVar[str] = "fp64"
    """Precision of runs: ``fp64``, ``fp32`` or ``bf16``."""
    bounds: ClassVar[Mapping[str, float] | None] = None
    """Largest relative deviation of each quantity; None: the standard ones of ``compute``."""
    max_norm: ClassVar[float | None] = 0.1
    """Gradients are clipped to this norm, which is active in every step; None: they are not clipped."""
    microbatches: ClassVar[tuple[int, ...]] = (1, 2, 3, 5, 8)
    """Microbatches that a schedule is made for."""
    except_for: ClassVar[Mapping[str, str]] = {}
    """Name of a standard test, of a setting (``ranks``, ``bounds``, ``compute``, ``max_norm``, ``microbatches``) or of
    what tests are made of (``check_parity``, ``sizes``, ...), to the reason why it is not as it is. Without a number
    of ranks above 1 tests that need several are skipped."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.plugin:
            rules.apply(cls, Conformance)

    # What an author may change: the textbook form of what the plugin does.

    def reference_optimizer(self, model: Llama) -> Optimizer | None:
        """A plain optimizer over the whole model's parameters; None: the recipe's own."""
        return None

    def reference_model(self, model: Llama) -> None:
        """Change the plain process' model, on the meta device: freeze, or register hooks on parameters."""

    def reference_lr(self, step: int, total: int) -> float:
        """Factor on the learning rate in the plain process."""
        return 1.0

    def reference_kernels(self) -> References:
        """Operation that ``camshaft.ops`` has not to its arguments and plain form, for a plugin that offers one."""
        return {}

    # What tests are made of.

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Called by pytest: one test for each number of processes and microbatches, or for each neighbour."""
        if "accumulation" in metafunc.fixturenames:
            counts = {size: MICROBATCHES if _full() else QUICK.get(size, MICROBATCHES[-1:]) for size in self.sizes()}
            metafunc.parametrize("size, accumulation", [(size, each) for size in counts for each in counts[size]])
        if "neighbour" in metafunc.fixturenames:
            metafunc.parametrize("neighbour", self.neighbours())

    @pytest.fixture
    def trial(self, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Trial:
        """Recipes around this plugin."""
        corpus = write_corpus(tmp_path_factory.getbasetemp() / "conformance-corpus")
        fragment = merge({"plugins": {self.plugin: {}}}, self.recipe)
        return Trial(fragment, corpus, tmp_path / "trial", self.compute, self.max_norm)

    @classmethod
    def sizes(cls) -> list[int]:
        """Numbers of processes that the recipe's own degrees divide.

        Raises:
            ValueError: there is none, and so nothing would be tried.
        """
        found = [size for size in cls.ranks if size % rules.fixed(cls.recipe) == 0]
        if not found:
            raise ValueError(
                f"{cls.__name__}: the degrees of its recipe make {rules.fixed(cls.recipe)} ranks, of which none of "
                f"ranks = {cls.ranks} is a multiple"
            )
        return found

    @classmethod
    def several(cls) -> int:
        """The fewest processes that are more than one; skips where there are none."""
        found = [size for size in cls.sizes() if size > 1]
        if not found:
            pytest.skip(f"needs several ranks: {cls.except_for.get('ranks', 'there is no such number')}")
        return min(found)

    def reference(self, trial: Trial, resolved: Resolved, **changes: Any) -> list[StepRecord]:
        """Records of one plain process for ``resolved``; made once for each."""
        from camshaft.testing.conformance import plain

        alone = trial.alone(resolved)
        tree = {key: value for key, value in alone.tree.items() if key not in ("run", "batch")}
        tree["rate"] = sorted(name for name in resolved.tree.get("plugins", {}) if "lr" in slots([name]))
        own = f"{type(self).__module__}:{type(self).__qualname__}" if self._own_reference() else ""
        key = json.dumps([own, tree, self.compute, self.max_norm])
        if key not in _references or changes:
            chosen = self._optimizer(alone)
            factor = plain.neighbours_lr(resolved, self.plugin) if tree["rate"] else None
            factor = factor or self.reference_lr
            changes = {"prepare": self.reference_model, "factor": factor} | changes
            records = plain.records(alone, self.compute, self.max_norm, chosen, **changes)
            assert len(records) == STEPS, "the kit's own corpus and batch"
            if "prepare" in changes and changes["prepare"] != self.reference_model:
                return records
            _references[key] = records
        return _references[key]

    def _own_reference(self) -> bool:
        names = ("reference_optimizer", "reference_model", "reference_lr")
        return any(getattr(type(self), name) is not getattr(Conformance, name) for name in names)

    def _optimizer(self, alone: Resolved) -> Callable[[Llama], Optimizer]:
        from camshaft.testing.conformance import plain

        own = plain.own_optimizer(alone, self.compute)
        return lambda model: self.reference_optimizer(model) or own(model)

    def check_parity(self, trial: Trial, resolved: Resolved, ranks: list[list[StepRecord]]) -> None:
        """All ranks bit-equal, and the first one within the bounds of the plain process."""
        from camshaft.testing.compare import assert_bit_equal, assert_within, compare

        for other in ranks[1:]:
            assert_bit_equal(ranks[0], other)
        assert_within(compare(ranks[0], self.reference(trial, resolved)), self.limits)

    @property
    def limits(self) -> Mapping[str, float]:
        """The bounds in force."""
        return BOUNDS[self.compute] if self.bounds is None else self.bounds

    def inspected(self, trial: Trial) -> list[Ran]:
        """One run on the fewest ranks that are more than one, looked at from every side; made once."""
        from camshaft.testing.conformance import runs
        from camshaft.testing.ranks import run_ranks

        if type(self) not in _inspected:
            size = min((size for size in self.sizes() if size > 1), default=1)
            resolved = trial.resolve(size)
            _inspected[type(self)] = run_ranks(size, runs.inspected, resolved, self.plugin, timeout_s=120)
        return _inspected[type(self)]

    # The standard tests.

    def test_options_refuse_unknown_keys(self, trial: Trial) -> None:
        """In every block of the plugin's section, and when a recipe is read."""
        from camshaft.testing.conformance.options import open_blocks

        assert open_blocks(plugin_class(self.plugin).Options) == []
        with pytest.raises(RecipeError, match="no_such_key"):
            trial.resolve(min(self.sizes()), plugins={self.plugin: {"no_such_key": 1}})

    def test_plan_is_pure_and_needs_no_torch(self, trial: Trial) -> None:
        """Asked twice, on each rank, in another order, with other hash seeds: the same plan, and nothing else."""
        from camshaft.testing.conformance.pure import check_plan

        check_plan(trial, self.sizes())

    def test_hooks_match_their_specs(self, trial: Trial) -> None:
        """Names and parameters of hooks are known, every hook is marked, and none is for another kind of plugin."""
        made = plugin_class(self.plugin)
        host = Host({self.plugin: made(self._options())})
        hooks = [name for name in vars(host.manager.hook) if not name.startswith("_")]
        found = {hook for hook in hooks if host.implementations(hook)}
        assert found, "a plugin without hooks can do nothing"
        plan = check(trial.resolve(min(self.sizes())), min(self.sizes()), device="cpu").plans.get(self.plugin)
        resources = {claim.resource for claim in plan.claims} if plan is not None else set()
        assert rules.more_than(self.kind, found, resources) == [], "other tests are there for such a plugin"

    def _options(self) -> Any:
        section = self.recipe.get("plugins", {}).get(self.plugin, {})
        return plugin_class(self.plugin).Options.model_validate_json(json.dumps(section))

    def test_equals_the_reference(self, trial: Trial, size: int, accumulation: int) -> None:
        """Gradients, norm, weights, optimizer state and loss of one plain process, on every number of ranks."""
        from camshaft.testing.run import record_ranks

        resolved = trial.resolve(size, accumulation)
        self.check_parity(trial, resolved, record_ranks(resolved, size))

    def test_equals_the_reference_beside_others(self, trial: Trial, neighbour: str) -> None:
        """With a shipped plugin beside it; skipped, with the reason, where claims do not allow both."""
        from camshaft.testing.run import record_ranks

        try:
            resolved, size = trial.beside(neighbour, self.several())
        except Refused as reason:
            pytest.skip(f"cannot be beside '{neighbour}': {reason}")
        try:
            self.check_parity(trial, resolved, record_ranks(resolved, size))
        except AssertionError as error:
            raise AssertionError(f"beside '{neighbour}' on {size} ranks: {error}") from error

    def neighbours(self) -> list[str]:
        """Shipped plugins to stand beside; all of them with CAMSHAFT_FULL_CONFORMANCE=1."""
        others = [name for name in shipped() if name != self.plugin]
        if _full():
            return others
        return [name for name in others if any(hasattr(plugin_class(name), phase) for phase in DIVIDING)]

    def test_goes_on_after_a_checkpoint(self, trial: Trial) -> None:
        """Stopped after half of the steps and started again: the same losses, and on other ranks within the bounds."""
        from camshaft.testing.conformance.resumed import check_resume

        check_resume(self, trial)

    def test_writes_only_what_it_claims(self, trial: Trial) -> None:
        """No hook of it changes weights, gradients or optimizer state that it did not claim; seen from outside, and by
        ``debug.contracts``.
        """
        from camshaft.testing.run import record_ranks

        assert [line for ran in self.inspected(trial) for line in ran.touched] == []
        size = min((size for size in self.sizes() if size > 1), default=1)
        record_ranks(trial.resolve(size, debug={"contracts": True}), size)  # raises, naming hook, step and tensor

    def test_leaves_nothing_behind(self, trial: Trial) -> None:
        """After ``close`` no hook is on a module or tensor, no forward is replaced, no thread runs."""
        assert [line for ran in self.inspected(trial) for line in ran.left] == []

    def test_makes_no_pluggy_call_in_a_step(self, trial: Trial) -> None:
        """Steps run bound callables."""
        assert [call for ran in self.inspected(trial) for call in ran.pluggy_calls] == []

    def test_frozen_and_unused_parameters(self, trial: Trial) -> None:
        """Parameters that do not train, and one that nothing uses, on two ranks or more."""
        from camshaft.testing.compare import assert_bit_equal, assert_within, compare
        from camshaft.testing.conformance import runs
        from camshaft.testing.ranks import run_ranks

        size = self.several()
        variant = runs.Variant(unused=not self.recipe.get("parallel"))
        resolved = trial.resolve(size)
        ranks = run_ranks(size, runs.varied, resolved, variant.unused, timeout_s=120)
        for other in ranks[1:]:
            assert_bit_equal(ranks[0], other)
        reference = self.reference(trial, resolved, prepare=variant.change)
        assert_within(compare(ranks[0], reference), self.limits)

    def test_the_schedule_is_sound_for_every_size(self, trial: Trial) -> None:
        """For 2 to 4 ranks and each number of microbatches: complete, in order, without deadlock, within its memory."""
        from camshaft.testing.conformance.schedules import unsound

        assert unsound(trial, self.microbatches) == []

    def test_kernels_match_fp64(self, trial: Trial, record_property: Callable[[str, object], None]) -> None:
        """Forward and backward, or steps, of everything that is offered for this machine; reports tell what that is."""
        from camshaft.testing.conformance.offered import check_kernels

        check_kernels(self.plugin, self._options(), trial, self.reference_kernels(), record_property)


def _full() -> bool:
    return os.environ.get("CAMSHAFT_FULL_CONFORMANCE") == "1"

"""A sweep on this machine: Optuna chooses, a SQLite file in the sweep's folder remembers, one trial runs at a time.

What is chosen for trial n follows from the seed, n and the trials before it alone. So a sweep that was killed goes on
as if nothing had happened: the trial that was under way has its values in the file, and continues from its checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from camshaft.errors import CamshaftError, Interrupted, MachineError, RecipeError
from camshaft.rundir import Lock
from camshaft.sweep.file import Choice, Span, Sweep
from camshaft.sweep.trial import Outcome, Program, Stop, Trial, Worse, train
from camshaft.sweep.values import changes

if TYPE_CHECKING:
    import optuna

Say = Callable[[str], None]
_IDENTITY, _REASON = "sweep", "reason"


def run(sweep: Sweep, stop: Stop, say: Say, program: Program = train) -> None:
    """Run the trials that are left; ``say`` is told of each.

    Raises:
        MachineError: Optuna is not installed, the folder or the study in it cannot be used, or another process runs
            this sweep.
        RecipeError: the folder holds another sweep of this name.
        Interrupted: asked to stop; the same command goes on.
        CamshaftError: no trial came to a value.
    """
    _import().logging.set_verbosity(_import().logging.WARNING)
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(
            f"the sweep's folder {sweep.folder} cannot be made: {error.strerror}. Set run.root of the recipe to a "
            "writable place"
        ) from error
    with ExitStack() as stack:
        stack.callback(Lock(sweep.folder).release)
        Runner(sweep, stop, say, program).run()


def _import() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MachineError(
            "camshaft sweep --local needs Optuna, which is not installed. Install it: pip install 'camshaft[sweep]'"
        ) from error
    return optuna


class Runner:
    """The study and its loop."""

    def __init__(self, sweep: Sweep, stop: Stop, say: Say, program: Program) -> None:
        self._optuna = _import()
        self._sweep, self._stop, self._say, self._program = sweep, stop, say, program
        self._states = self._optuna.trial.TrialState
        self.study: optuna.Study = self._open()

    def run(self) -> None:
        """Finish what an earlier process began, then the rest; results are in ``results.json``."""
        for begun in self.study.get_trials(deepcopy=False, states=(self._states.RUNNING,)):
            if self._chosen(begun):
                self._finish(begun.number, begun.params, None)
            else:  # killed while its values were being chosen
                self._tell(begun.number, Outcome(None, "ended before it began"))
        while self._over() < self._sweep.total:
            trial = self._ask()
            self._finish(trial.number, trial.params, trial)
        self._report()

    def _open(self) -> optuna.Study:
        sweep, pruners = self._sweep, self._optuna.pruners
        pruning, pruner = sweep.file.pruning, pruners.NopPruner()
        if pruning is not None:
            pruner = pruners.MedianPruner(pruning.startup_trials, pruning.warmup_steps)
        path = (sweep.folder / "study.db").resolve()
        try:
            study: optuna.Study = self._optuna.create_study(
                study_name=sweep.file.name,
                storage=f"sqlite:///{path}",
                direction=sweep.file.metric.goal,
                pruner=pruner,
                load_if_exists=True,
            )
        except Exception as error:  # of SQLAlchemy, of SQLite, or of Optuna, whichever looks first
            raise MachineError(
                f"{path} is no study that can be read ({str(error).partition(chr(10))[0]}). Move it away to begin "
                "again, or give the sweep another name"
            ) from error
        identity = hashlib.sha256(json.dumps(sweep.identity(), sort_keys=True).encode()).hexdigest()
        if study.user_attrs.get(_IDENTITY, identity) != identity:
            raise RecipeError(
                f"{sweep.folder} holds a sweep that was started with another {sweep.path.name} or recipe. Give this "
                "one another name, or remove the folder"
            )
        study.set_user_attr(_IDENTITY, identity)
        return study

    def _over(self) -> int:
        states = (self._states.COMPLETE, self._states.FAIL, self._states.PRUNED)
        return sum(map(self._chosen, self.study.get_trials(deepcopy=False, states=states)))

    def _chosen(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether it has all of its values; a process that was killed before that has tried nothing."""
        return bool(trial.params.keys() == self._sweep.file.parameters.keys())

    def _ask(self) -> optuna.Trial:
        file, number = self._sweep.file, len(self.study.get_trials(deepcopy=False))
        if file.method == "grid":
            waiting = self.study.get_trials(deepcopy=False, states=(self._states.WAITING,))
            if not waiting:
                self.study.enqueue_trial(self._combination(self._over()))
        digest = hashlib.blake2b(f"{file.seed}/{number}".encode(), digest_size=4).digest()
        samplers = self._optuna.samplers
        kind = samplers.TPESampler if file.method == "bayes" else samplers.RandomSampler
        self.study.sampler = kind(seed=int.from_bytes(digest))
        return self.study.ask({key: self._distribution(each) for key, each in file.parameters.items()})

    def _combination(self, number: int) -> dict[str, Any]:
        """The ``number``-th point of the grid; the last parameter varies fastest."""
        parameters = self._sweep.file.parameters
        points = itertools.product(*(each.grid() for each in parameters.values()))
        return dict(zip(parameters, next(itertools.islice(points, number, None)), strict=True))

    def _distribution(self, each: Span | Choice) -> Any:
        kinds = self._optuna.distributions
        if isinstance(each, Choice):
            return kinds.CategoricalDistribution(each.values)
        last = each.last  # Optuna warns of an end that its steps do not meet
        if each.whole:
            return kinds.IntDistribution(each.min, last, log=each.log, step=each.step or 1)
        return kinds.FloatDistribution(float(each.min), float(last), log=each.log, step=each.step)

    def _finish(self, number: int, parameters: Mapping[str, Any], trial: optuna.Trial | None) -> None:
        """Run a trial and tell the study. One that an earlier process began is not pruned any more."""
        sweep = self._sweep
        run = Trial(sweep.folder, number, sweep.recipe, sweep.file.overrides, sweep.file.metric)
        words = " ".join(changes(parameters))
        self._say(f"trial {number}{'' if trial else ' again'}: {words}")
        worse = None if trial is None or sweep.file.pruning is None else _worse(trial)
        outcome = run.run(parameters, self._stop, worse, self._program, self._say)
        if outcome.stopped:
            raise Interrupted(f"asked to stop in trial {number}; the same command goes on with it")
        self._tell(number, outcome)

    def _tell(self, number: int, outcome: Outcome) -> None:
        metric = self._sweep.file.metric
        if outcome.pruned:
            self.study.tell(number, state=self._states.PRUNED)
        elif outcome.value is None:
            self.study.tell(number, state=self._states.FAIL)
        else:
            self.study.tell(number, outcome.value)
        told = outcome.reason or f"{metric.name} {outcome.value:.6g}"
        best = self._best()
        self._say(f"trial {number}: {told}" + ("" if best is None else f" (best: trial {best[0]}, {best[1]:.6g})"))
        self._write()

    def _best(self) -> tuple[int, float] | None:
        done = self.study.get_trials(deepcopy=False, states=(self._states.COMPLETE,))
        if not done:
            return None
        best = self.study.best_trial
        assert best.value is not None
        return best.number, best.value

    def _write(self) -> None:
        rows = [
            {"number": each.number, "state": each.state.name.lower(), "value": each.value, "parameters": each.params}
            for each in self.study.get_trials(deepcopy=False)
        ]
        path = self._sweep.folder / "results.json"
        partial = path.with_name(f".{path.name}")
        partial.write_text(json.dumps({"metric": self._sweep.file.metric.name, "trials": rows}, indent=2) + "\n")
        partial.replace(path)

    def _report(self) -> None:
        best = self._best()
        if best is None:
            raise CamshaftError(
                f"none of {self._over()} trials came to a value. Their logs are in {self._sweep.folder}"
            )
        parameters = self.study.best_trial.params
        words = " ".join([*self._sweep.file.overrides, *changes(parameters)])
        self._say(f"best         trial {best[0]}, {self._sweep.file.metric.name} {best[1]:.6g}")
        self._say(f"train it     camshaft train {self._sweep.recipe} {words}")
        self._say(f"all trials   {self._sweep.folder / 'results.json'}")


def _worse(trial: optuna.Trial) -> Worse:
    """Tells the study of a value on the way, each step once, and asks it."""
    seen: set[int] = set()

    def worse(step: int, value: float) -> bool:
        if step in seen:
            return False
        seen.add(step)
        trial.report(value, step)
        return bool(trial.should_prune())

    return worse

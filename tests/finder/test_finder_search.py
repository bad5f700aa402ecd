"""Which micro batches are tried, in which order, and what is left of it in the run directory."""

import pytest

from camshaft import finder
from camshaft.cli import finding, run
from camshaft.cli.launch.claim import begin, take
from camshaft.errors import OutOfMemory, RecipeError
from camshaft.finder import Found, Trial, candidates, planned, search
from camshaft.recipe import check, load

ADAMW = {"adamw": {"lr": 1e-3}}
MEMORY = 0.002
"""GiB: some of the candidates of the recipe below, by its plan."""
PEAKS = {1: 10, 2: 18, 3: 26, 4: 34, 6: 50, 12: 98}


def attempts(limit, tried):
    def attempt(size):
        tried.append(size)
        return Trial(size, size <= limit, size, "" if size <= limit else "full")

    return attempt


@pytest.mark.parametrize(
    ("memory", "limit", "order", "chosen"),
    [
        (40, 4, [4], 4),  # as planned; the next is far beyond
        (45, 4, [4, 6], 4),  # the next is near enough to be tried
        (45, 6, [4, 6], 6),
        (45, 99, [4, 6], 6),  # 12 is beyond any error of the plan
        (60, 2, [6, 4, 3, 2], 2),
        (5, 1, [1], 1),  # not even the smallest by the plan: a trial decides
        (1000, 12, [12], 12),
    ],
)
def test_trials_begin_at_the_plan_and_end_at_the_largest_that_fits(memory, limit, order, chosen):
    tried = []
    size, trials = search(PEAKS, memory, attempts(limit, tried))
    assert (size, tried) == (chosen, order)
    assert [each.micro_batch_size for each in trials] == order
    assert [each.fits for each in trials] == [each <= limit for each in order]


def test_where_nothing_fits_the_message_says_what_to_change():
    tried = []
    with pytest.raises(OutOfMemory, match=r"also 1 does not \(full\).*data.sequence_length"):
        search(PEAKS, 20, attempts(0, tried))
    assert tried == [2, 1]


def test_candidates_keep_the_global_batch():
    assert candidates(24, 2) == [1, 2, 3, 4, 6, 12]
    assert candidates(7, 1) == [1, 7]
    assert candidates(24, 2, microbatches=4) == [1, 2, 3]  # 12 of a rank in at least 4
    assert candidates(4, 2, microbatches=4) == [1]
    assert candidates(10**15 + 37, 1) == [1, 10**15 + 37], "a prime, and no search through all that is below"
    assert candidates(36, 1) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert planned(PEAKS, 33) == 3 and planned(PEAKS, 1) == 1


def test_what_was_found_is_read_again_for_the_same_batch_alone(tmp_path):
    found = Found(4, 6, 1 << 30, 24, 2, [Trial(6, False, None, "full"), Trial(4, True, 123)])
    found.write(tmp_path)
    assert finder.read(tmp_path) == found
    assert found.serves(24, 2) and not found.serves(48, 2) and not found.serves(24, 4)
    for text in ("", "[]", "{}", '{"micro_batch_size": 4}'):
        (tmp_path / finder.FILE).write_text(text)
        assert finder.read(tmp_path) is None


@pytest.fixture
def automatic(make_recipe):
    def make(**sections):
        batch = {"micro_batch_size": "auto", "global_batch_size": 24}
        return make_recipe(ADAMW, **{"batch": batch, **sections})

    return make


def test_the_plans_peak_grows_with_the_candidate_and_memory_decides(automatic):
    resolved = automatic()
    peaks = finding.peaks(resolved, 2, "cpu")
    assert list(peaks) == [1, 2, 3, 4, 6, 12]
    assert sorted(peaks.values()) == list(peaks.values()) and len(set(peaks.values())) == 6
    assert planned(peaks, peaks[3] + 1) == 3
    with pytest.raises(RecipeError, match="auto is found in trials"):
        finding.refuse(resolved, 2)


def test_ranks_on_a_cpu_share_what_is_free(automatic, monkeypatch):
    monkeypatch.setattr(finding, "available_bytes", lambda: 1001)
    assert finding.memory_of(automatic(), 4, "cpu") == 250
    stated = automatic(launch={"device": "cpu", "memory_gib": 0.5})
    assert finding.memory_of(stated, 4, "cpu") == finding.memory_of(stated, 1, "cuda") == 1 << 29


def test_accumulation_cannot_be_given_with_auto(automatic):
    resolved = automatic(batch={"micro_batch_size": "auto", "global_batch_size": 24, "gradient_accumulation_steps": 2})
    (problem,) = check(resolved, 1).problems
    assert problem.key == "batch.gradient_accumulation_steps" and "is auto" in problem.message


def test_a_global_batch_that_does_not_divide_is_refused_with_auto_too(automatic):
    resolved = automatic(batch={"micro_batch_size": "auto", "global_batch_size": 25})
    (problem,) = check(resolved, 2).problems
    assert problem.key == "batch.global_batch_size"


def test_plan_and_validate_take_auto_and_plan_says_what_it_would_choose(automatic, capsys):
    resolved = automatic(launch={"device": "cpu", "memory_gib": MEMORY})
    assert run(["validate", str(resolved.path)]) == 0
    assert run(["plan", str(resolved.path), "--world-size", "2"]) == 0
    text = capsys.readouterr().out
    peaks = finding.peaks(resolved, 2, "any")
    size = planned(peaks, int(MEMORY * 2**30))
    assert 1 < size < 12 and f"micro batch  auto: {size} by the plan" in text
    assert f"global 24 = micro {size} x accumulation {12 // size} x data ranks 2" in text
    vast = automatic(launch={"device": "cpu", "memory_gib": 1e300})
    assert run(["plan", str(vast.path), "--world-size", "2"]) == 0
    assert "micro batch  auto: 12 by the plan" in capsys.readouterr().out
    unknown = automatic(launch={"device": "auto"})
    assert run(["plan", str(unknown.path), "--world-size", "2"]) == 0
    assert "set launch.memory_gib" in capsys.readouterr().out


def test_the_same_command_finds_an_unfinished_run_whose_micro_batch_was_found(automatic, tmp_path):
    resolved = automatic(run={"root": str(tmp_path / "runs")})
    first = take(resolved, fresh=False)
    Found(3, 3, 1 << 30, 24, 2).write(first.directory.path)
    first.lock.release()
    settled = load(resolved.path, ["batch.micro_batch_size=3", f"run.dir={first.directory.path}"], world_size=2)
    begin(first.directory, settled, 2, "camshaft train")
    assert "# override 1 (batch.micro_batch_size); found for auto in 0 trial(s): 3" in (
        first.directory.path / "resolved.yaml"
    ).read_text(encoding="utf-8")
    again = take(resolved, fresh=False)
    again.lock.release()
    assert again.continued and again.directory.path == first.directory.path
    other = take(load(resolved.path, ["seed=9"]), fresh=False)
    other.lock.release()
    assert not other.continued


def test_overrides_of_the_same_keys_give_way(automatic):
    resolved = automatic()
    changes = ["batch.micro_batch_size=auto", "seed=4", "run.dir=elsewhere"]
    settled = finding.changed(changes, {"batch.micro_batch_size": 6, "run.dir": "here"})
    assert settled == ("seed=4", "batch.micro_batch_size=6", "run.dir=here")
    recipe = load(resolved.path, settled).recipe
    assert (recipe.batch.micro_batch_size, recipe.run.dir, recipe.seed) == (6, "here", 4)

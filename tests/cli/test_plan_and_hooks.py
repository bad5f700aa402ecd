"""``camshaft plan`` and ``camshaft hooks``: what they show, and that neither needs torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from camshaft.cli import run

RECIPE = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
BIG = ["batch.global_batch_size=65536"]


def shown(capsys, *arguments):
    assert run(list(arguments)) == 0
    return capsys.readouterr().out


def test_plan_shows_sizes_phases_owners_claims_and_programs(capsys):
    text = shown(capsys, "plan", RECIPE, "--world-size", "2", "batch.global_batch_size=32")
    assert "global 32 = micro 8 x accumulation 2 x data ranks 2" in text
    assert "pp 1 x dp 2 x cp 1 x tp 1 = 2 rank(s)" in text
    assert re.search(r"^optimizer +adamw$", text, re.MULTILINE)
    assert re.search(r"^ddp +gradient.reduce@dp$", text, re.MULTILINE)
    assert "0..1 (2)  F0 B0 F1 B1 REDUCE CLIP STEP" in text


def test_plan_shows_both_halves_of_the_data_axis(capsys):
    text = shown(
        capsys,
        "plan",
        RECIPE,
        "--world-size",
        "8",
        "--rank",
        "5",
        "parallel.data_parallel_shard=4",
        "batch.global_batch_size=64",
    )
    assert "pp 1 x dp 8 (replicate 2 x shard 4) x cp 1 x tp 1 = 8 rank(s)" in text and "x data ranks 8" in text
    assert "dp_replicate=1" in text and "dp_shard=1" in text


def test_plan_is_pure_and_follows_the_recipe(capsys):
    first, again = shown(capsys, "plan", RECIPE), shown(capsys, "plan", RECIPE)
    other = shown(capsys, "plan", RECIPE, "plugins.clip=null")
    assert first == again and other.splitlines()[-1] != first.splitlines()[-1]


def test_plan_of_4096_ranks_shows_one_ranks_place(capsys):
    text = shown(capsys, "plan", RECIPE, "--world-size", "4096", "--rank", "4095", *BIG)
    assert "dp=4095" in text and "tp=0" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--world-size", "2", "--rank", "2"], "there is no rank 2 among 2"),
        (["--world-size", "2", "plugins.ddp=null"], "axis 'dp' has degree 2, and no enabled plugin claims it"),
        (
            ["--world-size", "2", "parallel.tensor_parallel=2"],
            "axis 'tp' has degree 2, and no enabled plugin claims it",
        ),
        (["plugins.sgd.lr=0.1"], "'adamw' and 'sgd' both own the slot 'optimizer'"),
    ],
)
def test_plan_refuses_what_train_would_refuse(capsys, arguments, words):
    assert run(["plan", RECIPE, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_hooks_lists_every_hook_and_who_implements_it(capsys):
    bare = shown(capsys, "hooks")
    assert "implemented by" not in bare
    rows = {line.split()[0]: line for line in shown(capsys, "hooks", RECIPE).splitlines() if line.strip()}
    assert rows["reduce"].endswith("ddp") and rows["optimizer"].split()[1] == "slot"
    assert rows["around_forward"].split()[1] == "middleware" and rows["split"].endswith("-")


def test_neither_imports_torch():
    code = (
        "import sys; from camshaft.cli import run\n"
        f"assert run(['plan', {RECIPE!r}]) == 0 and run(['hooks', {RECIPE!r}]) == 0\n"
        "assert not {'torch', 'deepspeed', 'wandb'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)

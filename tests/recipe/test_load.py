"""From files, overrides and the environment to one recipe: precedence, order, provenance, resolved.yaml."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_plugins
from pydantic import ValidationError
from recipe_cases import recipe

from camshaft import host
from camshaft.errors import RecipeError
from camshaft.recipe import load

PLUGINS = "plugins:\n  ddp: {bucket_size_mb: 4}\n  adamw:\n    lr: 1e-3\n    weight_decay: 0.5\n  clip: {max_norm: 1}"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path, "base.yaml", recipe(plugins=PLUGINS))


def failure(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    return [str(problem) for problem in caught.value.problems]


class TestExtends:
    def test_mappings_merge_and_scalars_replace(self, base: Path, tmp_path: Path) -> None:
        path = write(
            tmp_path,
            "sub/top.yaml",
            "extends: ../base.yaml\nname: top\nplugins:\n  jsonl: {}\n  adamw: {lr: 2}\n  ddp: null\n",
        )
        resolved = load(path)
        assert resolved.recipe.name == "top"
        assert resolved.recipe.training.max_steps == 5
        assert list(resolved.recipe.plugins) == ["adamw", "clip", "jsonl"]
        assert (resolved.recipe.plugins["adamw"].lr, resolved.recipe.plugins["adamw"].weight_decay) == (2, 0.5)
        assert resolved.base_dir == path.parent
        assert "extends" not in resolved.tree

    def test_bases_merge_left_to_right(self, base: Path, tmp_path: Path) -> None:
        write(tmp_path, "a.yaml", "seed: 1\ntraining: {log_every: 1}\nplugins: {sgd: {lr: 1}, adamw: null}\n")
        write(tmp_path, "b.yaml", "seed: 2\nplugins: {adamw: {lr: 3}, sgd: null}\n")
        path = write(tmp_path, "top.yaml", "extends: [base.yaml, a.yaml, b.yaml]\n")
        resolved = load(path)
        assert (resolved.recipe.seed, resolved.recipe.training.log_every) == (2, 1)
        assert list(resolved.recipe.plugins) == ["ddp", "adamw", "clip"]
        assert resolved.recipe.plugins["adamw"].weight_decay != 0.5, "null forgot the base's options"
        assert str(resolved.provenance["seed"]) == f"{tmp_path / 'b.yaml'}:1"

    def test_another_form_of_data_replaces_the_base_form(self, tmp_path: Path) -> None:
        write(tmp_path, "base.yaml", recipe(data="data: {train: {blend: [{prefix: a}]}, sequence_length: 32}"))
        write(tmp_path, "words.txt", "words " * 2000)
        path = write(tmp_path, "top.yaml", "extends: base.yaml\ndata: {train: {files: [words.txt]}}\n")
        data = load(path).recipe.data
        assert (data.train.files, data.sequence_length) == (["words.txt"], 32)

    def test_lists_replace(self, tmp_path: Path) -> None:
        adam = "plugins:\n  ddp: {}\n  adamw: {lr: 1, betas: [0.1, 0.2]}"
        write(tmp_path, "base.yaml", recipe(plugins=adam))
        path = write(tmp_path, "top.yaml", "extends: base.yaml\nplugins: {adamw: {betas: [0.5, 0.6]}}\n")
        assert load(path).recipe.plugins["adamw"].betas == [0.5, 0.6]

    def test_faults_name_the_file_they_are_in(self, tmp_path: Path) -> None:
        write(tmp_path, "base.yaml", recipe(seed="seed: x", training="training: {max_setps: 1}"))
        path = write(tmp_path, "top.yaml", "extends: base.yaml\nmodel:\n  preset: 3\n")
        places = [problem.partition(": ")[0] for problem in failure(path)]
        assert f"{tmp_path / 'base.yaml'}:12" in places, "the seed"
        assert f"{tmp_path / 'base.yaml'}:7" in places, "the training section"
        assert f"{tmp_path / 'top.yaml'}:3" in places, "the preset"

    def test_a_cycle_over_three_files_names_it(self, tmp_path: Path) -> None:
        write(tmp_path, "b.yaml", "extends: c.yaml\n")
        write(tmp_path, "c.yaml", "seed: 1\nextends: [a.yaml]\n")
        path = write(tmp_path, "a.yaml", "extends: b.yaml\n" + recipe())
        (problem,) = failure(path)
        assert problem.startswith(f"{tmp_path / 'c.yaml'}:2: extends: a cycle of extends: a.yaml -> b.yaml -> c.yaml")

    def test_a_shared_base_is_no_cycle(self, base: Path, tmp_path: Path) -> None:
        write(tmp_path, "a.yaml", "extends: base.yaml\n")
        write(tmp_path, "b.yaml", "extends: base.yaml\n")
        assert load(write(tmp_path, "top.yaml", "extends: [a.yaml, b.yaml]\n")).recipe.name == "good"

    def test_bases_that_double_at_each_level_end(self, tmp_path: Path) -> None:
        for level in range(30):
            write(tmp_path, f"l{level}.yaml", f"extends: [l{level + 1}.yaml, l{level + 1}.yaml]\n")
        write(tmp_path, "l30.yaml", recipe())
        assert any("more than 64 recipes" in problem for problem in failure(tmp_path / "l0.yaml"))

    def test_a_secret_that_is_overridden_is_still_in_the_file(self, tmp_path: Path) -> None:
        write(tmp_path, "base.yaml", recipe() + "  wandb:\n    api_key: abc\n")
        path = write(tmp_path, "top.yaml", "extends: base.yaml\nplugins: {wandb: null}\n")
        assert any("plugins.wandb.api_key" in problem for problem in failure(path))


class TestOverrides:
    def test_precedence_is_base_file_override(self, base: Path, tmp_path: Path) -> None:
        path = write(tmp_path, "top.yaml", "extends: base.yaml\nseed: 2\n")
        assert load(base).recipe.seed == 0
        assert load(path).recipe.seed == 2
        assert load(path, ["seed=3"]).recipe.seed == 3
        assert load(path, ["seed=3", "seed=4"]).recipe.seed == 4

    @pytest.mark.parametrize(
        ("override", "value"),
        [("1e-3", 1e-3), ("010", 10.0), ("0x10", 16.0), (" 2 ", 2.0), ("5", 5.0)],
    )
    def test_scalars(self, base: Path, override: str, value: float) -> None:
        assert load(base, [f"plugins.adamw.lr={override}"]).recipe.plugins["adamw"].lr == value

    def test_null_switches_a_plugin_off(self, base: Path) -> None:
        assert list(load(base, ["plugins.clip=null"]).recipe.plugins) == ["ddp", "adamw"]

    def test_null_for_an_installed_plugin_that_is_off_is_nothing(self, base: Path) -> None:
        assert load(base, ["plugins.sgd=null"]).recipe == load(base).recipe

    def test_a_mapping_replaces_the_section(self, base: Path) -> None:
        adamw = load(base, ["plugins.adamw={lr: 7}"]).recipe.plugins["adamw"]
        assert adamw.lr == 7
        assert adamw.weight_decay != 0.5

    def test_a_new_plugin_comes_last(self, base: Path) -> None:
        assert list(load(base, ["plugins.jsonl={}"]).recipe.plugins)[-1] == "jsonl"

    def test_text_may_hold_equals_signs_colons_and_hashes(self, base: Path) -> None:
        assert load(base, ["run.root=a=b: c #d"]).recipe.run.root == "a=b: c #d"
        assert load(base, ["run.root='5'"]).recipe.run.root == "5"

    def test_list_index(self, tmp_path: Path) -> None:
        text = recipe(data="data: {train: {files: [a.txt, b.txt]}, sequence_length: 32}")
        write(tmp_path, "c.txt", "words " * 2000)
        write(tmp_path, "a.txt", "words " * 2000)
        resolved = load(write(tmp_path, "r.yaml", text), ["data.train.files.1=c.txt"])
        assert resolved.recipe.data.train.files == ["a.txt", "c.txt"]
        assert str(resolved.provenance["data.train.files.1"]) == "override 1 (data.train.files.1)"

    def test_a_section_that_is_null_can_be_filled(self, tmp_path: Path) -> None:
        path = write(tmp_path, "r.yaml", recipe(plugins="plugins:"))
        assert list(load(path, ["plugins.adamw.lr=1"]).recipe.plugins) == ["adamw"]

    def test_bytes_that_are_not_utf8(self, base: Path) -> None:
        assert "not UTF-8" in failure(base, "run.root=a\udcff")[0]


class TestEnvironment:
    def test_types_follow_the_scalar(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STEPS", "0x10")
        monkeypatch.setenv("PLACE", "here")
        text = recipe(training="training: {max_steps: '${env:STEPS}'}")
        assert "quotes" in failure(write(tmp_path, "quoted.yaml", text))[0]
        text = recipe(
            training="training:\n  max_steps: ${env:STEPS}\n  eval_every: ${env:CAMSHAFT_TEST_UNSET:-7}",
            run="run: {root: 'a/${env:PLACE}/${env:CAMSHAFT_TEST_UNSET:-b c}'}",
        )
        found = load(write(tmp_path, "plain.yaml", text)).recipe
        assert (found.training.max_steps, found.training.eval_every, found.run.root) == (16, 7, "a/here/b c")

    def test_a_value_that_is_overridden_needs_no_variable(self, tmp_path: Path) -> None:
        path = write(tmp_path, "r.yaml", recipe(seed="seed: ${env:CAMSHAFT_TEST_UNSET}"))
        assert load(path, ["seed=1"]).recipe.seed == 1

    def test_overrides_are_interpolated_too(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SEED", "12")
        assert load(base, ["seed=${env:SEED}"]).recipe.seed == 12

    def test_keys_are_not_interpolated(self, tmp_path: Path) -> None:
        path = write(tmp_path, "r.yaml", recipe(run="run: {'${env:HOME}': 1}"))
        assert "unknown key '${env:HOME}'" in failure(path)[0]


class TestProvenance:
    def test_every_value_knows_who_set_it(self, base: Path, tmp_path: Path) -> None:
        path = write(tmp_path, "top.yaml", "extends: base.yaml\nseed: 2\n")
        resolved = load(path, ["plugins.adamw.lr=3"])
        told = {key: str(origin) for key, origin in resolved.provenance.items()}
        assert told["seed"] == f"{path}:2"
        assert (
            told["plugins.adamw.weight_decay"]
            == f"{base}:{recipe(plugins=PLUGINS).splitlines().index('    weight_decay: 0.5') + 1}"
        )
        assert told["plugins.adamw.lr"] == "override 1 (plugins.adamw.lr)"
        assert told["training.log_every"] == "default of the schema"
        assert told["plugins.adamw.eps"] == "default of plugin 'adamw'"

    def test_problem_takes_the_place_of_the_nearest_key(self, base: Path) -> None:
        resolved = load(base)
        assert resolved.problem("batch.gradient_accumulation_steps", "m").line == 6
        assert resolved.problem("run.root", "m").line == 1
        assert str(load(base, ["seed=1"]).problem("seed", "m", "f")) == "override 1 (seed): seed: m. Fix: f"

    def test_derived_values_need_the_number_of_processes(self, base: Path) -> None:
        assert load(base, ["launch.processes=auto"]).derived == {}
        assert load(base, world_size=1).derived["batch.gradient_accumulation_steps"][0] == 4
        assert load(base, world_size=4).derived["parallel.data_parallel"][0] == 4

    def test_recipe_is_frozen(self, base: Path) -> None:
        resolved = load(base)
        with pytest.raises(ValidationError, match="frozen"):
            resolved.recipe.training.max_steps = 1
        with pytest.raises(AttributeError):
            resolved.recipe = resolved.recipe


class TestDump:
    def test_reads_back_to_the_same_recipe(self, base: Path, tmp_path: Path) -> None:
        resolved = load(base, ["run.root='a \"b\" \\ ü\u2028 ${env:HOME}'", "seed=7", "run.dir='010'"])
        again = load(write(tmp_path, "resolved.yaml", resolved.dump()))
        assert again.recipe == resolved.recipe
        assert again.values() == resolved.values()
        assert list(again.recipe.plugins) == list(resolved.recipe.plugins)

    def test_every_plugin_reads_back(self, tmp_path: Path) -> None:
        needed = {"wandb": "{project: p}", "zero": "{stage: 1}", "deepspeed": "{stage: 1}"}
        optimizers = {name for name in host.installed() if "lr" in host.plugin_class(name).Options.model_fields}
        needed |= dict.fromkeys(optimizers, "{lr: 1}")
        for name in host.installed():
            resolved = load(
                write(tmp_path, "one.yaml", recipe(plugins=f"plugins:\n  {name}: {needed.get(name, '{}')}"))
            )
            again = load(write(tmp_path, "resolved.yaml", resolved.dump()))
            assert again.recipe == resolved.recipe
            assert list(again.recipe.plugins) == [name]

    @pytest.mark.parametrize(
        "text",
        ["no", "1e-4", "null", " ", " x", "a: b", "# x", "*x", "'", '"', "\t", "a\nb", "[", "~", "\x7f", "é😀", "-"],
    )
    def test_texts_survive(self, base: Path, tmp_path: Path, text: str) -> None:
        resolved = load(
            base, [f"run.root={json.dumps(text, ensure_ascii=False)}"] if text != "\x7f" else ['run.root="\\x7f"']
        )
        assert resolved.recipe.run.root == text
        assert load(write(tmp_path, "resolved.yaml", resolved.dump())).recipe.run.root == text

    def test_says_who_set_each_value(self, base: Path) -> None:
        lines = load(base, ["seed=7"]).dump().splitlines()
        seed = next(line for line in lines if line.startswith("seed:"))
        assert seed.split("#")[1].strip() == "override 1 (seed)"
        assert all("#" in line or line.rstrip().endswith(":") for line in lines[1:])
        accumulation = next(line for line in lines if "gradient_accumulation_steps" in line)
        assert accumulation.endswith("default of the schema; derived: 8 / (2 x 2): 2")


def test_only_named_plugins_are_imported(base: Path) -> None:
    code = (
        "import sys\nfrom camshaft.recipe import check, load\n"
        f"resolved = load({str(base)!r})\ncheck(resolved).require()\n"
        "plugins = [name for name in sys.modules if name.startswith('camshaft_') and '.' not in name]\n"
        "print(sorted(plugins), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "['camshaft_adamw', 'camshaft_clip', 'camshaft_ddp'] False\n", done.stderr


def test_installed_but_unnamed_plugins_are_never_touched(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_plugins.install(monkeypatch, broken="landmine")
    assert "landmine" not in load(base).recipe.plugins
    assert load(base, ["plugins.landmine=null"]).recipe == load(base).recipe

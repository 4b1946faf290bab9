from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardpar.config import demo_config, load
from shardpar.errors import ConfigError

REPO = Path(__file__).parents[2]


def test_no_config_is_the_demo():
    assert load() == load(str(demo_config())) == load("configs/gpt.gin")


def test_defaults_then_file_then_overrides_then_later_overrides(write):
    path = write("run.gin", "train.steps = 40\ntrain.seed = 7")
    config = load(path, ["train.seed=8", "train.log_every=3", "train.seed=9"])
    assert config.train.steps == 40
    assert config.train.seed == 9
    assert config.train.log_every == 3
    assert config.train.global_batch == 8


@pytest.mark.parametrize(
    ("name", "text"),
    [("run.gin", "train.seed = 1"), ("run.yaml", "train: {seed: 1}"), ("run.yml", "train.seed: 1")],
)
def test_overrides_work_the_same_for_gin_and_yaml(write, name, text):
    config = load(
        write(name, text),
        ["train.steps=50", "optimizer.learning_rate=3e-4", "model.layers=6", "plan.file=null"],
    )
    assert (config.train.steps, config.optimizer.learning_rate) == (50, 3e-4)
    assert (config.model.get("layers"), config.plan.file, config.train.seed) == (6, None, 1)


def test_text_in_an_override_needs_no_quotes(folder, write):
    path = write("run.gin", "data.source = 'text'")
    write("a.txt", "a")
    config = load(path, ["data.path=*.txt", "train.sample_prompt=Q: [what]?", "train.run_dir=7"])
    assert config.data.path == str(folder / "*.txt")
    assert config.train.sample_prompt == "Q: [what]?"
    assert config.train.run_dir == "7"


@pytest.mark.parametrize("quoted", ["'The '", '"The "'])
def test_quotes_in_an_override_keep_blanks(write, quoted):
    path = write("run.gin", "train.seed = 1")
    assert load(path, [f"train.sample_prompt={quoted}"]).train.sample_prompt == "The "


def test_null_in_an_override_unsets_what_the_file_set(write):
    path = write("run.gin", "train.sample_prompt = 'a'\nplan.recompute = 'none'")
    config = load(path, ["train.sample_prompt=null", "plan.recompute=null"])
    assert config.train.sample_prompt is None
    assert config.plan.recompute is None


def test_integers_become_floats_where_a_number_is_meant(write):
    config = load(write("run.yaml", "optimizer: {learning_rate: 1}\nmodel: {dropout: 0}"))
    assert isinstance(config.optimizer.learning_rate, float)
    assert isinstance(config.model.get("dropout"), float)


def test_a_config_is_a_hashable_value(write):
    path = write("run.yaml", "model: {source: tiny.py, widths: [1, 2]}")
    assert load(path) == load(path)
    assert len({load(path), load(path)}) == 1
    assert load(path).model.get("widths") == (1, 2)


def test_paths_are_found_beside_the_file_that_names_them(folder, write):
    write("experiments/run.gin", "model.source = 'tiny.py'\ninclude 'texts/data.gin'")
    write("experiments/run.gin", "include 'texts/data.gin'\nmodel.source = 'own.py'")
    write("experiments/texts/data.gin", "data.source = 'text'\ndata.path = 'a.txt'")
    write("experiments/texts/a.txt", "a")
    write("experiments/own.py", (folder / "tiny.py").read_text())
    config = load("experiments/run.gin")
    assert config.data.path == str(folder / "experiments/texts/a.txt")
    assert config.model.source == str(folder / "experiments/own.py")


def test_paths_are_found_in_the_current_folder_after_that(folder, write):
    write("a.txt", "a")
    write("b.txt", "b")
    write("experiments/run.gin", "data.source = 'text'\ndata.path = '?.txt'")
    assert load("experiments/run.gin").data.path == str(folder / "?.txt")


def test_paths_in_overrides_mean_the_current_folder(folder, write):
    write("a.txt", "here")
    write("experiments/a.txt", "there")
    write("experiments/run.gin", "data.source = 'text'\ndata.path = 'a.txt'")
    config = load("experiments/run.gin", ["data.path=a.txt"])
    assert config.data.path == str(folder / "a.txt")


def test_a_folder_with_glob_characters_in_its_name_is_taken_literally(folder, write):
    write("runs [1]/a.txt", "a")
    write("runs [1]/run.gin", "data.source = 'text'\ndata.path = '*.txt'")
    import glob

    assert glob.glob(load("runs [1]/run.gin").data.path) == [str(folder / "runs [1]/a.txt")]


def test_bundled_configs_and_models_are_found_from_anywhere(folder):
    assert load("configs/gpt.gin").model.source == "gpt"
    assert load("configs/gpt.gin", ["model.source=models/gpt.py"]).model.source.endswith("gpt.py")


def test_a_config_of_ones_own_hides_the_bundled_one(write):
    assert load(write("configs/gpt.gin", "train.seed = 5")).train.seed == 5


def test_a_config_of_ones_own_can_include_a_bundled_one(write):
    config = load(write("mine.gin", "include 'configs/gpt.gin'\ntrain.seed = 5"))
    assert (config.train.seed, config.train.steps) == (5, load().train.steps)


def test_all_problems_are_told_at_once(write):
    path = write("run.gin", "train.steps = 0\nmodel.heads = 'x'\noptimizer.name = 'adam'\n")
    with pytest.raises(ConfigError) as error:
        load(path, ["data.source=text", "train.stepz=1", "nonsense"])
    places = [line.split(": ")[0] for line in str(error.value).splitlines()]
    assert sorted(places) == sorted(["command line"] * 3 + ["run.gin:1", "run.gin:2", "run.gin:3"])


def test_a_rule_is_not_applied_to_a_key_that_is_already_wrong(write):
    path = write("run.yaml", "data: {source: textt, path: run.yaml}\ntrain: {eval_every: -1}")
    with pytest.raises(ConfigError) as error:
        load(path)
    assert len(str(error.value).splitlines()) == 2


def test_loading_imports_neither_jax_nor_flax():
    code = (
        "import sys, time; from shardpar import config; config.load('configs/llama_7b.gin'); "
        "heavy = {'jax', 'flax', 'numpy', 'optax'} & set(sys.modules); "
        "sys.exit(f'{heavy} {time.process_time()}' if heavy or time.process_time() > 1 else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_wheel_carries_models_and_configs(tmp_path):
    """The layout that pyproject.toml gives a wheel, with no repository around it."""
    site = tmp_path / "site-packages"
    bundled = site / "shardpar" / "_bundled"
    bundled.mkdir(parents=True)
    for part in REPO.joinpath("shardpar").iterdir():
        (site / "shardpar" / part.name).symlink_to(part)
    (site / "shardpar" / "config").unlink()
    (site / "shardpar" / "config").mkdir()
    for part in REPO.joinpath("shardpar/config").glob("*.py"):
        (site / "shardpar" / "config" / part.name).write_text(part.read_text())
    for name in ("models", "configs"):
        (bundled / name).symlink_to(REPO / name)
    code = "from shardpar import config; config.load(); print(config.demo_config())"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == str(bundled / "configs" / "gpt.gin"), done.stderr

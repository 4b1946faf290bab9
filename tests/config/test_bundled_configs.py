from __future__ import annotations

import pytest

from shardpar.config import bundled_configs, load
from shardpar.config.load import load_any


@pytest.mark.parametrize("name", bundled_configs())
def test_every_bundled_config_loads(name):
    load_any(name)


def test_the_list_of_bundled_configs():
    assert {
        "configs/gpt.gin",
        "configs/gpt.yaml",
        "configs/gpt2_small.gin",
        "configs/gpt2_small.yaml",
        "configs/llama_70b.gin",
        "configs/llama_7b.gin",
    } <= set(bundled_configs())


@pytest.mark.parametrize("name", ["gpt", "gpt2_small"])
def test_gin_and_yaml_say_the_same(name):
    assert load(f"configs/{name}.yaml") == load(f"configs/{name}.gin")


def test_the_demo_reads_nothing_but_what_python_carries():
    config = load("configs/gpt.gin")
    assert (config.data.source, config.data.tokenizer, config.plan.file) == ("pydoc", "byte", None)


def test_the_demo_may_be_cut_short():
    assert load("configs/gpt.gin", ["train.steps=20"]).train.steps == 20


@pytest.mark.parametrize(
    ("name", "billions"), [("configs/llama_7b.gin", 6.74), ("configs/llama_70b.gin", 68.98)]
)
def test_llama_configs_have_the_published_number_of_parameters(name, billions):
    get = load(name).model.get
    width, head = get("width"), get("width") // get("heads")
    attention = 2 * width * width + 2 * width * head * get("kv_heads")
    block = attention + 3 * width * get("mlp_width") + 2 * width
    total = get("layers") * block + 2 * get("vocab_size") * width + width
    assert total / 1e9 == pytest.approx(billions, abs=0.01)


def test_gpt2_small_has_the_published_size():
    get = load("configs/gpt2_small.gin").model.get
    width = get("width")
    total = get("layers") * 12 * width**2 + (get("vocab_size") + get("max_length")) * width
    assert total / 1e6 == pytest.approx(124, abs=1)

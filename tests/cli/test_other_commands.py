"""plan, explain, generate and doctor as people run them."""

from __future__ import annotations

import json

import pytest

from shardpar.planner.strategies import describe
from shardpar.spec.text import graph_from_text, plan_from_text
from tests.cli.command import ROOT, TINY, shardpar

GPT = str(ROOT / "configs" / "gpt.gin")
LLAMA = str(ROOT / "configs" / "llama_7b.gin")
H100 = str(ROOT / "configs" / "clusters" / "h100x8.yaml")


def test_a_plan_is_printed_saved_and_used_again(tmp_path):
    printed = shardpar("plan", GPT, *TINY, "--devices", "8", "--out", "plan.yaml", cwd=tmp_path)
    plan = plan_from_text((tmp_path / "plan.yaml").read_text())
    assert plan.global_batch == 8
    assert len(plan.devices) == 8
    (stage,) = plan.pipelines[0].stages  # what is to run here has one stage
    for strategy in stage.layers:
        assert describe(strategy, stage.mesh) in printed.stdout
    for layers in ("embed", "blocks[0", "head", "outside"):
        assert layers in printed.stdout
    assert plan.objective.gap == 0
    assert "no plan of the searched space is faster by the cost model" in printed.stdout
    dry = shardpar(
        "train", GPT, *TINY, "--devices", "8", "--plan", "plan.yaml", "--dry-run", cwd=tmp_path
    )
    assert "plan for cpux8" in dry.stdout
    assert not (tmp_path / "runs").exists()


def test_layers_fixed_by_hand_stay_so_and_the_rest_is_completed(tmp_path):
    shardpar(
        "plan", GPT, *TINY, "--devices", "8", "--out", "plan.yaml", "--fix",
        "embed zero1=4 fsdp=1; blocks[0] tensor=1 fsdp=4; blocks[1] tensor=4 recompute=full",
        cwd=tmp_path,
    )  # fmt: skip
    plan = plan_from_text((tmp_path / "plan.yaml").read_text())
    (stage,) = plan.pipelines[0].stages
    size = stage.mesh.size_of
    embed, first, second = stage.layers[:3]
    assert [s.layers for s in (embed, first, second)] == ["embed", "blocks[0]", "blocks[1]"]
    assert (size(embed.zero1), embed.fsdp) == (4, ())
    assert (size(first.tensor), size(first.fsdp)) == (1, 4)
    assert (size(second.tensor), second.recompute) == (4, "full")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "blocks tesnor=2",
            'plan.fix: "blocks tesnor=2": tesnor=2 is not one of data, fsdp, tensor, zero1, '
            'context, recompute, sequence_parallel, attention with a value; did you mean "tensor"?',
        ),
        (
            "block tensor=2",
            'layers "block": the model has no such layer; its layers are embed, blocks[0:2], '
            'head, outside; did you mean "blocks[1]"?',
        ),
    ],
)
def test_what_cannot_be_fixed_is_one_line(text, message, tmp_path):
    done = shardpar("plan", GPT, *TINY, "--devices", "8", "--fix", text, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(message)
    assert "Traceback" not in done.stderr


def test_a_plan_for_machines_elsewhere_comes_as_one_json_object(tmp_path):
    done = shardpar("plan", LLAMA, "--cluster", H100, "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert set(found) == {
        "plan", "step_s", "simulated_s", "peak_bytes", "lower_bound_s", "gap", "search_s",
    }  # fmt: skip
    assert found["lower_bound_s"] <= found["step_s"]
    assert found["simulated_s"] == pytest.approx(found["step_s"], rel=0.25)
    assert found["peak_bytes"] < 80e9 * 0.9
    assert plan_from_text(found["plan"]).cluster == "h100x8"


def test_the_readmes_plan_fits_the_readmes_machines(tmp_path):
    readme = (ROOT / "README.md").read_text()
    text = readme.split("```yaml\n", 1)[1].split("```", 1)[0]
    (tmp_path / "plan.yaml").write_text(text)
    done = shardpar("plan", LLAMA, "--cluster", H100, "--plan", "plan.yaml", cwd=tmp_path)
    assert "blocks[16:32]" in done.stdout


def test_what_does_not_fit_says_how_much_is_missing_and_what_would(tmp_path):
    cluster = str(ROOT / "configs" / "clusters" / "tpu-v5e-8.yaml")
    done = shardpar("plan", LLAMA, "--cluster", cluster, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "are missing; it would fit on 16 such devices" in done.stderr


def test_explain_prints_each_value_on_the_way(tmp_path):
    config = shardpar("explain", GPT, *TINY, "--stop-after", "config", cwd=tmp_path)
    assert "learning_rate: 0.001" in config.stdout
    graph = shardpar("explain", GPT, *TINY, "--stop-after", "graph", "--json", cwd=tmp_path)
    from yaml import safe_dump

    assert len(graph_from_text(safe_dump(json.loads(graph.stdout))).layers) == 5
    program = shardpar(
        "explain", GPT, *TINY, "--devices", "8", "plan.fsdp=8", "--stop-after", "program", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    kinds = {c["kind"] for c in json.loads(program.stdout)["collectives"]}
    assert "all-gather" in kinds
    stages = shardpar(
        "explain", GPT, *TINY, "--devices", "4", "plan.stages=2", "plan.tensor=2", "--stop-after",
        "program", "--json", cwd=tmp_path,
    )  # fmt: skip
    programs = {p["name"]: p for p in json.loads(stages.stdout)["programs"]}
    assert sorted(programs) == [
        "pipeline 0, group 0: update", "pipeline 0, group 1: update",
        "pipeline 0, stage 0: backward", "pipeline 0, stage 0: forward",
        "pipeline 0, stage 1: backward", "pipeline 0, stage 1: forward",
    ]  # fmt: skip
    kinds = {c["kind"] for c in programs["pipeline 0, stage 1: forward"]["collectives"]}
    assert "all-reduce" in kinds


def test_explain_draws_every_parameters_layout(tmp_path):
    done = shardpar(
        "explain", GPT, "--devices", "8", "plan.fsdp=2", "plan.tensor=2", "--shardings",
        cwd=tmp_path,
    )  # fmt: skip
    assert "blocks[0:4].qkv" in done.stdout
    assert "dim1/b dim2/c" in done.stdout
    assert "0,4" in done.stdout


@pytest.mark.slow
def test_the_graph_of_a_big_model_needs_no_accelerator(tmp_path):
    done = shardpar("explain", LLAMA, "--stop-after", "graph", cwd=tmp_path)
    assert "6.74B parameters" in done.stdout
    assert "blocks[0:32]" in done.stdout


@pytest.mark.slow
def test_generate_continues_a_text_the_same_way_for_the_same_seed(tmp_path):
    shardpar("train", GPT, *TINY, "train.steps=10", "train.run_dir=run", cwd=tmp_path)
    texts = [
        json.loads(
            shardpar(
                "generate", "run", "--prompt", "The ", "--tokens", "40", "--seed", seed, "--json",
                cwd=tmp_path,
            ).stdout
        )["text"]
        for seed in ("1", "1", "2")
    ]  # fmt: skip
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("The ") for text in texts)
    missing = shardpar("generate", "nowhere", cwd=tmp_path, check=False)
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: nowhere is not there")


def test_doctor_finds_this_machine_fit(tmp_path):
    findings = json.loads(shardpar("doctor", "--json", "--devices", "2", cwd=tmp_path).stdout)
    levels = {finding["level"] for finding in findings["findings"]}
    assert "problem" not in levels
    assert any("2 x cpu" in finding["what"] for finding in findings["findings"])


def test_a_missing_cluster_file_is_one_line(tmp_path):
    done = shardpar("plan", GPT, "--cluster", "nowhere.yaml", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr
    assert "Traceback" not in done.stderr


PARTIAL = "[0,1]{split0:2} + [2] across partial"
WHOLE = "[0,1]{split0:2} + [2] across dup"


def test_a_reshard_is_one_json_object_with_its_communications_and_bytes(tmp_path):
    done = shardpar("reshard", PARTIAL, WHOLE, "--shape", "8,8", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert [(c["kind"], c["groups"], c["bytes"]) for c in found["communications"]] == [
        ("split-all-reduce", [[0, 2], [1, 2]], 512)
    ]
    assert found["bytes_sent"] == found["bytes_received"] == {"0": 128, "1": 128, "2": 256}
    assert found["total_bytes"] == found["lower_bound_bytes"] == 512


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_reshard_is_drawn_and_told(kind, tmp_path):
    done = shardpar(
        "reshard", "[0,1]{split0:2}", "[2,3]{split1:2} + [4] across dup", "--shape", "8,8",
        "--dtype", "bfloat16", "--out", f"picture.{kind}", cwd=tmp_path,
    )  # fmt: skip
    assert "0 → 4  [0:4, 0:8]  64 B" in done.stdout
    assert "256 B cross; the lower bound is 256 B (1.00x)" in done.stdout
    start = (tmp_path / f"picture.{kind}").read_bytes()[:200]
    assert b"PNG" in start if kind == "png" else b"<?xml" in start


def test_a_reshard_on_a_cluster_counts_seconds_of_its_links(tmp_path):
    done = shardpar(
        "reshard", "[0,8]{dup:2}", "[1,2,9,10]{dup:4}", "--shape", "1024,1024", "--json",
        "--cluster", str(ROOT / "configs" / "clusters" / "h100x64.yaml"), cwd=tmp_path,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["bytes_sent"] == {"0": 2**23, "8": 2**23, "1": 0, "2": 0, "9": 0, "10": 0}
    assert found["busiest_link_s"] == pytest.approx(2**23 / 450e9)


BAD_RESHARDS = {
    ("[0,1]{split0:2} + [1] across dup", "[0]", "8,8"): "device 1 is in group 0 and in group 1",
    ("[0,1,2]{split0:3}", "[0]", "8,8"): "3 parts, which do not divide its 8 indices",
    ("[0,1]{split2:2}", "[0]", "8,8"): "splits dim 2, but the array has 2 dims",
    ("[0] + [1] across split0(5,4)", "[0]", "8,8"): "add up to 9, but dim 0",
    ("[0]", "[0", "8,8"): 'DST column 3: expected "]" after the devices, got the end',
    ("[0]", "[0]", "8,x"): '--shape is "8,x"; write the size of each dim',
    ("[0]", "[0]", "0"): '--shape is "0"; write the size of each dim',
}


@pytest.mark.parametrize("case", BAD_RESHARDS)
def test_layouts_that_cannot_be_are_one_line_and_exit_code_2(case, tmp_path):
    src, dst, shape = case
    done = shardpar("reshard", src, dst, "--shape", shape, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert BAD_RESHARDS[case] in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("extra", [("--out", "x.gif"), ("--dtype", "float3"), ("--cluster", "no")])
def test_options_of_a_reshard_that_cannot_be_are_one_line_and_exit_code_2(extra, tmp_path):
    done = shardpar("reshard", "[0]", "[9]", "--shape", "4", *extra, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1

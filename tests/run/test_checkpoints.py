"""Saving, restoring, damage and retention, judged by the bytes of the arrays."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardpar.errors import CheckpointError, RunError
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.manifest import Fault, check
from shardpar.run.options import CheckpointOptions
from tests.run.run_states import Moments, bits, make_state, split_over, target_of

FILES = {"data.json": '{"position": 7}', "config.yaml": "train:\r\n  steps: 3\n", "plan.yaml": "é"}


def save_steps(directory: Path, *steps: int, keep: int = 9, keep_every: int = 0) -> None:
    options = CheckpointOptions(keep=keep, keep_every_steps=keep_every)
    with Checkpoints(directory, options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), FILES)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10, 20 and 30; tests that harm it copy it first."""
    directory = tmp_path_factory.mktemp("stored") / "checkpoints"
    save_steps(directory, 10, 20, 30)
    return directory


@pytest.fixture
def copy(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "checkpoints"))


def test_every_kind_of_leaf_comes_back_bit_for_bit_with_its_files(stored: Path) -> None:
    state = make_state(20)
    with Checkpoints(stored, read_only=True) as checkpoints:
        restored = checkpoints.restore(20, target_of(state))
    assert restored.step == 20
    assert restored.files == FILES
    assert restored.damaged == ()
    assert bits(restored.state) == bits(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert jax.random.key_impl(restored.state["key"]) == jax.random.key_impl(state["key"])


def test_without_a_step_the_newest_is_restored(stored: Path) -> None:
    with Checkpoints(stored, read_only=True) as checkpoints:
        assert checkpoints.steps() == (10, 20, 30)
        restored = checkpoints.restore(None, target_of(make_state(0)))
    assert bits(restored.state) == bits(make_state(30))


def test_names_come_from_paths_and_not_from_the_containers(tmp_path: Path) -> None:
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Old:
        params: dict[str, jax.Array]
        moments: Moments

    array = jnp.arange(3.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, Old({"w": array}, Moments(jnp.int32(1), {"w": array})))
        wanted = {"params": {"w": array}, "moments": {"count": jnp.int32(0), "mu": {"w": array}}}
        restored = checkpoints.restore(1, target_of(wanted))
    assert restored.state["moments"]["count"] == 1


@pytest.mark.parametrize("axes", [(), (4, 2)], ids=["one device", "sharded"])
def test_buffers_donated_right_after_saving_do_not_reach_the_disk(
    tmp_path: Path, axes: tuple[int, ...]
) -> None:
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 3 + 1, tree), donate_argnums=0)
    state = {f"w{number}": jnp.full((256, 64), float(number)) for number in range(20)}
    if axes:
        state = jax.device_put(state, jax.tree.map(split_over(jax.devices(), *axes), state))
    expected = {}
    with Checkpoints(tmp_path, CheckpointOptions(keep=9)) as checkpoints:
        for number in range(1, 6):
            expected[number] = bits(jax.tree.map(np.array, state))
            buffer = state["w3"].addressable_shards[0].data.unsafe_buffer_pointer()
            checkpoints.save(number, state)
            state = step(state)
            # The donation is real: the new value lies where the saved one lay.
            reused = state["w3"].addressable_shards[0].data.unsafe_buffer_pointer()
            assert reused == buffer
        for number, before in expected.items():
            assert bits(checkpoints.restore(number, target_of(state)).state) == before


def test_a_restored_state_may_itself_be_donated(stored: Path) -> None:
    with Checkpoints(stored, read_only=True) as checkpoints:
        params = checkpoints.restore(30, target_of(make_state(0))).state["params"]
        doubled = jax.jit(lambda t: jax.tree.map(lambda x: x * 2, t), donate_argnums=0)(params)
        again = checkpoints.restore(30, target_of(make_state(0))).state["params"]
    assert bits(doubled) == bits(jax.tree.map(lambda leaf: leaf * 2, make_state(30)["params"]))
    assert bits(again) == bits(make_state(30)["params"])


def files_of(step: Path) -> list[str]:
    return sorted(p.relative_to(step).as_posix() for p in step.rglob("*") if p.is_file())


def test_a_flipped_bit_in_any_file_is_named_and_the_step_before_is_used(copy: Path) -> None:
    target = target_of(make_state(0))
    names = files_of(copy / "30")
    assert {"manifest.json", "data.json"} < set(names)
    assert any(name.startswith("arrays/ocdbt.process_0/d/") for name in names)
    random = np.random.default_rng(0)
    for name in names:
        harmed = copy / "30" / name
        content = bytearray(harmed.read_bytes())
        content[random.integers(len(content))] ^= 1 << random.integers(8)
        whole = harmed.read_bytes()
        harmed.write_bytes(content)
        said: list[str] = []
        with Checkpoints(copy, notify=said.append, read_only=True) as checkpoints:
            assert checkpoints.verify(30) == (Fault(name, "damaged"),)
            restored = checkpoints.restore(None, target)
        assert restored.step == 20, name
        assert restored.damaged == ((30, name),)
        assert bits(restored.state) == bits(make_state(20))
        assert len(said) == 1
        assert name in said[0]
        assert "step 20 is used instead" in said[0]
        harmed.write_bytes(whole)
    assert check(copy / "30") == ()


def test_no_byte_of_a_manifest_can_change_unnoticed(copy: Path) -> None:
    manifest = copy / "30" / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(0, len(whole), 5):
        for bit in (1, 4, 32):
            changed = bytearray(whole)
            changed[place] ^= bit
            manifest.write_bytes(changed)
            assert check(copy / "30") == (Fault("manifest.json", "damaged"),)
    for length in (0, 1, 70, 100, len(whole) - 1):
        manifest.write_bytes(whole[:length])
        assert check(copy / "30") == (Fault("manifest.json", "damaged"),)
    manifest.write_bytes(whole + b" ")
    assert check(copy / "30") == (Fault("manifest.json", "damaged"),)


def test_a_missing_or_shortened_file_is_named(copy: Path) -> None:
    arrays = [name for name in files_of(copy / "30") if name.startswith("arrays/")]
    name = max(arrays, key=lambda name: (copy / "30" / name).stat().st_size)
    largest = copy / "30" / name
    largest.write_bytes(largest.read_bytes()[:-1])
    assert check(copy / "30") == (Fault(name, "damaged"),)
    largest.unlink()
    (copy / "30" / "data.json").unlink()
    assert check(copy / "30") == (Fault(name, "missing"), Fault("data.json", "missing"))


def test_a_stray_file_is_reported_but_does_no_harm(copy: Path) -> None:
    (copy / "30" / "config.yaml~").write_text("an editor was here")
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.verify(30) == (Fault("config.yaml~", "extra"),)
        restored = checkpoints.restore(None, target_of(make_state(0)))
    assert restored.step == 30
    assert restored.files == FILES


def test_a_writer_moves_damaged_steps_aside_and_can_save_them_anew(
    copy: Path, tmp_path: Path
) -> None:
    target = target_of(make_state(0))
    for round_ in range(2):
        harmed = copy / "30" / "data.json"
        harmed.write_text("{}")
        said: list[str] = []
        with Checkpoints(copy, notify=said.append) as checkpoints:
            assert checkpoints.restore(None, target).step == 20
            assert checkpoints.steps() == (10, 20)
            checkpoints.save(30, make_state(30), FILES)
            checkpoints.wait()
            assert checkpoints.restore(None, target).damaged == ()
        moved = "30.damaged" if round_ == 0 else "30.damaged-2"
        assert (copy / moved / "data.json").read_text() == "{}"
        assert f"moved to {moved}" in said[0]


def test_when_nothing_is_whole_the_error_says_what_was_found_and_nothing_is_moved(
    copy: Path,
) -> None:
    for step in (10, 20, 30):
        (copy / str(step) / "plan.yaml").write_text("x")
    with Checkpoints(copy) as checkpoints:
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore(None, target_of(make_state(0)))
        assert checkpoints.steps() == (10, 20, 30)
    message = str(caught.value)
    for step in (10, 20, 30):
        assert f"step {step}: plan.yaml (damaged)" in message
    assert "\n" not in message


def test_a_damaged_step_that_was_asked_for_is_an_error_and_no_other_is_taken(copy: Path) -> None:
    (copy / "20" / "plan.yaml").write_text("x")
    with Checkpoints(copy) as checkpoints:
        with pytest.raises(CheckpointError, match=r"step 20: plan\.yaml \(damaged\)"):
            checkpoints.restore(20, target_of(make_state(0)))
        with pytest.raises(CheckpointError, match="holds no step 25: steps 10, 20, 30 are stored"):
            checkpoints.restore(25, target_of(make_state(0)))


def test_an_empty_directory_has_nothing_to_restore(tmp_path: Path) -> None:
    for read_only in (True, False):
        with (
            Checkpoints(tmp_path / "none", read_only=read_only) as checkpoints,
            pytest.raises(CheckpointError, match=r"nothing to restore.*no step is stored"),
        ):
            checkpoints.restore(None, target_of(make_state(0)))


def test_a_directory_without_a_manifest_is_no_step_and_is_kept(copy: Path) -> None:
    (copy / "30" / "manifest.json").unlink()
    (copy / "40.saving" / "arrays").mkdir(parents=True)
    (copy / "5.expired").mkdir()
    (copy / "notes").mkdir()
    said: list[str] = []
    with Checkpoints(copy, notify=said.append) as checkpoints:
        assert checkpoints.steps() == (10, 20)
    assert sorted(path.name for path in copy.iterdir()) == [
        ".lock",
        "10",
        "20",
        "30.incomplete",
        "notes",
    ]
    assert "moved to 30.incomplete" in said[0]


def test_a_target_of_another_model_is_refused_with_the_leaves_that_differ(stored: Path) -> None:
    state = make_state(0)
    params = state["params"]
    cases = {
        "params/head is not stored (wanted float32[2])": {**params, "head": jnp.ones(2)},
        "params/embed is stored (bfloat16[8,4]) but not wanted": {
            "blocks/0/kernel": params["blocks/0/kernel"]
        },
        "params/embed is bfloat16[8,4], wanted float32[8,4]": {
            **params,
            "embed": params["embed"].astype(jnp.float32),
        },
        "params/embed is bfloat16[8,4], wanted bfloat16[4,8]": {
            **params,
            "embed": params["embed"].T,
        },
    }
    with Checkpoints(stored, read_only=True) as checkpoints:
        for words, wanted in cases.items():
            with pytest.raises(CheckpointError) as caught:
                checkpoints.restore(None, target_of({**state, "params": wanted}))
            assert words in str(caught.value)
        other_keys = {**state, "key": jax.random.key(0, impl="rbg")}
        with pytest.raises(CheckpointError, match=r"key is key<fry>\[\], wanted key<rbg>\[\]"):
            checkpoints.restore(None, target_of(other_keys))
        many = {f"w{number}": jnp.ones(1) for number in range(9)}
        with pytest.raises(CheckpointError, match="and 16 more"):
            checkpoints.restore(None, target_of(many))


def test_a_part_of_the_state_can_be_read_alone(stored: Path) -> None:
    state = make_state(20)
    part = {"params": state["params"], "key": state["key"]}
    with Checkpoints(stored, read_only=True) as checkpoints:
        restored = checkpoints.restore(20, target_of(part), partial=True)
    assert bits(restored.state) == bits(part)


def test_a_target_without_sharding_is_refused(stored: Path) -> None:
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state(0))
    with (
        Checkpoints(stored, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"give each jax\.ShapeDtypeStruct a sharding"),
    ):
        checkpoints.restore(None, target)


def test_the_newest_and_the_milestones_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, *range(10, 100, 10), keep=2, keep_every=40)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == (40, 80, 90)
        assert all(checkpoints.verify(step) == () for step in checkpoints.steps())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "40", "80", "90"]


def test_an_old_step_is_only_deleted_once_the_new_one_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_finish = threading.Event()
    with Checkpoints(tmp_path, CheckpointOptions(keep=1)) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.wait()
        finish = checkpoints._store.finish_write
        monkeypatch.setattr(
            checkpoints._store, "finish_write", lambda: (may_finish.wait(30), finish())
        )
        checkpoints.save(2, make_state(2))
        assert checkpoints.steps() == (1,)
        may_finish.set()
        checkpoints.wait()
        assert checkpoints.steps() == (2,)


def test_saving_the_same_step_twice_does_nothing_but_an_older_one_is_refused(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    with Checkpoints(tmp_path, notify=said.append) as checkpoints:
        for step in (1, 2, 2, 3):
            checkpoints.save(step, make_state(step))
        with pytest.raises(CheckpointError, match="already holds step 2"):
            checkpoints.save(2, make_state(2))
        restored = checkpoints.restore(1, target_of(make_state(0)))
        checkpoints.discard_after(restored.step)
        checkpoints.save(1, restored.state)
        checkpoints.save(2, make_state(5))
        checkpoints.wait()
        assert bits(checkpoints.restore(None, target_of(make_state(0))).state) == bits(
            make_state(5)
        )
    assert [message.split(":")[-1] for message in said] == [
        " moved to 2.abandoned",
        " moved to 3.abandoned",
    ]


def test_two_trainers_cannot_write_one_directory_but_anyone_can_read(stored: Path) -> None:
    with Checkpoints(stored):
        with pytest.raises(RunError, match="already being written by process"):
            Checkpoints(stored)
        with Checkpoints(stored, read_only=True) as reader:
            assert reader.restore(None, target_of(make_state(0))).step == 30
            with pytest.raises(CheckpointError, match="reading only"):
                reader.save(40, make_state(40))
    Checkpoints(stored).close()


def test_a_closed_writer_saves_no_more(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.close()
    checkpoints.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpoints.save(1, make_state(1))


def test_the_error_that_ends_a_run_is_not_hidden_by_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def run() -> None:
        with Checkpoints(tmp_path, notify=said.append) as checkpoints:
            finish = checkpoints._store.finish_write

            def fail() -> None:
                finish()
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(checkpoints._store, "finish_write", fail)
            checkpoints.save(1, make_state(1))
            raise KeyError("the run's own")

    with pytest.raises(KeyError):
        run()
    assert "step 1 could not be saved" in said[0]
    assert "the disk is full" in said[0]


@pytest.mark.parametrize("name", ["arrays", "manifest.json", "../x", "a/b", "", ".."])
def test_files_cannot_take_the_names_of_others(tmp_path: Path, name: str) -> None:
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="cannot be the name"),
    ):
        checkpoints.save(1, {"w": jnp.ones(2)}, {name: "x"})


def test_leaves_that_are_no_arrays_or_share_a_name_are_refused(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="leaf step is a int, not an array"):
            checkpoints.save(1, {"step": 3})
        with pytest.raises(CheckpointError, match="both called a/b"):
            checkpoints.save(1, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})
        assert checkpoints.steps() == ()


def test_a_step_of_a_later_format_is_not_taken_for_damaged(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardpar.run.manifest.MANIFEST_FORMAT", "shardpar-checkpoint/9")
    save_steps(copy, 40)
    monkeypatch.undo()
    with (
        Checkpoints(copy) as checkpoints,
        pytest.raises(CheckpointError, match="another version of shardpar"),
    ):
        checkpoints.restore(None, target_of(make_state(0)))
    assert (copy / "40" / "manifest.json").is_file()


def test_a_run_whose_only_steps_were_set_aside_does_not_begin_anew(copy: Path) -> None:
    for step in ("10", "20"):
        shutil.rmtree(copy / step)
    (copy / "30" / "manifest.json").unlink()
    with Checkpoints(copy, notify=lambda _: None) as checkpoints:
        assert checkpoints.steps() == ()
        with pytest.raises(CheckpointError, match=r"moved aside: 30.incomplete.*begin again from"):
            checkpoints.require_none_lost()


def test_a_fresh_directory_has_lost_nothing(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.require_none_lost()

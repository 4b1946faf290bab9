import gc
import itertools
import json
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import DataError
from shardpar.train.data import TokenWindows, eval_batches, load_text, train_batches
from shardpar.train.options import DataOptions
from shardpar.train.tokenizer import ByteTokenizer, train_bpe


def windows_of(count, length=4, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 256, count * length + 1, np.uint8)
    return TokenWindows(tokens, length, "byte")


def ids(batches, count):
    return [i for _ in range(count) for i in next(batches)["sample"].tolist()]


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 20))
def test_each_token_is_predicted_once_from_its_own_past(size, length):
    tokens = np.arange(size, dtype=np.uint16)
    windows = TokenWindows(tokens, length)
    predicted = [t for i in range(len(windows)) for t in windows[i]["targets"].tolist()]
    assert predicted == list(range(1, len(windows) * length + 1))
    assert size - 1 - len(predicted) < length
    for i in range(len(windows)):
        sample = windows[i]
        assert (sample["inputs"] + 1 == sample["targets"]).all()
        assert sample["inputs"].shape == (length,)
        assert int(sample["sample"]) == i
    for outside in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[outside]


def test_batches_have_the_shapes_and_types_a_step_takes():
    with train_batches(windows_of(10), 3, seed=0) as batches:
        batch = next(batches)
    shapes = {
        key: (array.shape, array.dtype, array.flags.c_contiguous) for key, array in batch.items()
    }
    assert shapes == {
        "inputs": ((3, 4), np.int32, True),
        "targets": ((3, 4), np.int32, True),
        "sample": ((3,), np.int64, True),
    }


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.data(), st.integers(0, 2**40))
def test_every_epoch_has_each_sample_once_with_its_own_tokens(count, data, seed):
    batch = data.draw(st.integers(1, count))
    epochs = 3
    windows = windows_of(count)
    with train_batches(windows, batch, seed) as batches:
        rows = []
        while len(rows) < epochs * count:
            got = next(batches)
            rows += list(zip(got["sample"], got["inputs"], got["targets"], strict=True))
    for epoch in range(epochs):
        part = rows[epoch * count : (epoch + 1) * count]
        assert Counter(int(i) for i, _, _ in part) == Counter(range(count))
    for i, inputs, targets in rows:
        expected = windows.tokens[i * 4 : i * 4 + 5]
        assert inputs.tolist() == expected[:-1].tolist()
        assert targets.tolist() == expected[1:].tolist()


def test_the_order_depends_on_seed_and_epoch_and_not_on_the_batch():
    count = 60
    order = {}
    for seed, batch in itertools.product((0, 1, 2, 2**40), (1, 4, 7, 60)):
        with train_batches(windows_of(count), batch, seed) as batches:
            order[seed, batch] = ids(batches, -(-3 * count // batch))[: 3 * count]
    for seed in (0, 1, 2, 2**40):
        assert len({tuple(order[seed, batch]) for batch in (1, 4, 7, 60)}) == 1
    epochs = {
        tuple(order[seed, 1][e * count : (e + 1) * count])
        for seed in (0, 1, 2, 2**40)
        for e in range(3)
    }
    assert len(epochs) == 12
    assert tuple(range(count)) not in epochs


def test_the_order_is_the_one_earlier_runs_had():
    with train_batches(windows_of(1000), 8, seed=0) as batches:
        assert ids(batches, 1) == [233, 815, 962, 246, 407, 428, 821, 490]


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (7, 7), (50, 8), (1, 1)])
def test_a_restored_iterator_gives_the_very_same_batches(count, batch):
    windows = windows_of(count)
    with train_batches(windows, batch, seed=5) as unbroken:
        positions, expected = [unbroken.position], []
        for _ in range(12):
            expected.append(next(unbroken))
            positions.append(unbroken.position)
    for taken, position in enumerate(positions):
        saved = json.loads(json.dumps(position))
        assert saved["samples"] == taken * batch
        with train_batches(windows_of(count), batch, seed=5) as resumed:
            resumed.restore(saved)
            assert resumed.position == position
            assert all(equal(next(resumed), want) for want in expected[taken:])


def test_restoring_back_and_forth_in_one_iterator():
    with train_batches(windows_of(20), 3, seed=1) as batches:
        start = batches.position
        first = ids(batches, 9)
        batches.restore(start)
        assert ids(batches, 9) == first
        middle = batches.position
        later = ids(batches, 4)
        batches.restore(middle)
        assert ids(batches, 4) == later


@settings(max_examples=20, deadline=None)
@given(st.integers(10, 40), st.lists(st.tuples(st.integers(1, 10), st.integers(0, 4)), max_size=6))
def test_changing_the_batch_on_resume_loses_and_repeats_no_sample(count, legs):
    windows = windows_of(count)
    seen, position = [], None
    for batch, steps in legs:
        with train_batches(windows, batch, seed=2) as batches:
            if position:
                batches.restore(position)
            seen += ids(batches, steps)
            position = batches.position
            assert position["samples"] == len(seen)
    with train_batches(windows, 1, seed=2) as batches:
        assert seen == ids(batches, len(seen))


def test_the_position_does_not_run_ahead_with_the_background_thread():
    read = []

    class Watched(TokenWindows):
        def gather(self, samples):
            read.append(len(samples))
            return super().gather(samples)

    windows = windows_of(40)
    with train_batches(Watched(windows.tokens, 4, "byte"), 2, seed=0) as batches:
        next(batches)
        deadline = time.monotonic() + 5
        while len(read) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(read) >= 3
        assert batches.position["samples"] == 2
        assert batches.position["next"] == next(batches)["sample"][0]


def test_the_position_is_small():
    with train_batches(windows_of(1000), 8, seed=2**60) as batches:
        ids(batches, 50)
        assert len(json.dumps(batches.position)) < 350


def position_of(windows, seed=0):
    with train_batches(windows, 2, seed) as batches:
        ids(batches, 3)
        return batches.position


def refusal(windows, position, seed=0):
    with train_batches(windows, 2, seed) as batches:
        first = ids(batches, 1)
        with pytest.raises(DataError) as caught:
            batches.restore(position)
        assert "\n" not in str(caught.value)
        # refused, and not moved
        assert batches.position["samples"] == len(first)
    return str(caught.value)


def test_a_position_of_other_data_is_refused_with_the_reason():
    windows = windows_of(20)
    position = position_of(windows)
    other_text = windows_of(20, seed=1)
    assert "the text is not the one" in refusal(other_text, position)
    assert "(samples: 20 then, 21 now)" in refusal(windows_of(21), position)
    shorter = TokenWindows(windows.tokens, 2, "byte")
    assert "write data.sequence_length=4" in refusal(shorter, position)
    other = TokenWindows(windows.tokens, 4, "bpe")
    assert "the tokenizer is not the one" in refusal(other, position)
    assert "write train.seed=0" in refusal(windows, position, seed=1)


def test_one_changed_token_is_noticed():
    windows = windows_of(20)
    tokens = windows.tokens.copy()
    tokens[-1] ^= 1
    assert "tokens" in refusal(TokenWindows(tokens, 4, "byte"), position_of(windows))


def test_another_shuffle_order_is_noticed():
    position = position_of(windows_of(20))
    position["next"] = (position["next"] + 1) % 20
    assert "install the version of grain" in refusal(windows_of(20), position)


@pytest.mark.parametrize("damage", [-1, 2**60, 1.0, True, None, "6"])
def test_a_damaged_position_is_refused(damage):
    position = position_of(windows_of(20))
    assert "it is damaged" in refusal(windows_of(20), position | {"samples": damage})
    assert "it is damaged" in refusal(windows_of(20), position | {"data": damage})


@pytest.mark.parametrize("nothing", [{}, [], None, {"format": "other/1"}])
def test_what_is_no_position_is_refused(nothing):
    assert "'shardpar-position/1' was expected" in refusal(windows_of(20), nothing)


def test_too_little_text_says_how_much_there_is_and_what_to_change():
    windows = TokenWindows(np.zeros(30, np.uint8), 8)
    with pytest.raises(DataError) as caught:
        train_batches(windows, 4, seed=0)
    assert str(caught.value) == (
        "the training text has 30 tokens, which make 3 samples of 8, fewer than one batch of 4; "
        "lower train.global_batch or data.sequence_length, or give more text"
    )
    with pytest.raises(DataError, match=r"raise data\.eval_fraction"):
        eval_batches(TokenWindows(np.zeros(0, np.uint8), 8), 4, 2)
    with pytest.raises(DataError, match="write 1 or more"):
        train_batches(windows, 0, seed=0)


@settings(deadline=None)
@given(st.integers(1, 80), st.data(), st.integers(1, 9))
def test_eval_batches_are_fixed_distinct_and_spread(count, data, wanted):
    batch = data.draw(st.integers(1, count))
    windows = windows_of(count)
    batches = eval_batches(windows, batch, wanted)
    assert len(batches) == min(wanted, count // batch)
    seen = [i for b in batches for i in b["sample"].tolist()]
    assert seen == sorted(set(seen))
    assert seen[-1] >= count - 1 - count // len(seen)
    assert all(map(equal, batches, eval_batches(windows, batch, wanted)))


def test_load_text_keeps_the_two_parts_apart():
    data = load_text(DataOptions(eval_fraction=0.1))
    train, evaluation = data.train.tokens, data.evaluation.tokens
    assert data.name == "pydoc"
    assert 0.09 < evaluation.size / (train.size + evaluation.size) < 0.11
    assert bytes(evaluation[:200]) not in bytes(train)
    assert len(load_text(DataOptions(eval_fraction=0.0)).evaluation) == 0


def test_bpe_learns_from_the_training_part_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abab cdcd " * 300 + "xyzxyz" * 500)
    options = DataOptions(
        source="text", path=str(path), tokenizer="bpe", vocab_size=300, eval_fraction=0.5
    )
    data = load_text(options)
    assert "xyz" not in data.tokenizer.to_text()
    again = load_text(options, data.tokenizer)
    assert again.train.identity == data.train.identity
    assert data.tokenizer.decode(data.evaluation.tokens).endswith("xyzxyz")


def test_a_run_keeps_its_kind_of_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"write data\.tokenizer=byte"):
        load_text(DataOptions(tokenizer="bpe"), ByteTokenizer())
    from shardpar.train.corpus import Corpus

    with pytest.raises(DataError, match=r"write data\.tokenizer=bpe"):
        load_text(DataOptions(), train_bpe(Corpus.of(["a"]), 257))


def reading_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def test_closing_ends_the_thread_and_next_says_so():
    batches = train_batches(windows_of(50), 2, seed=0)
    next(batches)
    position = batches.position
    batches.close()
    batches.close()
    assert batches.position == position
    for use in (lambda: next(batches), lambda: batches.restore(position)):
        with pytest.raises(ValueError, match="closed"):
            use()
    with train_batches(windows_of(50), 2, seed=0) as restored:
        for _ in range(5):
            next(restored)
            restored.restore(position)
    deadline = time.monotonic() + 5
    while reading_threads() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not reading_threads()


UNCLOSED = """
import sys, numpy as np
from shardpar.train.data import TokenWindows, train_batches
batches = train_batches(TokenWindows(np.arange(1001) % 251, 4), 8, seed=0)
next(batches)
print(next(batches)["sample"].tolist())
sys.exit(int(sys.argv[1])) if sys.argv[1] != "raise" else 1 / 0
"""


@pytest.mark.parametrize(("end", "code"), [("0", 0), ("3", 3), ("raise", 1)])
def test_a_process_that_closes_nothing_still_ends(end, code):
    run = subprocess.run(
        [sys.executable, "-c", UNCLOSED, end],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == code
    with train_batches(TokenWindows(np.arange(1001) % 251, 4), 8, seed=0) as batches:
        next(batches)
        assert json.loads(run.stdout) == next(batches)["sample"].tolist()

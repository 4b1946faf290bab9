"""Whose example is whose, who takes part, and what is wrong with a folder of clients."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import CaptureError, DataError
from shardpar.fl.clients import ClientData, write_clients
from shardpar.fl.cohort import LocalWork, bucketed, pack, sample_cohort
from shardpar.fl.examples import order_of
from shardpar.fl.kept import KeptStates
from shardpar.fl.partition import dirichlet, iid, shards
from shardpar.fl.task import Task

LABELS = np.random.default_rng(0).integers(0, 5, 200)
SPLITS = {
    "iid": lambda parties, seed: iid(200, parties, seed=seed),
    "dirichlet": lambda parties, seed: dirichlet(LABELS, parties, alpha=1.0, seed=seed),
    "shards": lambda parties, seed: shards(LABELS, parties, each=2, seed=seed),
}


@pytest.mark.parametrize("name", SPLITS)
@settings(max_examples=20, deadline=None)
@given(parties=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_every_example_has_one_owner_and_every_party_some(name, parties, seed):
    parts = SPLITS[name](parties, seed)
    assert len(parts) == parties
    assert sorted(np.concatenate(parts).tolist()) == list(range(200))
    assert min(map(len, parts)) > 0
    again = SPLITS[name](parties, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_a_small_alpha_skews_labels():
    def most_common(alpha):
        parts = dirichlet(LABELS, 8, alpha=alpha, seed=1)
        return np.mean([np.bincount(LABELS[part]).max() / len(part) for part in parts])

    assert most_common(0.1) > most_common(100.0) + 0.2


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 3), st.integers(0, 99))
def test_each_epoch_shows_each_example_once(examples, batch, epochs, seed):
    order = order_of(examples, batch=batch, epochs=epochs, seed=seed, round_=1, client=2)
    for epoch in np.split(order, epochs):
        assert sorted(epoch[epoch >= 0].tolist()) == list(range(examples))
    other = order_of(examples, batch=batch, epochs=epochs, seed=seed, round_=2, client=2)
    if examples > 20:
        assert not np.array_equal(order, other)


def test_cohorts_change_from_round_to_round_and_take_everyone_in_time():
    rounds = [sample_cohort(20, 5, seed=3, round_=r) for r in range(60)]
    assert all(len(set(cohort.tolist())) == 5 for cohort in rounds)
    counts = np.bincount(np.concatenate(rounds), minlength=20)
    assert counts.min() >= 3
    assert counts.max() <= 30


@given(st.integers(1, 10**6))
def test_sizes_are_rounded_up_by_an_eighth_at_most(size):
    assert size <= bucketed(size) <= max(size, size * 9 / 8)


def test_a_packed_cohort_holds_its_clients_rows_and_no_others():
    arrays = {"x": np.arange(30, dtype=np.float32)}
    data = ClientData.of(arrays, [np.arange(0, 3), np.arange(3, 13), np.arange(13, 30)])
    cohort = pack(data, [2, 0], LocalWork(batch=4), round_=0, devices=2)
    rows, order = cohort.arrays["x"].reshape(2, -1), cohort.order.reshape(2, -1)
    slots = cohort.clients.reshape(2, -1)
    for device in range(2):
        (client,) = [c for c in slots[device] if c >= 0]
        seen = rows[device][order[device][order[device] >= 0]]
        assert sorted(seen.tolist()) == data.of_client(int(client))["x"].tolist()
    with pytest.raises(DataError, match="asks for client 3"):
        pack(data, [3], LocalWork(), round_=0)


def test_a_cohort_after_another_is_what_it_is_alone_and_reads_the_same_clients_once():
    arrays = {"x": np.arange(60, dtype=np.float32)}
    data = ClientData.of(arrays, np.split(np.arange(60), [3, 13, 30]))
    work = LocalWork(batch=4)
    before = pack(data, [0, 1, 3], work, round_=0)
    for clients in ([0, 2], [0, 1, 3]):
        alone = pack(data, clients, work, round_=1)
        after = pack(data, clients, work, round_=1, before=before)
        assert (after.arrays is before.arrays) == (clients == [0, 1, 3])
        assert after.sizes >= before.sizes
        slots, steps = alone.order.shape[:2]
        assert after.order.shape >= alone.order.shape
        np.testing.assert_array_equal(after.order[:slots, :steps], alone.order)
        assert (after.order[slots:] == -1).all()
        assert (after.order[:, steps:] == -1).all()
        for name, array in alone.arrays.items():
            real = int(data.counts[clients].sum())
            np.testing.assert_array_equal(after.arrays[name][:real], array[:real])


def test_clients_may_come_twice_each_time_in_an_order_of_its_own():
    data = ClientData.of({"x": np.arange(40)}, np.split(np.arange(40), [15]))
    cohort = pack(data, [1, 0, 1], LocalWork(batch=25), round_=[7, 8, 9], devices=2)
    asked = {place: slot for slot, place in enumerate(cohort.places) if place >= 0}
    assert sorted(asked) == [0, 1, 2]
    half = len(cohort.places) // 2
    seen = []
    for place, (client, round_) in enumerate(zip([1, 0, 1], [7, 8, 9], strict=True)):
        slot = asked[place]
        assert cohort.clients[slot] == client
        rows = cohort.order[slot][cohort.order[slot] >= 0]
        of_device = cohort.arrays["x"].reshape(2, -1)[slot // half]
        own = order_of(
            int(data.counts[client]), batch=25, epochs=1, seed=0, round_=round_, client=client
        )
        np.testing.assert_array_equal(of_device[rows], data.of_client(client)["x"][own[own >= 0]])
        seen.append(of_device[rows].tolist())
    assert seen[0] != seen[2]
    assert sorted(seen[0]) == sorted(seen[2])


def test_a_folder_that_is_damaged_or_uneven_is_refused(tmp_path):
    good = [{"x": np.ones((2, 3), np.float32)}, {"x": np.ones((4, 3), np.float32)}]
    write_clients(tmp_path / "good", good)
    assert ClientData.open(tmp_path / "good").counts.tolist() == [2, 4]
    with pytest.raises(DataError, match="client 1"):
        write_clients(tmp_path / "bad", [good[0], {"x": np.ones((2, 4), np.float32)}])
    with pytest.raises(DataError, match="client 1"):
        write_clients(tmp_path / "worse", [good[0], {"y": np.ones((2, 3), np.float32)}])
    with pytest.raises(DataError):
        ClientData.open(tmp_path / "nothing")
    (file,) = [f for f in (tmp_path / "good").glob("*.npy") if f.stem == "x"]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError, match="x"):
        ClientData.open(tmp_path / "good")


def test_kept_states_grow_and_come_back_from_a_checkpoint():
    kept = KeptStates({"w": np.zeros(2, np.float32)})
    for client in range(0, 60, 2):
        kept.scatter(np.array([client]), {"w": np.full((1, 2), client, np.float32)})
    restored = KeptStates({"w": np.zeros(2, np.float32)})
    restored.restore(kept.arrays())
    for client in (0, 1, 58):
        wanted = 0 if client % 2 else client
        assert restored.of_client(client)["w"].tolist() == [wanted, wanted]


def test_a_model_that_keeps_statistics_of_its_batches_is_refused():
    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)

    with pytest.raises(CaptureError, match="LayerNorm"):
        Task.of(Normed, lambda model, batch: (jnp.float32(0), jnp.float32(0)))

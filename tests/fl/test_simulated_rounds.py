"""Simulated federations against parties in programs of their own, NumPy, and their own restarts."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from shardpar.errors import ConfigError, RunError
from shardpar.fl.algorithms.named import algorithm_of
from shardpar.fl.algorithms.private_sgd import PrivateSGD
from shardpar.fl.clients import ClientData
from shardpar.fl.cohort import sample_cohort
from shardpar.fl.examples import Examples, order_of
from shardpar.fl.options import FederatedOptions
from shardpar.fl.packing import Packing
from shardpar.fl.privacy_options import PrivacyOptions
from shardpar.fl.rounds import client_update, gathered, server_update
from shardpar.fl.saving import Savings
from shardpar.fl.secagg_options import SecAggOptions
from shardpar.fl.simulated_federation import simulated_federation
from shardpar.fl.simulated_rounds import BufferedRounds, state_after
from shardpar.fl.task import Task
from shardpar.run.checkpoints import Checkpoints
from tests.cli.command import LONG
from tests.fl.federation import Federation, play
from tests.fl.test_event_clock import by_moments
from tests.fl.test_simulate import DATA, INPUTS, LABELS, MLP, ONE, RATE, joined, numpy_sgd

OPTIONS = {"rounds": 2, "epochs": 2, "batch": 16, "learning_rate": RATE, "seed": 7}
MASKED = SecAggOptions(enabled=True, clip=2.0, most_weight=400.0)


@pytest.fixture(scope="module")
def task():
    options = MLP.MLPOptions(64, (), 10)
    return Task.of(lambda rngs: MLP.build(options, rngs), MLP.loss)


def in_own_programs(task, options, secagg):
    """A deployment without its network: each client alone with its rows, under masks if asked."""
    algorithm = algorithm_of(options, population=9)
    params = task.init(options.seed)
    state = algorithm.server_init(params)
    kept = {client: algorithm.client_init(params) for client in range(9)}
    for round_ in range(options.rounds):
        cohort = sample_cohort(9, options.cohort, seed=options.seed, round_=round_)
        sent = []
        for client in map(int, cohort):
            rows = DATA.of_client(client)
            order = order_of(
                len(rows["labels"]), batch=16, epochs=2, seed=7, round_=round_, client=client
            )
            examples = Examples(jax.device_put(rows), jax.device_put(order))
            update, kept[client] = client_update(
                task, algorithm, algorithm.broadcast(state), kept[client], examples
            )
            sent.append(jax.device_get(update))
        if secagg is None:
            total, count = gathered(algorithm, sent)
        else:
            packing = Packing.of(sent[0], clients=len(cohort), options=secagg)
            federation = Federation.of(len(cohort), packing.words, threshold=len(cohort) - 1)
            vectors = dict(zip(federation.identities, map(packing.encode, sent), strict=True))
            played = play(federation, vectors, {})
            total, count = packing.decode(played.server.total()[0]), np.int32(len(cohort))
        state = server_update(algorithm, state, total, count)
    return jax.device_get(state)


def simulated(task, options, *, devices=ONE, **how):
    found = simulated_federation(task, DATA, options, devices=devices, **how)
    return state_after(found.rounds, options.rounds)


def require_equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("algorithm", ["ditto"])
def test_plain_rounds_are_those_of_parties_bit_for_bit(task, algorithm):
    options = FederatedOptions(algorithm=algorithm, cohort=3, momentum=0.5, **OPTIONS)
    require_equal(simulated(task, options), in_own_programs(task, options, None))


@pytest.mark.parametrize("algorithm", ["fedavg", pytest.param("scaffold", marks=LONG)])
def test_masked_rounds_are_those_of_parties_bit_for_bit_on_any_devices(task, algorithm):
    options = FederatedOptions(algorithm=algorithm, cohort=4, **OPTIONS)
    wanted = in_own_programs(task, options, MASKED)
    require_equal(simulated(task, options, secagg=MASKED), wanted)
    require_equal(simulated(task, options, secagg=MASKED, devices=jax.devices()[:3]), wanted)


def test_an_update_that_is_not_finite_ends_a_masked_run(task):
    options = FederatedOptions(**OPTIONS | {"learning_rate": 1e38})
    with pytest.raises(RunError, match=r"clients sent updates that are not finite.*learning_rate"):
        simulated(task, options, secagg=MASKED)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"secagg": SecAggOptions(True, most_weight=9.0)}, "write secagg.most_weight=2"),
        ({"secagg": SecAggOptions(True, rounding="stochastic")}, "secagg.rounding=nearest"),
        ({"cohort": 10}, "write federated.cohort=9 or less"),
        ({"privacy": PrivacyOptions("example"), "algorithm": "fedprox"}, "algorithm=fedavg"),
        ({"privacy": PrivacyOptions("central", epsilon=1e-9)}, "use fewer rounds, or a larger"),
        (
            {"privacy": PrivacyOptions("local", epsilon=4.0, noise_multiplier=0.8)},
            "one round with privacy.noise_multiplier=0.8 costs epsilon .* of 4; write",
        ),
        ({"privacy": PrivacyOptions("local", noise_multiplier=1e-9)}, "costs epsilon inf of 8"),
    ],
)
def test_what_does_not_fit_is_refused(task, how, message):
    named = {name: how.pop(name) for name in ("cohort", "algorithm") if name in how}
    with pytest.raises(ConfigError, match=message):
        simulated_federation(task, DATA, FederatedOptions(**OPTIONS, **named), devices=ONE, **how)


def test_nobody_with_examples_is_refused(task):
    empty = ClientData.of({"inputs": INPUTS, "labels": LABELS}, [[], []])
    with pytest.raises(ConfigError, match="no client has an example"):
        simulated_federation(task, empty, FederatedOptions(), devices=ONE)


def test_buffered_steps_are_those_of_numpy_by_another_clock(task):
    options = FederatedOptions(
        algorithm="fedbuff", buffer=3, concurrency=9, training_spread=0.9, staleness_exponent=0.7,
        **OPTIONS | {"rounds": 6},
    )  # fmt: skip
    rounds = simulated_federation(task, DATA, options, devices=ONE).rounds
    assert isinstance(rounds, BufferedRounds)
    steps = list(itertools.islice(rounds.clock(), 6))
    # The first nine began at 0; whoever has not come back yet takes long.
    times_s = {a.client: a.at_s for s in steps for a in s.arrivals if a.launch < 9}
    wanted = by_moments([times_s.get(client, 1e9) for client in range(9)], 3, 6)
    assert [[a.client for a in s.arrivals] for s in steps] == [[a[0] for a in s] for s in wanted]
    models = [joined(task.init(7))]
    for step, arrivals in zip(steps, wanted, strict=True):
        move = 0.0
        for arrival, (client, version, staleness, _) in zip(step.arrivals, arrivals, strict=True):
            start = models[version]
            after, _ = numpy_sgd(start, client, arrival.launch)
            move = move + (1 + staleness) ** -0.7 * (after - start)
        models.append(models[-1] + move / 3)
    assert max(a[2] for s in wanted for a in s) >= 2
    assert len(times_s) > 5
    found = simulated(task, options, devices=jax.devices()[:2])
    np.testing.assert_allclose(joined(found["params"]), models[-1], atol=5e-5)


@pytest.mark.parametrize("algorithm", [pytest.param("ditto", marks=LONG), "fedbuff"])
def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(task, algorithm, tmp_path):
    options = FederatedOptions(
        algorithm=algorithm, cohort=None if algorithm == "fedbuff" else 4, buffer=2, concurrency=5,
        **OPTIONS | {"rounds": 6},
    )  # fmt: skip
    rounds = simulated_federation(task, DATA, options, devices=ONE).rounds
    wanted = state_after(rounds, 6)
    with Checkpoints(tmp_path) as checkpoints:
        savings = Savings(checkpoints)
        assert savings.latest(rounds) is None
        for position, _ in itertools.islice(rounds.after(rounds.begin()), 3):
            savings.save(position, {"note": "kept"})
    again = simulated_federation(task, DATA, options, devices=ONE).rounds
    with Checkpoints(tmp_path) as checkpoints:
        found = Savings(checkpoints).latest(again)
        assert found is not None
        assert found.round_ == 3
        assert (len(found.sent) > 1) == (algorithm == "fedbuff")
        assert (len(found.kept.clients) > 3) == (algorithm == "ditto")
        require_equal(state_after(again, 6, found), wanted)


def spread_of_noise(task, privacy, cohort, secagg=None):
    """Standard deviation of what one round of updates that hardly move moves the model by."""
    options = FederatedOptions(cohort=cohort, **OPTIONS | {"rounds": 1, "learning_rate": 1e-9})
    found = simulated_federation(task, DATA, options, privacy=privacy, secagg=secagg, devices=ONE)
    state = state_after(found.rounds, 1)
    moves = joined(state["params"]) - joined(task.init(7))
    return float(moves.std()), found


CLIP, Z = 0.5, 1.3


def test_noise_of_each_kind_is_as_wide_as_in_its_deployment(task):
    n, least = 6, 4
    of = {"noise_multiplier": Z, "clip": CLIP, "epsilon": 1e3}
    std, found = spread_of_noise(task, PrivacyOptions("central", **of), n)
    assert std == pytest.approx(Z * CLIP / n, rel=0.1)
    assert found.privacy.release.noise_multiplier == Z
    secagg = SecAggOptions(enabled=True, threshold=2 / 3)
    std, _ = spread_of_noise(task, PrivacyOptions("distributed", **of), n, secagg)
    assert std == pytest.approx(Z * CLIP * math.sqrt(n / least) / n, rel=0.1)
    # A client's own noise hides which of two updates, up to 2 clip apart, it sent.
    std, found = spread_of_noise(task, PrivacyOptions("local", **of), n)
    assert std == pytest.approx(2 * CLIP * Z * math.sqrt(n) / n, rel=0.1)
    assert found.privacy.budget.unit == "user"


def test_each_client_is_drawn_by_itself_where_sampling_is_to_hide_it(task):
    privacy = PrivacyOptions("central", epsilon=1e3, sampling_rate=0.15, noise_multiplier=1.0)
    options = FederatedOptions(**OPTIONS | {"rounds": 6})
    rounds = simulated_federation(task, DATA, options, privacy=privacy, devices=ONE).rounds
    counts = [figures.clients for _, figures in rounds.after(rounds.begin())]
    assert len(set(counts)) > 2
    assert min(counts) == 0, "a round of nobody is a round as well; choose a seed that has one"


def numpy_clipped(model, x, y, clip):
    p = np.exp(x @ model[:-1] + model[-1])
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    rows = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    gradients = rows[:, :, None] * p[:, None, :]
    norms = np.sqrt((gradients**2).sum(axis=(1, 2), keepdims=True))
    return (gradients * np.minimum(1.0, clip / norms)).sum(axis=0)


def test_dp_sgd_clients_train_on_their_own_rows_and_no_others(task):
    privacy = PrivacyOptions("example", epsilon=1e3, noise_multiplier=1.0, clip=0.7)
    options = FederatedOptions(cohort=3, **OPTIONS | {"rounds": 1})
    found = simulated_federation(task, DATA, options, privacy=privacy, devices=ONE)
    algorithm = found.rounds.sim.algorithm
    assert isinstance(algorithm, PrivateSGD)
    quiet = replace(found.rounds.sim, algorithm=replace(algorithm, noise_multiplier=1e-4))
    start, moves = joined(task.init(7)), []
    for client in map(int, sample_cohort(9, 3, seed=7, round_=0)):
        rows, model = DATA.of_client(client), start.copy()
        for _ in range(algorithm.steps):
            sum_ = numpy_clipped(model, rows["inputs"].astype(float), rows["labels"], 0.7)
            model = model - RATE / algorithm.records * sum_
        moves.append(model - start)
    assert algorithm.steps == 2
    state = state_after(replace(found.rounds, sim=quiet), 1)
    np.testing.assert_allclose(joined(state["params"]), start + np.mean(moves, 0), atol=2e-4)

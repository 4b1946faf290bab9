"""What a deployed federation is, the same at all its parties: derived from the shared config alone.

Aggregator and parties each build a `Job` of their own and compare its `terms` before the first
round; shapes of updates, the layout of masked vectors and the size of noise all follow from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardpar.errors import ConfigError, SpecError
from shardpar.fl.agreement import Terms, digest_of
from shardpar.fl.algorithms.algorithm import Algorithm
from shardpar.fl.algorithms.fedavg import FedAvg
from shardpar.fl.algorithms.fedbuff import FedBuff
from shardpar.fl.algorithms.named import algorithm_of
from shardpar.fl.algorithms.private_sgd import PrivateSGD
from shardpar.fl.algorithms.private_users import PrivateUsers
from shardpar.fl.cohort import LocalWork, sample_cohort
from shardpar.fl.examples import Examples
from shardpar.fl.ledger import Release, noise_multiplier_for
from shardpar.fl.options import FederatedOptions, NetOptions
from shardpar.fl.packing import Packing
from shardpar.fl.privacy import DistributedNoise, UserMechanism, release_of
from shardpar.fl.privacy_options import PrivacyOptions
from shardpar.fl.private_rounds import budget_of, distributed_noise, example_noise, user_mechanism
from shardpar.fl.secagg_options import SecAggOptions
from shardpar.fl.secagg_session import Session
from shardpar.fl.streams import Randomness
from shardpar.fl.task import Params, Task
from shardpar.run.leaves import named_leaves, record

Tree = Any


@dataclass(frozen=True, eq=False)
class Job:
    """One federation.

    Build one with `job_of`.

    Attributes:
      task: the model and its loss.
      algorithm: whose rounds these are, with privacy around it.
      federated: section of the config.
      privacy: section of the config.
      secagg: section of the config.
      net: section of the config; its `parties` are the clients, in the order of their numbers.
      shared: what else all must agree on, by key.
    """

    task: Task
    algorithm: Algorithm
    federated: FederatedOptions
    privacy: PrivacyOptions
    secagg: SecAggOptions
    net: NetOptions
    shared: Mapping[str, str]

    @property
    def parties(self) -> tuple[str, ...]:
        """The clients."""
        return self.net.parties

    @property
    def is_ring(self) -> bool:
        """Whether there is no aggregator."""
        return self.net.topology == "ring"

    @property
    def pays_at_parties(self) -> bool:
        """Whether each party's own ledger pays for its noise."""
        return self.privacy.kind in ("local", "example")

    @property
    def work(self) -> LocalWork:
        """What a client does in a round."""
        return LocalWork(self.federated.batch, self.federated.epochs, self.federated.seed)

    @cached_property
    def asked(self) -> int:
        """How many clients are asked in a round."""
        return min(self.federated.cohort or len(self.parties), len(self.parties))

    @property
    def fewest(self) -> int:
        """With how many clients a round is still one; with fewer it is given up."""
        # More than half, or two parts of a broken ring would go on by themselves; and of two in a
        # ring each would know the other's update.
        return max(self.secagg.stay_to_the_end(self.asked), 3 if self.is_ring else 1)

    @property
    def required(self) -> int:
        """How many of the clients asked must stay to the end by the policy for lost ones."""
        return self.asked if self.net.lost == "wait" else self.fewest

    def required_of(self, asked: int) -> int:
        """The same of a round that asks so many."""
        if self.net.lost == "wait":
            return asked
        return 0 if self.draws_each else min(self.fewest, asked)

    @property
    def draws_each(self) -> bool:
        """Whether each client is drawn by itself, by central privacy, and not in a fixed number."""
        return self.privacy.kind == "central" and self.privacy.sampling_rate < 1

    def clients_of(self, round_: int) -> tuple[str, ...]:
        """The clients that a round asks, in the order of their numbers."""
        if self.draws_each:
            # Who was drawn must stay a secret, so the draw cannot be the simulation's.
            below = np.uint64(int(self.privacy.sampling_rate * 2.0**64))
            drawn = np.flatnonzero(Randomness().words(len(self.parties)) < below)
        else:
            drawn = sample_cohort(
                len(self.parties), self.federated.cohort, seed=self.federated.seed, round_=round_
            )
        return tuple(self.parties[client] for client in drawn)

    @cached_property
    def first_params(self) -> Params:
        """The model before the first round."""
        return self.task.init(self.federated.seed)

    @cached_property
    def state_shapes(self) -> Tree:
        """Of the server's state."""
        return jax.eval_shape(self.algorithm.server_init, self.first_params)

    @cached_property
    def broadcast_shapes(self) -> Tree:
        """Of what the server sends."""
        return jax.eval_shape(self.algorithm.broadcast, self.state_shapes)

    @cached_property
    def update_shapes(self) -> Tree:
        """Of what a client sends."""
        return update_shapes(self.task, self.algorithm, self.first_params)

    @cached_property
    def dims(self) -> int:
        """Coordinates of an update that are hidden by noise."""
        key = "update" if isinstance(self.algorithm, PrivateUsers) else "delta"
        return _size(self.update_shapes[key])

    @cached_property
    def terms(self) -> Terms:
        """All that the parties must agree on, by key."""
        leaves = named_leaves(jax.eval_shape(lambda: self.first_params))[0]
        shapes = {f"model parameter {name}": f"{record(leaf)}" for name, leaf in leaves.items()}
        return {"protocol": "1", **self.shared, **shapes}

    @cached_property
    def digest(self) -> bytes:
        """Of `terms`."""
        return digest_of(self.terms)

    @cached_property
    def packing(self) -> Packing:
        """How an update lies in a masked vector."""
        options = self.secagg
        if self.privacy.kind != "none":
            # Private clients count alike: their weight is 1.
            options = replace(options, most_weight=1.0)
        return Packing.of(self.update_shapes, clients=self.asked, options=options)

    @cached_property
    def noise(self) -> DistributedNoise | None:
        """The clients' noise under secure aggregation, or None if there is none."""
        if self.privacy.kind != "distributed":
            return None
        return _distributed(self.privacy, self.federated, self.dims, self.asked, self.required)

    @property
    def words(self) -> int:
        """Of a masked vector."""
        return self.packing.words if self.noise is None else self.noise.words

    def session(self, round_: int, attempt: int, cohort: tuple[str, ...]) -> Session:
        """One secure aggregation; as many stay to the end as noise and policy ask for."""
        options = self.secagg
        session = Session.of(self.net.job, round_, cohort, self.words, options, attempt)
        return replace(session, threshold=max(session.threshold, self.required))

    def clip_of(self, broadcast: Tree) -> float:
        """The norm that updates of a round may have, where clients add noise; else 0."""
        return 0.0 if self.noise is None else float(broadcast["clip"])

    def masked_words(self, update: Tree, clip: float) -> np.ndarray:
        """A client's update as the vector to be masked, uint32, with its part of the noise.

        Args:
          update: what the algorithm's client sends.
          clip: of the round; used where clients add noise.
        """
        if self.noise is not None:
            within = float(update["within"])
            return self.noise.encode(update["update"], within, clip, Randomness())
        random = Randomness() if self.secagg.rounding == "stochastic" else None
        return self.packing.encode(update, random)

    def unmasked(self, total: np.ndarray, clip: float) -> Tree:
        """The sum of updates, float32, that a sum of such vectors stands for."""
        if self.noise is None:
            return jax.tree.map(np.float32, self.packing.decode(total))
        update, within = self.noise.decode(total, self.update_shapes["update"], clip)
        sums = {"update": update, "within": within, "weight": 0.0, "loss": 0.0}
        return jax.tree.map(np.float32, sums)

    def release(self) -> Release | None:
        """What one round costs whoever keeps the ledger; None without privacy."""
        algorithm, options = self.algorithm, self.privacy
        if options.kind == "example":
            assert isinstance(algorithm, PrivateSGD)
            return algorithm.release(self.dims)
        if options.kind == "none":
            return None
        if self.noise is not None:
            return self.noise.release()
        assert isinstance(algorithm, PrivateUsers)
        if options.kind == "local":
            return release_of(algorithm.mechanism.noise_multiplier, self.dims + 1)
        return algorithm.mechanism.release(self.dims, options.sampling_rate)


def job_of(
    task: Task,
    federated: FederatedOptions,
    privacy: PrivacyOptions,
    secagg: SecAggOptions,
    net: NetOptions,
    shared: Mapping[str, str],
    *,
    records: int | None = None,
) -> Job:
    """A job from the sections of a config.

    Args:
      task: the model and its loss.
      federated: which algorithm and rounds.
      privacy: what hides whom.
      secagg: whether updates are masked.
      net: who takes part.
      shared: what else all must agree on, by key: text of the shared sections.
      records: how many a client has about, public; needed for privacy of single records.

    Raises:
      ConfigError: what is asked for cannot run between processes, or no noise affords it.
      SpecError: too many clients or dims for 32 bits.
    """
    parties = net.parties
    inner = algorithm_of(federated, population=len(parties))
    if isinstance(inner, FedBuff):
        raise ConfigError(
            "federated.algorithm=fedbuff takes updates by a clock of events, which a simulation "
            "has (shardpar train); between processes write federated.algorithm=fedavg"
        )
    if secagg.enabled and privacy.kind == "central" and privacy.sampling_rate < 1:
        raise ConfigError(
            "privacy.sampling_rate below 1 draws rounds of one client or none, whose sum would be "
            "no secret; write privacy.sampling_rate=1 with secagg.enabled"
        )
    if net.topology == "ring":
        _require_ring(federated, privacy, net)
    algorithm = _private(task, inner, federated, privacy, net, secagg, records)
    job = Job(task, algorithm, federated, privacy, secagg, net, shared)
    if job.secagg.enabled:
        if job.asked < 2:
            raise SpecError(
                f"a round asks {job.asked} client, whose masked sum would be its own update; "
                "federated.cohort and net.parties must be 2 or more"
            )
        job.session(0, 0, tuple(sorted(parties)[: job.asked]))
    return job


def _require_ring(federated: FederatedOptions, privacy: PrivacyOptions, net: NetOptions) -> None:
    if len(net.parties) < 3:
        raise ConfigError(
            f"net.topology=ring with {len(net.parties)} parties: of two, each would know the "
            "other's update from the sum; name 3 or more in net.parties"
        )
    if federated.cohort is not None:
        raise ConfigError("a ring has all parties in every round; leave federated.cohort out")
    if privacy.kind in ("central", "local"):
        raise ConfigError(
            f"privacy.kind={privacy.kind} is for rounds with an aggregator; in a ring write "
            "distributed or example"
        )


def _private(
    task: Task,
    inner: Algorithm,
    federated: FederatedOptions,
    privacy: PrivacyOptions,
    net: NetOptions,
    secagg: SecAggOptions,
    records: int | None,
) -> Algorithm:
    rounds = federated.rounds
    if privacy.kind == "none":
        return inner
    params = task.init(federated.seed)
    if privacy.kind == "example":
        if records is None:
            raise ConfigError("privacy.kind=example needs to know how many records a client has")
        algorithm = PrivateSGD(
            records,
            federated.learning_rate,
            privacy.clip,
            privacy.noise_multiplier or 1.0,
            privacy.sampling_rate,
            federated.epochs * math.ceil(1 / privacy.sampling_rate),
            1.0 if federated.server_learning_rate is None else federated.server_learning_rate,
        )
        noise = example_noise(privacy, algorithm, rounds=rounds, dims=_size(params))
        return replace(algorithm, noise_multiplier=noise)
    shapes = update_shapes(task, inner, params)
    dims = _size({k: v for k, v in shapes.items() if k not in ("weight", "loss")})
    asked = min(federated.cohort or len(net.parties), len(net.parties))
    if privacy.kind == "central":
        expected = asked * privacy.sampling_rate
        mechanism = user_mechanism(privacy, clients=expected, rounds=rounds, dims=dims)
    elif privacy.kind == "local":
        noise = privacy.noise_multiplier or noise_multiplier_for(
            budget_of(privacy), rounds, lambda z: release_of(z, dims + 1)
        )
        mechanism = UserMechanism(noise, asked)
    else:
        plain = Job(task, inner, federated, privacy, secagg, net, {})
        mechanism = _distributed(privacy, federated, dims, asked, plain.required).mechanism
    return PrivateUsers(inner, mechanism, privacy.clip)


@lru_cache(maxsize=8)
def _distributed(
    privacy: PrivacyOptions, federated: FederatedOptions, dims: int, most: int, least: int
) -> DistributedNoise:
    return distributed_noise(privacy, rounds=federated.rounds, dims=dims, most=most, least=least)


def update_shapes(task: Task, algorithm: Algorithm, params: Params) -> Tree:
    """Shapes and dtypes of what a client sends."""
    # What DP-SGD sends is as in federated averaging, and its program cannot be traced without data.
    traced = FedAvg() if isinstance(algorithm, PrivateSGD) else algorithm
    nothing = Examples({}, jnp.zeros((0, 1), jnp.int32))

    def client(params: Params) -> Tree:
        broadcast = traced.broadcast(traced.server_init(params))
        return traced.client(task, broadcast, traced.client_init(params), nothing)[0]

    return jax.eval_shape(client, params)


def _size(tree: Tree) -> int:
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))

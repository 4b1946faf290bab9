"""One client of a secure aggregation beside Flower's SecAgg+, whose own functions are called.

Both share their keys with all peers, then quantise an update and mask it; repetitions of both
alternate in one process, and its CPU seconds are counted. Signatures are checked by shardpar
alone, which Flower has none of. Needs the extra `bench`.

    python -m benchmarks.fl_secagg --parameters 1048576 --repeats 5
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _share_keys,
)
from flwr.common import ConfigRecord, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    encrypt,
    generate_shared_key,
)
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat
from flwr.supercore.primitives.asymmetric import (
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

from shardpar.fl.packing import Packing
from shardpar.fl.secagg_client import SecAggClient
from shardpar.fl.secagg_messages import Keyring, RoutedShares, SealedShare
from shardpar.fl.secagg_options import SecAggOptions
from shardpar.fl.secagg_session import Identity, Session
from shardpar.fl.streams import Randomness

WEIGHT = 100.0
OPTIONS = SecAggOptions(enabled=True, clip=8.0, most_weight=1000.0)


@dataclass(frozen=True)
class Times:
    """CPU seconds of one client."""

    share_s: float
    mask_s: float


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of some work, and what it returns."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def ours(peers: int, update: np.ndarray, rounding: Randomness | None) -> Times:
    """A client of shardpar among so many peers."""
    names = tuple(f"client {at:04}" for at in range(peers + 1))
    identities = {n: Identity(n, Ed25519PrivateKey.generate()) for n in names}
    roster = {n: i.key.public_key() for n, i in identities.items()}
    tree = {"delta": np.float32(WEIGHT) * update, "weight": np.float32(WEIGHT)}
    packing = Packing.of(tree, clients=peers + 1, options=OPTIONS)
    session = Session.of("bench", 0, names, packing.words, OPTIONS)
    clients = {n: SecAggClient(i, session, roster) for n, i in identities.items()}
    keyring = Keyring(tuple(c.advertise() for c in clients.values()))
    me, others = names[0], names[1:]
    share_s, _ = timed(lambda: clients[me].share(keyring))
    sealed = []
    for other in others:
        # The peer's side, not counted: it seals nothing but for the client that is measured.
        clients[other]._near = {me: keyring.keys[0]}
        sealed.append(SealedShare(other, clients[other]._seal(me, bytes(33), bytes(33))))
    routed = RoutedShares(tuple(sealed))
    mask_s, message = timed(lambda: clients[me].mask(routed, packing.encode(tree, rounding)))
    assert len(message.words) == 4 * (update.size + 1)
    return Times(share_s, mask_s)


def flowers(peers: int, update: np.ndarray) -> Times:
    """A client of Flower among so many peers, with its defaults."""
    threshold = max(peers // 2 + 1, 2)
    state = SecAggPlusState()
    state.nid, state.sample_num = 0, peers + 1
    state.rd_seed_share_dict, state.sk1_share_dict, state.ss2_dict = {}, {}, {}
    state.share_num, state.threshold = peers + 1, threshold
    state.clipping_range, state.target_range = 8.0, 4_194_304
    state.mod_range, state.max_weight = 4_294_967_296, 1000.0
    keys = {at: (generate_key_pairs(), generate_key_pairs()) for at in range(peers + 1)}
    (sk1, pk1), (sk2, pk2) = keys[0]
    state.sk1, state.pk1 = private_key_to_bytes(sk1), public_key_to_bytes(pk1)
    state.sk2, state.pk2 = private_key_to_bytes(sk2), public_key_to_bytes(pk2)
    public = {
        str(at): [public_key_to_bytes(one[1]), public_key_to_bytes(two[1])]
        for at, (one, two) in keys.items()
    }
    share_s, _ = timed(lambda: _share_keys(state, ConfigRecord(public)))
    sources, texts = [], []
    for at in range(1, peers + 1):
        secret = generate_shared_key(keys[at][1][0], pk2)
        plain = share_keys_plaintext_concat(at, 0, os.urandom(36), os.urandom(36))
        sources.append(at)
        texts.append(encrypt(secret, plain))
    configs = ConfigRecord({Key.CIPHERTEXT_LIST: texts, Key.SOURCE_LIST: sources})
    parameters = ndarrays_to_parameters([update])
    mask_s, _ = timed(lambda: _collect_masked_vectors(state, configs, int(WEIGHT), parameters))
    return Times(share_s, mask_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=1 << 20)
    parser.add_argument("--peers", type=int, nargs="+", default=[9, 20, 99])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    update = np.random.default_rng(0).normal(0, 0.01, options.parameters).astype(np.float32)
    print(f"{options.parameters} parameters, CPU ms of a client, median of {options.repeats}")
    print("| peers | shardpar share | mask | mask, random rounding | Flower share | mask | ratio |")
    print("|---|---|---|---|---|---|---|")
    for peers in options.peers:
        rows = []
        for _ in range(options.repeats):
            rows.append(
                (
                    ours(peers, update, None),
                    ours(peers, update, Randomness()),
                    flowers(peers, update),
                )
            )
        near, random, peer = zip(*rows, strict=True)
        median = lambda times, what: 1000 * statistics.median(getattr(t, what) for t in times)  # noqa: E731
        total = median(near, "share_s") + median(near, "mask_s")
        flower_total = median(peer, "share_s") + median(peer, "mask_s")
        print(
            f"| {peers} | {median(near, 'share_s'):.1f} | {median(near, 'mask_s'):.1f} "
            f"| {median(random, 'mask_s'):.1f} | {median(peer, 'share_s'):.1f} "
            f"| {median(peer, 'mask_s'):.1f} | {total / flower_total:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

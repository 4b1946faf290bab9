"""Vertical training: boosted trees beside a naive SecureBoost on phe, and regression beside FATE's.

    python -m benchmarks.fl_vertical trees         # needs phe: pip install phe
    python -m benchmarks.fl_vertical regression    # a few steps of an epoch, scaled

`trees` grows the same trees twice, in turn, with 2048-bit keys made anew each time, and checks that
they are identical. The naive one encrypts first and second derivatives apart, sums both children of
every node, decrypts every bin and waits for each message; it uses the same bins and gains. CPU
seconds are of both parties together.

`regression` times steps of 100,000 rows x (30 + 300) columns and scales them to an epoch. FATE 2.0
publishes 294 s per epoch on 16 cores for these sizes.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from shardpar.fl.channel import LocalChannel, local_channels
from shardpar.fl.he.pool import Pool
from shardpar.fl.vertical import tree_model
from shardpar.fl.vertical.bins import Bins, histogram_of
from shardpar.fl.vertical.gains import base_of, best_of, derivatives_of, leaf_of
from shardpar.fl.vertical.linear import WeightShares, changes_of, gradients_of
from shardpar.fl.vertical.link import greet
from shardpar.fl.vertical.options import KeyOptions, LinearOptions, TreeOptions
from shardpar.fl.vertical.ring import MODULUS, zeros
from shardpar.fl.vertical.trees import GuestSplit, Leaf

FATE_SECONDS = 294
ROWS, GUEST_COLUMNS, HOST_COLUMNS = 100_000, 30, 300


def both(guest: Callable[[LocalChannel], Any], host: Callable[[LocalChannel], Any]) -> list[Any]:
    """What both parties return, as threads of this process."""
    ends, results = local_channels(["guest", "host"]), [None, None]

    def run(at: int, work: Callable[[LocalChannel], Any], end: LocalChannel) -> None:
        results[at] = work(end)

    threads = [
        threading.Thread(target=run, args=(at, work, ends[name]))
        for at, (work, name) in enumerate(((guest, "guest"), (host, "host")))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def table_of(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, columns))
    scores = x @ random.normal(size=columns) + x[:, 0] * x[:, -1]
    return x, (scores + random.normal(size=rows) > 0).astype(float)


def ours(x: np.ndarray, y: np.ndarray, split: int, options: TreeOptions, keys: KeyOptions) -> Any:
    """The trees, the host's splits in them written out."""
    guest, host = both(
        lambda end: tree_model.fit(end, "guest", x[:, :split], y, options, keys),
        lambda end: tree_model.fit(end, "host", x[:, split:], None, options, keys),
    )
    trees = []
    for tree in guest.trees:
        whole = {}
        for node, held in tree.nodes.items():
            if isinstance(held, Leaf):
                whole[node] = ("leaf", held.value)
            else:
                owner = "guest" if isinstance(held, GuestSplit) else "host"
                cut = held if isinstance(held, GuestSplit) else host.cuts[held.split]
                whole[node] = (owner, cut.column, cut.edge, cut.missing_left)
        trees.append(whole)
    return trees


def naive(x: np.ndarray, y: np.ndarray, split: int, options: TreeOptions, bits: int) -> Any:
    """SecureBoost as it was first described, on python-paillier."""
    import phe

    public, secret = phe.generate_paillier_keypair(n_length=bits)
    parts = {"guest": x[:, :split], "host": x[:, split:]}
    bins = {name: Bins.of(part, most=options.max_bins) for name, part in parts.items()}
    binned = {name: bins[name].sorted(part) for name, part in parts.items()}
    scores, trees = np.full(len(y), base_of(y, options)), []
    for _ in range(options.trees):
        first, second = derivatives_of(scores, y, options)
        sent = [[public.encrypt(int(v)) for v in each] for each in (first, second)]
        tree, todo = {}, [(1, np.arange(len(y)))]
        while todo:
            node, rows = todo.pop()
            total, best, owner = (int(first[rows].sum()), int(second[rows].sum())), None, ""
            may = node.bit_length() <= options.max_depth and len(rows) >= 2 * options.min_samples
            for name in ("guest", "host") if may else ():
                own, places = bins[name], binned[name][rows]
                if name == "guest":
                    sums = [histogram_of(places, own.width, each[rows]) for each in (first, second)]
                else:
                    sums = [
                        decrypted(
                            secret, encrypted_sums([each[r] for r in rows], places, own.width)
                        )
                        for each in sent
                    ]
                count = own.splits.left_of(own, own.counts(places))
                enough = np.minimum(count, len(rows) - count) >= options.min_samples
                left = tuple(own.splits.left_of(own, each) for each in sums)
                found = best_of(left, total, enough, options)
                if found.at and (best is None or found.gain > best.gain):
                    best, owner = found, name
            if best is None:
                tree[node] = ("leaf", leaf_of(total, options))
                scores[rows] += tree[node][1]
                continue
            own, at = bins[owner], best.at[0]
            goes = own.splits.goes_left(own, at, binned[owner][rows])
            column = int(own.splits.column[at])
            edge = (*own.edges[column], np.inf)[own.splits.bin[at]]
            tree[node] = (owner, column, float(edge), bool(own.splits.missing_left[at]))
            todo += [(2 * node, rows[goes]), (2 * node + 1, rows[~goes])]
        trees.append(tree)
    return trees


def encrypted_sums(numbers: list[Any], binned: np.ndarray, width: int) -> list[list[Any]]:
    sums: list[list[Any]] = [[None] * width for _ in range(binned.shape[1])]
    for row, number in zip(binned.tolist(), numbers, strict=True):
        for column, place in enumerate(row):
            held = sums[column][place]
            sums[column][place] = number if held is None else held + number
    return sums


def decrypted(secret: Any, sums: list[list[Any]]) -> np.ndarray:
    return np.array(
        [[0 if each is None else secret.decrypt(each) for each in row] for row in sums], np.int64
    )


def trees(options: argparse.Namespace) -> None:
    x, y = table_of(options.rows, options.guest_columns + options.host_columns)
    split = options.guest_columns
    settings = TreeOptions(trees=options.trees, max_depth=options.depth, max_bins=options.bins)
    spent: dict[str, list[float]] = {"shardpar": [], "naive SecureBoost on phe": []}
    for _ in range(options.repeats):
        grown = []
        for name, work in (
            ("shardpar", lambda: ours(x, y, split, settings, KeyOptions(bits=2048, processes=1))),
            ("naive SecureBoost on phe", lambda: naive(x, y, split, settings, 2048)),
        ):
            began = time.process_time()
            grown.append(work())
            spent[name].append(time.process_time() - began)
            print(f"  {name}: {spent[name][-1]:.1f} CPU s", flush=True)
        assert grown[0] == grown[1], "the trees differ"
    times = {name: median(each) for name, each in spent.items()}
    owners = [held[0] for tree in grown[0] for held in tree.values()]
    print(
        f"{options.trees} trees of depth {options.depth}, {options.rows} rows, {split} + "
        f"{options.host_columns} columns, {options.bins} bins, 2048 bits, CPU seconds of both "
        f"parties, median of {options.repeats}; identical trees, {owners.count('guest')} splits "
        f"of the guest's and {owners.count('host')} of the host's"
    )
    print("| booster | CPU s |\n|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {seconds:,.1f} |")
    print(f"ratio {times['naive SecureBoost on phe'] / times['shardpar']:.1f}")


def steps(options: argparse.Namespace, keys: KeyOptions) -> tuple[float, float]:
    """CPU seconds of a step, at the guest and at the host; keys are made before."""
    settings = LinearOptions(batch=options.batch)
    random = np.random.default_rng(0)

    def party(end: LocalChannel, role: Any, width: int) -> float:
        x = np.rint(np.clip(random.normal(size=(options.batch, width)), -8, 8) * 4096)
        x = x.astype(np.int32)
        y = (x[:, 0] > 0).astype(np.int64) << 32 if role == "guest" else None
        link = greet(end, role, settings, keys, topic="t", rows=len(x), columns=width, pool=Pool(1))
        link.secret.encrypt([1])
        link.key.encrypt([1])
        weights = changes = WeightShares(zeros(width), zeros(link.peer_columns))
        spent = []
        for _ in range(options.repeats):
            began = time.thread_time()
            gradients = gradients_of(link, settings, x, y, weights)
            changes = changes_of(link, settings, len(x), gradients, weights, changes)
            weights = weights.each(lambda w, c: (w - c) % MODULUS, changes)
            spent.append(time.thread_time() - began)
        return median(spent)

    guest, host = both(
        lambda end: party(end, "guest", GUEST_COLUMNS), lambda end: party(end, "host", HOST_COLUMNS)
    )
    return guest, host


def regression(options: argparse.Namespace) -> None:
    count = ROWS / options.batch
    print(
        f"logistic regression, {ROWS:,} rows x ({GUEST_COLUMNS} + {HOST_COLUMNS}) columns, batches "
        f"of {options.batch}, 2048 bits: {options.repeats} of {count:.1f} steps measured (median), "
        f"scaled to an epoch"
    )
    print("| | guest, CPU s | host, CPU s | both / 16 cores, s |\n|---|---|---|---|")
    for scheme in ("paillier", "okamoto_uchiyama"):
        guest, host = steps(options, KeyOptions(scheme, 2048, processes=1))
        print(
            f"| shardpar, {scheme} | {guest * count:,.0f} | {host * count:,.0f} | "
            f"{(guest + host) * count / 16:,.0f} |",
            flush=True,
        )
    print(f"| FATE 2.0, published (16 cores) | | | {FATE_SECONDS} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(required=True)
    growing = verbs.add_parser("trees")
    growing.add_argument("--rows", type=int, default=1000)
    growing.add_argument("--guest-columns", type=int, default=5)
    growing.add_argument("--host-columns", type=int, default=10)
    growing.add_argument("--bins", type=int, default=16)
    growing.add_argument("--trees", type=int, default=2)
    growing.add_argument("--depth", type=int, default=4)
    growing.add_argument("--repeats", type=int, default=3)
    growing.set_defaults(work=trees)
    learning = verbs.add_parser("regression")
    learning.add_argument("--batch", type=int, default=1024)
    learning.add_argument("--repeats", type=int, default=2)
    learning.set_defaults(work=regression)
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()

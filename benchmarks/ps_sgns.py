"""Skip-gram with negative sampling beside gensim's: tokens per CPU-second and link prediction.

Both learn from the same walks over a graph with planted groups of unequal degrees, with the same
dim, window, negatives and passes; rounds of both alternate in one process, and its CPU seconds
are counted, of all threads, compilation and the counting of words included. Vectors are judged
by held-out edges. Needs the extra `bench`.

    python -m benchmarks.ps_sgns --nodes 8000 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from gensim.models import Word2Vec

from shardpar.ps.algorithms import word2vec
from shardpar.ps.algorithms.link_prediction import EdgeSplit, link_auc, split_edges
from shardpar.ps.algorithms.walks import WalkOptions, Walks, adjacency
from shardpar.ps.algorithms.word2vec import Word2VecOptions

DIM, WINDOW, NEGATIVES = 128, 5, 5


@dataclass(frozen=True)
class Outcome:
    """Of one round of one of the two."""

    cpu_s: float
    wall_s: float
    auc_dot: float
    auc_hadamard: float


def planted(
    nodes: int, groups: int, degree: int, across: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Edges mostly inside groups, of nodes whose expected degrees have a heavy tail."""
    random = np.random.default_rng(seed)
    group = np.sort(random.integers(0, groups, nodes))
    pull = np.cumsum(random.pareto(2.5, nodes) + 1)
    before = np.append(0, pull)
    count = nodes * degree // 2
    sources = np.searchsorted(pull, random.random(count) * pull[-1])
    low = before[np.searchsorted(group, group[sources])]
    high = before[np.searchsorted(group, group[sources], side="right")]
    inside = np.searchsorted(pull, low + random.random(count) * (high - low))
    anywhere = np.searchsorted(pull, random.random(count) * pull[-1])
    targets = np.where(random.random(count) < across, anywhere, inside)
    targets = np.minimum(targets, nodes - 1)
    kept = sources != targets
    return sources[kept], targets[kept]


def judged(learn: Callable[[], np.ndarray], split: EdgeSplit) -> Outcome:
    cpu, wall = time.process_time(), time.perf_counter()
    vectors = learn()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Outcome(cpu, wall, link_auc(vectors, split), link_auc(vectors, split, "hadamard"))


def ours(walks: list[np.ndarray], nodes: int, passes: int, seed: int) -> np.ndarray:
    options = Word2VecOptions(dim=DIM, window=WINDOW, negatives=NEGATIVES, passes=passes)
    return word2vec.fit(options, nodes, walks, seed=seed, devices=jax.devices()[:1]).vectors


def gensims(sentences: list[list[str]], nodes: int, passes: int, seed: int) -> np.ndarray:
    model = Word2Vec(
        sentences, vector_size=DIM, window=WINDOW, negative=NEGATIVES, sg=1, hs=0, sample=0,
        min_count=0, workers=2, epochs=passes, seed=seed,
    )  # fmt: skip
    vectors = np.zeros((nodes, DIM), np.float32)
    vectors[[int(word) for word in model.wv.index_to_key]] = model.wv.vectors
    return vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=8000)
    parser.add_argument("--groups", type=int, default=80)
    parser.add_argument("--degree", type=int, default=20)
    parser.add_argument("--walks", type=int, default=10, help="per node")
    parser.add_argument("--length", type=int, default=40)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    sources, targets = planted(asked.nodes, asked.groups, asked.degree, 0.2, seed=0)
    split = split_edges(asked.nodes, sources, targets, share=0.2)
    graph = adjacency(asked.nodes, split.sources, split.targets)
    cpu = time.process_time()
    walks = list(Walks(graph, WalkOptions(asked.length, asked.walks)))
    walks_cpu_s = time.process_time() - cpu
    sentences = [list(map(str, walk)) for part in walks for walk in part.tolist()]
    tokens = asked.passes * sum(map(len, sentences))
    found: dict[str, list[Outcome]] = {"shardpar": [], "gensim": []}
    for seed in range(asked.rounds):
        for name, learn in (
            ("shardpar", lambda seed: ours(walks, asked.nodes, asked.passes, seed)),
            ("gensim", lambda seed: gensims(sentences, asked.nodes, asked.passes, seed)),
        ):
            outcome = judged(lambda learn=learn, seed=seed: learn(seed), split)
            found[name].append(outcome)
            print(name, f"{tokens / outcome.cpu_s:,.0f} tokens/CPU-s", outcome, flush=True)
    summary = {
        name: {
            "tokens_per_cpu_s": round(tokens / np.median([o.cpu_s for o in outcomes])),
            "auc_dot": round(float(np.mean([o.auc_dot for o in outcomes])), 4),
            "auc_hadamard": round(float(np.mean([o.auc_hadamard for o in outcomes])), 4),
        }
        for name, outcomes in found.items()
    }
    ratio = summary["shardpar"]["tokens_per_cpu_s"] / summary["gensim"]["tokens_per_cpu_s"]
    print(
        json.dumps(
            {
                "nodes": asked.nodes,
                "tokens": tokens,
                "walks_cpu_s": round(walks_cpu_s, 3),
                **summary,
                "ratio": round(ratio, 2),
            }
        )
    )


if __name__ == "__main__":
    main()

"""A plain booster in one place, written apart from the product: same fixed point, bins and rules.

It looks at every row for every candidate, with Python's integers; the guest's columns come first
and win ties, as do lower columns, lower cuts, and missing numbers to the right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass
class Cutting:
    """Candidate cuts of a column: (number, whether missing goes left)."""

    column: int
    cuts: list[tuple[float, bool]]


def cuttings(x, most):
    found = []
    for column in range(x.shape[1]):
        numbers = sorted({float(v) for v in x[:, column] if not math.isnan(v)})
        everything = sorted(float(v) for v in x[:, column] if not math.isnan(v))
        has_missing = any(math.isnan(v) for v in x[:, column])
        if len(numbers) <= most:
            edges = [(a + b) / 2 if (a + b) / 2 < b else a for a, b in pairwise(numbers)]
        else:
            # The quantile from below: of n numbers the one at floor((n - 1) * share).
            places = [math.floor((len(everything) - 1) * (k / most)) for k in range(1, most)]
            edges = sorted({everything[p] for p in places} - {numbers[-1]})
        cuts = []
        for edge in edges:
            cuts += [(edge, False), (edge, True)] if has_missing else [(edge, False)]
        if has_missing:
            cuts.append((math.inf, False))
        found.append(Cutting(column, cuts))
    return found


def pooled(x, y, options, first_of_host):
    """[{node: ("guest" or "host", column, cut, missing left) or leaf value}], and scores."""
    n = len(y)
    base = y.mean() if options.objective == "squared" else math.log(y.mean() / (1 - y.mean()))
    scores = np.full(n, base)
    unit, l2 = 2.0**-options.gradient_bits, options.l2
    columns = cuttings(x, options.max_bins)
    trees = []
    for _ in range(options.trees):
        if options.objective == "squared":
            g, h = scores - y, np.ones(n)
        else:
            p = 1 / (1 + np.exp(-scores))
            g, h = p - y, p * (1 - p)
        g = [round(v / unit) for v in g.tolist()]
        h = [round(v / unit) for v in h.tolist()]
        tree, todo = {}, [(1, list(range(n)), 0)]
        while todo:
            node, rows, depth = todo.pop()
            G, H = sum(g[r] for r in rows) * unit, sum(h[r] for r in rows) * unit
            best = (options.min_gain, None)
            for cutting in columns if depth < options.max_depth else []:
                numbers = x[rows, cutting.column]
                for cut, missing_left in cutting.cuts:
                    goes = np.where(np.isnan(numbers), missing_left, numbers <= cut)
                    left = [r for r, to in zip(rows, goes, strict=True) if to]
                    if min(len(left), len(rows) - len(left)) < options.min_samples:
                        continue
                    gl, hl = sum(g[r] for r in left) * unit, sum(h[r] for r in left) * unit
                    gr, hr = G - gl, H - hl
                    if min(hl, hr) < options.min_child_weight:
                        continue
                    gain = 0.5 * (gl * gl / (hl + l2) + gr * gr / (hr + l2) - G * G / (H + l2))
                    if gain > best[0]:
                        best = (gain, (cutting.column, cut, missing_left, left))
            if best[1] is None:
                tree[node] = -options.learning_rate * G / (H + l2)
                for r in rows:
                    scores[r] += tree[node]
                continue
            column, cut, missing_left, left = best[1]
            owner = "guest" if column < first_of_host else "host"
            tree[node] = (owner, column - (owner == "host") * first_of_host, cut, missing_left)
            inside = set(left)
            todo.append((2 * node, left, depth + 1))
            todo.append((2 * node + 1, [r for r in rows if r not in inside], depth + 1))
        trees.append(tree)
    return trees, scores

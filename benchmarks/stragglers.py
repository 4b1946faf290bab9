"""Slow devices among 32 in the simulator: keep, rebalance, plan anew, leave out, against the ideal.

    python -m benchmarks.stragglers
    python -m benchmarks.stragglers --model 33b --case "one device"

32 H100 in hosts of eight (of configs/clusters/h100x64.yaml), LLaMA of 7 or 33 billion parameters,
64 sequences of 4,096 tokens a step. A slow device takes 2.6 times as long. The ideal step is that
of the healthy machines times what they can do over what the slowed ones can: 32 over the sum of
speeds. Targets: within 1.1 of it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.llama_graph import llama_graph
from shardpar.planner.options import ReplanOptions, SearchOptions
from shardpar.planner.replan import Alternative, replan
from shardpar.planner.search import search
from shardpar.planner.setting import Workload
from shardpar.spec.text import cluster_from_text, plan_to_text

BATCH, LENGTH, DEVICES, SLOW = 64, 4096, 32, 1 / 2.6
CLUSTER = Path(__file__).parents[1] / "configs" / "clusters" / "h100x64.yaml"

MODELS = {
    "7b": {"layers": 32, "width": 4096, "heads": 32, "mlp_width": 11008},
    "33b": {"layers": 60, "width": 6656, "heads": 52, "mlp_width": 17920},
}
CASES = {
    "one device": (5,),
    "two devices of two hosts": (5, 17),
    "one host": tuple(range(8, 16)),
}


def shown(found: list[Alternative], ideal_s: float) -> str:
    """The best of some alternatives, over the ideal."""
    step_s = min((a.step_s for a in found if a.plan is not None), default=None)
    return "-" if step_s is None else f"{step_s:.3f} ({step_s / ideal_s:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="one of them alone")
    parser.add_argument("--case", choices=CASES, help="one of them alone")
    parser.add_argument("--epsilon", type=float, default=0.02, help="of all searches")
    parser.add_argument("--plans", action="store_true", help="print the plans that were chosen")
    args = parser.parse_args()
    whole = cluster_from_text(CLUSTER.read_text(), str(CLUSTER))
    cluster = whole.only(range(DEVICES))
    options = SearchOptions(epsilon=args.epsilon)
    head = "| model | slow | healthy, s | ideal, s | keep | rebalanced | same groups | searched "
    print(
        f"{head}| without the slow | chosen | moved, GB | move, s | CPU-s |\n|{'---|' * 13}",
        flush=True,
    )
    for model in [args.model] if args.model else MODELS:
        graph = llama_graph(BATCH, LENGTH, **MODELS[model])
        work = Workload(BATCH, graph.compute_dtype)
        healthy = search(graph, cluster, work, options)
        for case in [args.case] if args.case else CASES:
            speeds = dict.fromkeys(CASES[case], SLOW)
            ideal_s = healthy.simulated_s * DEVICES / (DEVICES - len(speeds) * (1 - SLOW))
            start = time.process_time()
            decision = replan(
                graph, cluster, work, options, healthy.plan, speeds=speeds,
                costs=ReplanOptions(horizon_steps=1000),
            )  # fmt: skip
            cpu_s = time.process_time() - start
            keep, rebalanced, same, searched, *without = decision.alternatives
            chosen = next(a for a in decision.alternatives if a.name == decision.name)
            print(
                f"| {model} | {case} | {healthy.simulated_s:.3f} | {ideal_s:.3f} "
                f"| {shown([keep], ideal_s)} | {shown([rebalanced], ideal_s)} "
                f"| {shown([same], ideal_s)} | {shown([searched], ideal_s)} "
                f"| {shown(without, ideal_s)} "
                f"| {decision.name} | {chosen.move.moved_bytes / 1e9:.0f} "
                f"| {chosen.move.move_s:.1f} | {cpu_s:.0f} |",
                flush=True,
            )
            if args.plans:
                print(f"{decision}\n{plan_to_text(decision.plan)}", flush=True)


if __name__ == "__main__":
    main()

"""Reshards: bytes against their lower bound, the busiest link against its own, planning, wall time.

python benchmarks/reshard.py bytes        every pair of a grid of layouts, on 8 devices
python benchmarks/reshard.py planning     a switch of 300 tensors on 64 and on 1,024 devices
python benchmarks/reshard.py wall         against jax.device_put, interleaved in one process
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections import defaultdict

import numpy as np

from shardpar.spec.cluster import Cluster, DeviceKind, Hosts, Link
from shardpar.spec.layout import Group, Layout, Replicate, Split
from shardpar.spec.layout_text import layout_from_text
from shardpar.spec.reshard import Reshard, Tensor, fuse, reshard
from shardpar.spec.routing import greedy

SHAPE = (96, 96)
GRID = (
    "[0,1,2,3,4,5,6,7]{split0:8}",
    "[0,1,2,3,4,5,6,7]{split1:8}",
    "[0,1,2,3,4,5,6,7]{split0:4, split1:2}",
    "[0,1,2,3,4,5,6,7]{split0:2, dup:4}",
    "[0,1,2,3,4,5,6,7]{dup:4, split0:2}",
    "[0,1,2,3,4,5,6,7]{dup:8}",
    "[7,6,5,4,3,2,1,0]{split1:2, split0:2, dup:2}",
    "[0,1,2,3]{split0:4}",
    "[4,5,6,7]{split0:2, split1:2}",
    "[0,1,2]{split0:3}",
    "[3]{}",
    "[0,1,2,3]{split0:4} + [4,5,6,7]{split1:4} across dup",
    "[0,1,2,3]{split0:2, dup:2} + [4,5]{split1:2} across dup",
    "[0,1]{split0:2} + [2]{} + [3,4,5]{split0:3} across dup",
    "[0,1,2,3]{split1:4} + [4,5]{split1:2} across split0(64,32)",
    "[0,1]{split0:2} + [2]{} + [3,4,5]{split1:3} across split0(48,12,36)",
    "[0,1]{split0:2} + [2]{} across split0(0:24,1:24,0:24,1:24)",
    "[0,1]{partial:2}",
    "[0,1,2,3,4,5,6,7]{partial:8}",
    "[0,1,2,3,4,5,6,7]{split0:2, partial:4}",
    "[0,1,2,3]{split0:4} + [4,5,6,7]{split1:4} across partial",
    "[0,1]{split0:2} + [2]{} across partial",
    "[0,1,2,3]{split0:2, dup:2} + [4,5]{split1:2} across partial",
    "[0,1]{partial:2} + [2]{} + [3,4,5]{split0:3} across partial",
)  # fmt: skip


def machines(hosts: int, per_host: int) -> Cluster:
    kind = DeviceKind("h100", (("bfloat16", 989e12),), 80e9, 3.35e12)
    intra, inter = Link(450e9, 5e-6), Link(50e9, 1e-5)
    return Cluster(
        f"h100x{hosts * per_host}", (kind,), (Hosts("h100", per_host, hosts),), intra, inter
    )


def by_greedy(resolved: Reshard, itemsize: int, cluster: Cluster | None) -> float:
    """Load of the busiest link if each step's senders were chosen by the field's greedy."""
    total = 0.0
    for stride in resolved.strides[0]:
        if stride.moves:
            wanted = stride.step.demands(resolved.tensors[0].shape)
            total += greedy(wanted, [float(d.size * itemsize) for d in wanted], cluster).busiest_s
    return total


def measure_bytes() -> None:
    layouts = [layout_from_text(text) for text in GRID]
    rows: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    worst: list[tuple[float, str]] = []
    for cluster in (None, machines(2, 4)):
        for src, dst in itertools.permutations(layouts, 2):
            resolved = reshard(src, dst, SHAPE, 4, cluster)
            kind = "pure moves" if src.terms == 1 else "addends to a whole"
            bound = resolved.lower_bound_bytes
            ratio = resolved.total_bytes / bound if bound else 1.0
            if dst.terms > 1:
                # Its addends may be anything that adds up: there is no bound to compare with.
                kind, ratio = "to addends", math.nan
            least, busy = resolved.busiest_bound_s, resolved.busiest_s
            link = busy / least if least else 1.0
            simple = by_greedy(resolved, 4, cluster)
            rows[kind + (", 2 hosts" if cluster else "")].append(
                (ratio, link, busy / simple if simple else 1.0)
            )
            worst.append((ratio, f"{src} → {dst}: {resolved.total_bytes} B, bound {bound} B"))
    print(
        "| pairs | count | bytes / bound, worst | mean | busiest link / bound, worst | "
        "/ greedy, worst | greedy beaten |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, found in rows.items():
        ratios, links, greedies = zip(*found, strict=True)
        print(
            f"| {name} | {len(found)} | {max(ratios):.3f} | {statistics.mean(ratios):.3f} | "
            f"{max(links):.3f} | {max(greedies):.3f} | {sum(g < 0.999 for g in greedies)} |"
        )
    above = sorted({pair for pair in worst if pair[0] > 1.0005}, reverse=True)
    print(f"\n{len(above)} pairs above their bound of bytes; the worst:")
    for ratio, text in above[:12]:
        print(f"  {ratio:.3f} {text}")


SIZES = ((4096, 4096), (4096, 4096), (4096, 1024), (4096, 1024), (4096, 14336), (4096, 14336),
         (14336, 4096), (4096,), (4096,))  # fmt: skip


def laid_out(devices: range, shape: tuple[int, ...], fsdp: int, tensor: int) -> Group:
    """A stage's parameter: fsdp over dim 0, tensor over dim 1; small ones whole."""
    copies = len(devices) // (fsdp * tensor)
    if len(shape) == 1:
        return Group(tuple(devices), (Replicate(len(devices)),))
    entries = (
        *((Replicate(copies),) if copies > 1 else ()),
        *((Split(0, fsdp),) if fsdp > 1 else ()),
        Split(1, tensor),
    )
    return Group(tuple(devices), entries)


def switch(devices: int) -> list[Tensor]:
    """300 tensors of a LLaMA from one uniform plan to pipelines of two unequal shapes."""
    tensors = []
    half, layers = devices // 2, 33
    pipelines = devices // 128 or 1
    for layer in range(layers):
        for shape in SIZES:
            src = Layout((laid_out(range(devices), shape, devices // 8, 8),))
            groups = []
            for k in range(pipelines):
                wide = half // pipelines // 2
                at = k * (half // pipelines) + (layer * 2 // layers) * wide
                groups.append(laid_out(range(at, at + wide), shape, max(1, wide // 8), 8))
                thin = half // pipelines // 4
                at = half + k * (half // pipelines) + (layer * 4 // layers) * thin
                groups.append(laid_out(range(at, at + thin), shape, max(1, thin // 4), 4))
            tensors.append(Tensor(src, Layout(tuple(groups)), shape, 2))
    for shape in ((32768, 4096), (32768, 4096), (4096,)):
        src = Layout((laid_out(range(devices), shape, devices // 8, 8),))
        dst = Layout((laid_out(range(half // 2), shape, half // 16, 8),))
        tensors.append(Tensor(src, dst, shape, 2))
    return tensors


def measure_planning() -> None:
    print("| devices | tensors | CPU-s | bytes / bound | busiest link / bound | messages |")
    print("|---|---|---|---|---|---|")
    for devices in (64, 1024):
        tensors = switch(devices)
        cluster = machines(devices // 8, 8)
        start = time.process_time()
        resolved = fuse(tensors, cluster)
        spent = time.process_time() - start
        ratio = resolved.total_bytes / resolved.lower_bound_bytes
        link = resolved.busiest_s / resolved.busiest_bound_s
        print(
            f"| {devices} | {len(tensors)} | {spent:.2f} | {ratio:.4f} | {link:.4f} | "
            f"{len(resolved.messages())} |"
        )


WALL = (
    ("same sharding, other devices", "[0,1,2,3]{split0:4}", "[4,5,6,7]{split0:4}"),
    ("copies to copies, other devices", "[0,1]{dup:2}", "[4,5]{dup:2}"),
    ("4 parts to 2", "[0,1,2,3]{split0:4}", "[4,5]{split0:2}"),
    ("4 parts to another dim", "[0,1,2,3]{split0:4}", "[4,5,6,7]{split1:4}"),
    ("4 parts to copies", "[0,1,2,3]{split0:4}", "[4,5]{dup:2}"),
    ("4 parts to all 8 devices", "[0,1,2,3]{split0:4}", "[0,1,2,3,4,5,6,7]{split0:8}"),
    ("another dim, same devices", "[0,1,2,3]{split0:4}", "[0,1,2,3]{split1:4}"),
    ("gather, same devices", "[0,1,2,3]{split0:4}", "[0,1,2,3]{dup:4}"),
    ("slice, same devices", "[0,1,2,3]{dup:4}", "[0,1,2,3]{split0:4}"),
    ("one device to another", "[0]{}", "[1]{}"),
)  # fmt: skip


def interval(ratios: list[float]) -> str:
    """The median and a 95% bootstrap interval of it."""
    random = np.random.default_rng(0)
    medians = np.median(random.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return f"{statistics.median(ratios):.2f} ({low:.2f}–{high:.2f})"


def measure_wall(pairs: int) -> None:
    from shardpar.lowering.devices import use_virtual_devices

    use_virtual_devices(8)
    import jax

    from shardpar.lowering.shardings import group_sharding
    from shardpar.lowering.transfer import Transfer
    from shardpar.lowering.union import place

    value = np.random.default_rng(0).normal(size=(4096, 4096)).astype(np.float32)
    print("| pair | ours / device_put |")
    print("|---|---|")
    for name, src_text, dst_text in WALL:
        src, dst = layout_from_text(src_text), layout_from_text(dst_text)
        union = place(value, src)
        target = group_sharding(dst.groups[0], 2, jax.devices())
        program = Transfer(fuse([Tensor(src, dst, value.shape, 4)]), [value.dtype])

        def ours(_, program=program, union=union):
            return jax.block_until_ready(program([union])[0].arrays)

        def fresh(union=union):
            # An array keeps the host's copy of itself that its first device_put made.
            array = union.arrays[0]
            pieces = [shard.data for shard in array.addressable_shards]
            return jax.make_array_from_single_device_arrays(array.shape, array.sharding, pieces)

        def theirs(array, target=target):
            return jax.block_until_ready(jax.device_put(array, target))

        def seconds(run, fresh=fresh):
            array = fresh()
            start = time.perf_counter()
            run(array)
            return time.perf_counter() - start

        assert np.array_equal(ours(None)[0], theirs(fresh()))
        for _ in range(3):
            ours(None), theirs(fresh())
        ratios = []
        for i in range(pairs):
            took = {run: seconds(run) for run in ((ours, theirs), (theirs, ours))[i % 2]}
            ratios.append(took[ours] / took[theirs])
        print(f"| {name} | {interval(ratios)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["bytes", "planning", "wall"])
    parser.add_argument("--pairs", type=int, default=60, help="interleaved pairs, for wall")
    arguments = parser.parse_args()
    if arguments.what == "bytes":
        measure_bytes()
    elif arguments.what == "planning":
        measure_planning()
    else:
        measure_wall(arguments.pairs)


if __name__ == "__main__":
    main()

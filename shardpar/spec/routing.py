"""Which owner sends each slice, so that the most loaded link is least loaded.

A receiver takes a slice from an owner on its own host where there is one. What then is
free to choose is a flow from demands to the owners' links: the least time in which all
links together can send everything is found exactly by raising it to the tightest cut
until a maximum flow meets all demands (Dinkelbach's method), then again for what that cut
leaves free. Whole cells follow the flow; where a border falls inside a cell it is cut.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, maximum_flow

from shardpar.spec.cluster import Cluster
from shardpar.spec.exchange import Demand, Move, moves_of

Port = tuple[int, bool]
"""A device's link: (device, whether it goes to other hosts)."""

_CAPACITY = 2**30
_SMALL = 4096
"""With so few slices the reference's greedy is tried too, as cells cannot be cut at will."""

_FINE = 64
"""A cell is cut in so many grains per sender at least, if it has the elements."""

Shares = dict[int, list[tuple[int, int]]]


@dataclass(frozen=True)
class Routing:
    """How some demands are met.

    Attributes:
      shares: for each demand, by receiver, (sender, elements of the cell) pairs.
      load_s: seconds each port is busy; bytes where there is no cluster.
      bound_s: the least that the busiest port could have had.
    """

    shares: tuple[Shares, ...]
    load_s: Mapping[Port, float]
    bound_s: float

    @property
    def busiest_s(self) -> float:
        """Load of the busiest port."""
        return max(self.load_s.values(), default=0.0)

    def moves(self, wanted: Sequence[Demand]) -> tuple[Move, ...]:
        """The moves that meet the demands this routing was made for."""
        return tuple(
            move
            for demand, shares in zip(wanted, self.shares, strict=True)
            for move in moves_of(demand, shares)
        )


def route(
    wanted: Sequence[Demand], num_bytes: Sequence[float], cluster: Cluster | None = None
) -> Routing:
    """Chooses the senders.

    Args:
      wanted: the demands.
      num_bytes: bytes that each sends to each of its receivers.
      cluster: whose links and hosts count; None counts bytes per device.

    >>> demand = Demand(((0, 8),), 0, (0, 1), (2,))
    >>> route([demand], [64.0]).shares
    ({2: [(0, 4), (1, 4)]},)
    """
    ports = _Ports(cluster)
    classes: dict[tuple[Port, ...], list[tuple[int, int]]] = defaultdict(list)
    for number, demand in enumerate(wanted):
        for receiver in demand.receivers:
            classes[ports.candidates(demand.owners, receiver)].append((number, receiver))
    weights = {
        key: sum(num_bytes[number] for number, _ in members) for key, members in classes.items()
    }
    quotas, bound = _quotas(weights, ports)
    shares: list[Shares] = [{} for _ in wanted]
    for key, members in classes.items():
        _fill(members, quotas[key], wanted, num_bytes, shares)
    found = Routing(tuple(shares), _loads(shares, num_bytes, wanted, ports), bound)
    if sum(map(len, classes.values())) <= _SMALL:
        simple = greedy(wanted, num_bytes, cluster)
        if simple.busiest_s < found.busiest_s:
            return Routing(simple.shares, simple.load_s, bound)
    return found


def greedy(
    wanted: Sequence[Demand], num_bytes: Sequence[float], cluster: Cluster | None = None
) -> Routing:
    """The rule of HSPMD: slice by slice, the owner on the nearest host that has sent least."""
    ports = _Ports(cluster)
    load: dict[Port, float] = defaultdict(float)
    shares: list[Shares] = [{} for _ in wanted]
    for number, demand in enumerate(wanted):
        for receiver in demand.receivers:
            port = min(ports.candidates(demand.owners, receiver), key=lambda p: (load[p], p))
            load[port] += num_bytes[number] / ports.speed(port)
            shares[number][receiver] = [(port[0], demand.size)]
    return Routing(tuple(shares), dict(load), max(load.values(), default=0.0))


class _Ports:
    """The cluster's links as seen from a sender."""

    def __init__(self, cluster: Cluster | None) -> None:
        self._cluster = cluster
        self._known: dict[tuple[tuple[int, ...], int], tuple[Port, ...]] = {}

    def _host(self, device: int) -> int:
        return self._cluster.host_of(device) if self._cluster else 0

    def speed(self, port: Port) -> float:
        if self._cluster is None:
            return 1.0
        link = self._cluster.inter_host if port[1] else self._cluster.intra_host
        return link.bandwidth

    def candidates(self, owners: tuple[int, ...], receiver: int) -> tuple[Port, ...]:
        key = owners, self._host(receiver)
        if key not in self._known:
            near = tuple((owner, False) for owner in owners if self._host(owner) == key[1])
            self._known[key] = near or tuple((owner, True) for owner in owners)
        return self._known[key]

    def port(self, sender: int, receiver: int) -> Port:
        return sender, self._host(sender) != self._host(receiver)


def _loads(
    shares: Sequence[Shares], num_bytes: Sequence[float], wanted: Sequence[Demand], ports: _Ports
) -> dict[Port, float]:
    load: dict[Port, float] = defaultdict(float)
    for demand, of_demand, size in zip(wanted, shares, num_bytes, strict=True):
        for receiver in demand.receivers:
            for sender, elements in of_demand[receiver]:
                port = ports.port(sender, receiver)
                load[port] += elements / demand.size * size / ports.speed(port)
    return dict(load)


Quotas = dict[tuple[Port, ...], dict[Port, float]]


def _quotas(weights: Mapping[tuple[Port, ...], float], ports: _Ports) -> tuple[Quotas, float]:
    """Bytes of each class that each of its ports sends, and the load of the busiest port."""
    quotas: Quotas = {}
    bound = 0.0
    for group in _connected(list(weights)):
        left, closed = list(group), set[Port]()
        while left:
            open_ports = {key: [p for p in key if p not in closed] for key in left}
            least, tight, flows = _least([(open_ports[key], weights[key]) for key in left], ports)
            bound = max(bound, least)
            for i in tight:
                quotas[left[i]] = flows[i]
                closed.update(open_ports[left[i]])
            left = [key for i, key in enumerate(left) if i not in tight]
    return quotas, bound


def _connected(keys: list[tuple[Port, ...]]) -> list[list[tuple[Port, ...]]]:
    """Classes in groups that share ports, directly or through others."""
    number = {port: i for i, port in enumerate(sorted({p for key in keys for p in key}))}
    rows = [i for i, key in enumerate(keys) for _ in key]
    columns = [len(keys) + number[p] for key in keys for p in key]
    size = len(keys) + len(number)
    graph = csr_array((np.ones(len(rows)), (rows, columns)), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    groups: dict[int, list[tuple[Port, ...]]] = defaultdict(list)
    for key, label in zip(keys, labels, strict=False):
        groups[int(label)].append(key)
    return list(groups.values())


def _least(
    classes: list[tuple[list[Port], float]], ports: _Ports
) -> tuple[float, set[int], list[dict[Port, float]]]:
    """The least time for some connected classes, those that need it all, and a flow.

    Sums are Python's, not NumPy's: every process of a run must come to the same senders,
    whatever vectors its processor has.
    """
    used = sorted({port for of_class, _ in classes for port in of_class})
    speeds = [ports.speed(port) for port in used]
    weights = [weight for _, weight in classes]
    whole = math.fsum(weights) / math.fsum(speeds)
    if len(classes) == 1:
        return whole, {0}, [{p: whole * s for p, s in zip(used, speeds, strict=True)}]
    number = {port: i for i, port in enumerate(used)}
    members = [[number[p] for p in of_class] for of_class, _ in classes]

    def time_of(group: Iterable[int]) -> float:
        """The time a group of classes takes if nobody else uses its ports."""
        among = sorted(group)
        cut = sorted({p for i in among for p in members[i]})
        return math.fsum(weights[i] for i in among) / math.fsum(speeds[p] for p in cut)

    tight = max(({i} for i in range(len(classes))), key=time_of)
    least = time_of(tight)
    if whole >= least:
        tight, least = set(range(len(classes))), whole
    while True:
        flow, reached = _flow(members, weights, [s * least for s in speeds])
        if not reached:
            break
        tight = reached
        if time_of(reached) <= least * (1 + 1e-6):
            break
        least = time_of(reached)
    taken = {p for i in tight for p in members[i]}
    # Within the tolerance a small class may have been left without a port of its own.
    tight |= {i for i, ps in enumerate(members) if taken.issuperset(ps)}
    if len(tight) < len(classes):
        # Ports of the tight classes must serve them alone.
        inside = sorted(tight)
        alone, _ = _flow(
            [members[i] for i in inside], [weights[i] for i in inside], [s * least for s in speeds]
        )
        flow = [alone[inside.index(i)] if i in tight else {} for i in range(len(classes))]
    return least, tight, [{used[p]: amount for p, amount in of_class.items()} for of_class in flow]


def _flow(
    members: list[list[int]], weights: list[float], capacities: list[float]
) -> tuple[list[dict[int, float]], set[int]]:
    """A maximum flow from classes to ports; and the classes on the near side of its tightest cut.

    The set is empty where every class is served.
    """
    unit = math.fsum(weights) / _CAPACITY
    n, m = len(members), len(capacities)
    source, sink = n + m, n + m + 1
    supply = [max(1, math.floor(weight / unit)) for weight in weights]
    rows = [source] * n + [i for i, ps in enumerate(members) for _ in ps] + list(range(n, n + m))
    columns = list(range(n)) + [n + p for ps in members for p in ps] + [sink] * m
    limits = [math.ceil(capacity / unit) + n for capacity in capacities]
    data = [*supply, *(supply[i] for i, ps in enumerate(members) for _ in ps), *limits]
    clipped = np.minimum(data, 2**31 - 1).astype(np.int32)
    size = n + m + 2
    graph = csr_array((clipped, (rows, columns)), shape=(size, size))
    result = maximum_flow(graph, source, sink)
    sent = result.flow.tocsr()
    out: list[dict[int, float]] = []
    for i, ps in enumerate(members):
        amounts = {p: max(0.0, float(sent[i, n + p])) for p in ps}
        if not any(amounts.values()):
            amounts = dict.fromkeys(ps, 1.0)
        total = sum(amounts.values())
        out.append({p: a / total * weights[i] for p, a in amounts.items() if a > 0})
    if result.flow_value >= sum(supply):
        return out, set()
    residual = csr_array(graph - sent)
    residual.data = np.where(residual.data > 0, 1, 0)
    residual.eliminate_zeros()
    reached = breadth_first_order(residual, source, return_predecessors=False)
    return out, {int(i) for i in reached if i < n}


def _fill(
    members: list[tuple[int, int]],
    quotas: Mapping[Port, float],
    wanted: Sequence[Demand],
    num_bytes: Sequence[float],
    shares: list[Shares],
) -> None:
    """Gives a class's slices to its ports, each as much as the flow says, cutting few."""
    ports = [port for port, amount in quotas.items() if amount > 0]
    at, left = 0, quotas[ports[0]]
    for number, receiver in members:
        elements, grain = wanted[number].size, _grain(wanted[number], len(ports))
        each = num_bytes[number] / elements
        given: list[tuple[int, int]] = []
        waiting = elements
        while waiting:
            fits = waiting if at == len(ports) - 1 else round(left / each / grain) * grain
            taken = min(waiting, max(0, fits))
            if taken:
                given.append((ports[at][0], taken))
                left -= taken * each
                waiting -= taken
            if waiting:
                at += 1
                left += quotas[ports[at]]
        shares[number][receiver] = given


def _grain(demand: Demand, senders: int) -> int:
    """Elements that are not cut apart: whole rows where there are many, to make few slices."""
    sizes = sorted((stop - start for start, stop in demand.cell), reverse=True)
    grains, grain = 1, demand.size
    for size in sizes:
        if grains >= _FINE * senders:
            break
        grains, grain = grains * size, grain // size
    return grain

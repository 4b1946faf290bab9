"""Private set intersection of two parties beside OpenMined's and SecretFlow's, CPU seconds each.

Both parties learn in shardpar's and SecretFlow's runs; of OpenMined's only the client can. Half of
each set is common. Every repetition runs all of them in turn, each party in a process of its own;
shardpar once more with a pool of processes, for seconds of the wall clock.

    python -m benchmarks.fl_psi --ids 100000 --repeats 3

Peers: `pip install openmined-psi`, and `pip install spu` (0.9.5 needs jax 0.4.34 and numpy 1, so
an environment of its own, where shardpar.fl.psi runs too); those not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import resource
import socket
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from shardpar.fl.he.pool import Pool
from shardpar.fl.messages import M, Message, decode, encode
from shardpar.fl.psi import align
from shardpar.fl.psi_session import PsiSession


@dataclass(frozen=True)
class Cost:
    """Of one party, on average over both."""

    cpu_s: float
    wall_s: float
    sent_bytes: float | None = None


Sets = tuple[list[str], list[str]]


class QueueChannel:
    """Between two processes."""

    def __init__(self, party: str, peer: str, outgoing: Any, incoming: Any) -> None:
        self.party, self.parties, self.sent_bytes = party, tuple(sorted((party, peer))), 0
        self._outgoing, self._incoming = outgoing, incoming
        self._early: dict[str, deque[bytes]] = defaultdict(deque)

    def send(self, to: str, topic: str, message: Message) -> None:
        data = encode(message)
        self.sent_bytes += len(data)
        self._outgoing.put((topic, data))

    def receive(self, sender: str, topic: str, kind: type[M], timeout_s: float | None = None) -> M:
        while not self._early[topic]:
            found, data = self._incoming.get(timeout=timeout_s or 600)
            self._early[found].append(data)
        return decode(self._early[topic].popleft(), kind, party=sender)


def party(
    name: str, peer: str, ids: list[str], processes: int, outgoing: Any, incoming: Any, answers: Any
) -> None:
    channel = QueueChannel(name, peer, outgoing, incoming)
    cpu = cpu_of_all()
    with Pool(processes) as pool:
        rows = align(channel, peer, ids, PsiSession("bench", ("a", "b")), pool=pool)
    spent = cpu_of_all() - cpu
    answers.put((name, [ids[row] for row in rows.tolist()], spent, channel.sent_bytes))


def ours(sets: Sets, processes: int = 1) -> Cost:
    """Each party in a process of its own, and its pool's processes if it has any."""
    context = multiprocessing.get_context("spawn")
    there, back, answers = context.Queue(), context.Queue(), context.Queue()
    began = time.perf_counter()
    parties = [
        context.Process(target=party, args=("a", "b", sets[0], processes, there, back, answers)),
        context.Process(target=party, args=("b", "a", sets[1], processes, back, there, answers)),
    ]
    for one in parties:
        one.start()
    (_, first, cpu_a, sent), (_, second, cpu_b, _) = (answers.get() for _ in parties)
    for one in parties:
        one.join()
    assert first == second
    assert len(first) == len(sets[0]) // 2
    return Cost((cpu_a + cpu_b) / 2, time.perf_counter() - began, sent)


def cpu_of_all() -> float:
    """CPU seconds of this process and those that it started and that ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def of_openmined(sets: Sets) -> Cost:
    """The server's answers are uncompressed, as exact as ours."""
    import private_set_intersection.python as openmined

    began, cpu = time.perf_counter(), time.process_time()
    client = openmined.client.CreateWithNewKey(True)
    server = openmined.server.CreateWithNewKey(True)
    setup = server.CreateSetupMessage(0.0, len(sets[0]), sets[1], openmined.DataStructure.RAW)
    request = client.CreateRequest(sets[0])
    answer = server.ProcessRequest(request)
    found = client.GetIntersection(setup, answer)
    wall, spent = time.perf_counter() - began, time.process_time() - cpu
    assert len(found) == len(sets[0]) // 2
    sent = sum(message.ByteSize() for message in (setup, request, answer)) / 2
    return Cost(spent / 2, wall, sent)


def of_secretflow(curve: str, protocol: str = "PROTOCOL_ECDH") -> Callable[[Sets], Cost]:
    """SecretFlow's, each party in a process of its own; files are read and written too."""

    def work(sets: Sets) -> Cost:
        ports = [free_port() for _ in range(2)]
        context = multiprocessing.get_context("spawn")
        answers = context.SimpleQueue()
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            for rank, ids in enumerate(sets):
                Path(folder, f"{rank}.csv").write_text("id\n" + "\n".join(ids) + "\n")
            parties = [
                context.Process(
                    target=secretflow_party, args=(rank, ports, folder, curve, protocol, answers)
                )
                for rank in range(2)
            ]
            for party in parties:
                party.start()
            for party in parties:
                party.join()
        wall = time.perf_counter() - began
        results = [answers.get() for _ in range(2)]
        assert all(common == len(sets[0]) // 2 for common, _ in results)
        return Cost(sum(cpu_s for _, cpu_s in results) / 2, wall)

    return work


def secretflow_party(
    rank: int,
    ports: list[int],
    folder: str,
    curve: str,
    protocol: str,
    answers: multiprocessing.SimpleQueue,
) -> None:
    from spu import libspu, psi

    description = libspu.link.Desc()
    for at, port in enumerate(ports):
        description.add_party(f"party {at}", f"127.0.0.1:{port}")
    link = libspu.link.create_brpc(description, rank)
    config = psi.PsiExecuteConfig(
        protocol_conf=psi.PsiProtocolConfig(
            protocol=psi.parse_protocol(protocol),
            broadcast_result=True,
            ecdh_params=psi.EcdhParams(curve=psi.parse_curve_type(curve)),
        ),
        input_params=psi.InputParams(
            path=f"{folder}/{rank}.csv", selected_keys=["id"], keys_unique=True
        ),
        output_params=psi.OutputParams(path=f"{folder}/out{rank}.csv"),
    )
    cpu = time.process_time()
    report = psi.psi_execute(config, link)
    answers.put((report.intersection_count, time.process_time() - cpu))
    link.stop_link()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ids", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    count, first = options.ids, options.ids // 2
    people = [f"person{at:09d}@example.org" for at in range(count + first)]
    sets = people[:count], people[first : first + count]
    works: dict[str, Callable[[Sets], Cost]] = {"shardpar": ours}
    works[f"shardpar, {options.processes} processes"] = lambda s: ours(s, options.processes)
    if importlib.util.find_spec("private_set_intersection"):
        works["OpenMined 2.0 (P-256), client alone learns"] = of_openmined
    if importlib.util.find_spec("spu"):
        works["SecretFlow ECDH, Elligator 2"] = of_secretflow("CURVE_25519_ELLIGATOR2")
        works["SecretFlow ECDH, SHA-256 as u-coordinate"] = of_secretflow("CURVE_25519")
        works["SecretFlow RR22 (oblivious transfer)"] = of_secretflow(
            "CURVE_25519", "PROTOCOL_RR22"
        )
    costs: dict[str, list[Cost]] = {name: [] for name in works}
    for _ in range(options.repeats):
        for name, work in works.items():
            costs[name].append(work(sets))
    print(f"{count} x {count} ids, one party, median of {options.repeats}")
    print("| | CPU s | wall s | MB sent |\n|---|---|---|---|")
    for name, found in costs.items():
        sent = found[0].sent_bytes
        print(
            f"| {name} | {median(c.cpu_s for c in found):.2f} "
            f"| {median(c.wall_s for c in found):.1f} "
            f"| {'' if sent is None else f'{sent / 1e6:.1f}'} |"
        )


if __name__ == "__main__":
    main()

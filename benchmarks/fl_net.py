"""One large array between two processes over mutual TLS, beside plain gRPC and Flower's objects.

    python -m benchmarks.fl_net --mib 256 --repeats 5       # without flwr, Flower is left out

Each sends an array and ends when the other process holds it as an array again. Plain gRPC is one
unary call with the bytes of the array: no parts, no hash, no second chance. Flower's are its own
objects, hashed and cut as it does, pushed by its own function over the same TLS, put together
again where they arrive; its SuperLink would store them and pass them on once more. Repetitions of
all take turns; CPU seconds are of both processes together.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from shardpar.fl.messages import Message, Tensor, array_of, tensor_of
from shardpar.fl.net.credentials import dialling_credentials, dialling_options
from shardpar.fl.net.grpc_channel import GrpcChannel
from shardpar.fl.net.keys import make_test_keys, read_keys
from shardpar.fl.net.limits import Limits

try:
    from flwr.app.message.array import Array
    from flwr.proto.message_pb2 import PushObjectRequest
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import (
        inflate_object_from_contents,
        push_objects,
    )
except ModuleNotFoundError:
    Array = None

PARTIES = ("receiver", "sender")
LIMITS = Limits(max_message_bytes=1 << 30, window_bytes=1 << 31)
SIZES = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
Send = Callable[[np.ndarray], None]


class Update(Message):
    """The array."""

    tensor: Tensor


class Taken(Message):
    """The receiver has it."""

    total: float


def receive(keys: Path, pipe: Connection) -> None:
    """The other process: takes arrays in whichever way they come, and tells its CPU seconds."""
    mine = read_keys(keys, "receiver")
    contents: dict[str, bytes] = {}

    def unary(data: bytes, _: grpc.ServicerContext) -> bytes:
        np.frombuffer(data, np.float32)
        return b""

    def push(data: bytes, _: grpc.ServicerContext) -> bytes:
        request = PushObjectRequest.FromString(data)
        contents[request.object_id] = request.object_content
        return b""

    def inflate(data: bytes, _: grpc.ServicerContext) -> bytes:
        inflate_object_from_contents(data.decode(), contents).numpy()
        return b""

    server = grpc.server(futures.ThreadPoolExecutor(4), options=SIZES)
    methods = {
        name: grpc.unary_unary_rpc_method_handler(method)
        for name, method in (("unary", unary), ("push", push), ("inflate", inflate))
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", methods),))
    port = server.add_secure_port(
        "127.0.0.1:0",
        grpc.ssl_server_credentials([(mine.key, mine.certificate)], mine.ca, True),
    )
    server.start()
    with GrpcChannel.open(
        "receiver", PARTIES, job="bench", keys=mine, listen="127.0.0.1:0", limits=LIMITS
    ) as channel:
        pipe.send((channel.address, f"127.0.0.1:{port}"))
        while (asked := pipe.recv()) != "end":
            if asked == "shardpar":
                array_of(channel.receive("sender", "update", Update).tensor)
                channel.send("sender", "taken", Taken(0.0))
            else:
                pipe.send(time.process_time())
    server.stop(None)


@contextmanager
def ways(keys: Path, pipe: Connection) -> Iterator[dict[str, Send]]:
    """How to send an array, by name."""
    mine = read_keys(keys, "sender")
    linked, plain = pipe.recv()
    with ExitStack() as stack:
        channel = stack.enter_context(
            GrpcChannel.open(
                "sender", PARTIES, job="bench", keys=mine, dial={"receiver": linked}, limits=LIMITS
            )
        )
        name = [one for one in dialling_options("receiver") if "target_name" in one[0]]
        raw = stack.enter_context(
            grpc.secure_channel(plain, dialling_credentials(mine), options=SIZES + name)
        )
        unary, push, inflate = (
            raw.unary_unary(f"/bench/{method}") for method in ("unary", "push", "inflate")
        )

        def by_shardpar(array: np.ndarray) -> None:
            pipe.send("shardpar")
            channel.send("receiver", "update", Update(tensor_of(array)))
            channel.receive("receiver", "taken", Taken)

        def by_flower(array: np.ndarray) -> None:
            whole = Array(array)
            push_objects(
                get_all_nested_objects(whole),
                lambda name, content: push(
                    PushObjectRequest(object_id=name, object_content=content).SerializeToString()
                ),
            )
            inflate(whole.object_id.encode())

        found: dict[str, Send] = {
            "shardpar": by_shardpar,
            "gRPC, one unary call": lambda array: unary(array.tobytes()),
        }
        if Array is not None:
            found["Flower's objects"] = by_flower
        yield found


def main() -> None:
    """Prints a row for each way of sending."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    array = np.random.default_rng(0).standard_normal(given.mib << 18, np.float32)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        make_test_keys(keys, PARTIES)
        process = context.Process(target=receive, args=(keys, there))
        process.start()
        taken: dict[str, list[tuple[float, float]]] = {}
        with ways(keys, here) as found:

            def cpu_s() -> float:
                here.send("cpu")
                return time.process_time() + float(here.recv())

            for repeat in range(given.repeats + 1):
                for name, send in found.items():
                    cpu, wall = cpu_s(), time.perf_counter()
                    send(array)
                    wall = time.perf_counter() - wall
                    if repeat:
                        taken.setdefault(name, []).append((wall, cpu_s() - cpu))
            here.send("end")
        process.join()
    table(taken, given.mib / 1024)


def table(taken: dict[str, list[Any]], gib: float) -> None:
    """Prints medians, and the range of wall times."""
    print("| way | GiB/s (least to most) | CPU-s per GiB, both ends |")
    print("|---|---|---|")
    for name, rows in taken.items():
        walls = sorted(gib / wall for wall, _ in rows)
        cpu = statistics.median(cpu for _, cpu in rows) / gib
        middle = statistics.median(walls)
        print(f"| {name} | {middle:.2f} ({walls[0]:.2f} to {walls[-1]:.2f}) | {cpu:.2f} |")


if __name__ == "__main__":
    main()

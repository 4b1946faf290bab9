"""Tokens per CPU-second of one GPT on one CPU device: shardpar, plain flax, torch, Keras.

GPT 13.9M (vocabulary 8192, width 384, 6 layers, 6 heads, length 256, batch 8), float32,
AdamW. Each contestant is a process of its own that compiles, warms up and then waits;
they take turns, so a machine that slows down slows all. CPU-seconds are each
process's own, compile left out.

    python benchmarks/peers_gpt.py [--rounds 7] [--steps 4] [--only NAME ...] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB, WIDTH, LAYERS, HEADS, LENGTH, BATCH = 8192, 384, 6, 6, 256, 8
TOKENS = BATCH * LENGTH
RATE = 3e-4


def data() -> tuple[Any, Any]:
    import numpy as np

    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def shardpar_step() -> Callable[[], float]:
    import jax
    import optax

    import shardpar
    from shardpar.config.model_source import load_model_source

    gpt: Any = load_model_source(Path(__file__).parents[1] / "models" / "gpt.py")
    options = gpt.GPTOptions(VOCAB, LAYERS, WIDTH, HEADS, LENGTH)
    x, y = data()
    batch = {"inputs": x, "targets": y}
    program = shardpar.compile(
        gpt.loss, lambda rngs: gpt.build(options, rngs), optax.adamw(RATE), batch=batch,
        options=shardpar.SearchOptions(microbatch=BATCH, recompute="none"),
        devices=jax.devices()[:1],
    )  # fmt: skip
    state = program.init(0)

    def step() -> float:
        nonlocal state
        state, metrics = program.step(state, batch)
        return float(metrics["loss"])

    return step


def flax_step() -> Callable[[], float]:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, rngs=rngs, decode=False)
            self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
            self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x: Any, mask: Any) -> Any:
            x = x + self.attention(self.norm1(x), mask=mask)
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    class GPT(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.table = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
            self.position = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

        def __call__(self, tokens: Any) -> Any:
            mask = nnx.make_causal_mask(tokens)
            x = self.table(tokens) + self.position(jnp.arange(LENGTH))
            for block in self.blocks:
                x = block(x, mask)
            return self.table.attend(self.norm(x))

    graphdef, params = nnx.split(GPT(nnx.Rngs(0)))
    optimizer = optax.adamw(RATE)
    state = optimizer.init(params)
    x, y = data()

    def loss(params: Any, x: Any, y: Any) -> Any:
        logits = nnx.merge(graphdef, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def update(params: Any, state: Any, x: Any, y: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def step() -> float:
        nonlocal params, state
        params, state, value = update(params, state, x, y)
        return float(value)

    return step


def torch_step(compiled: bool) -> Callable[[], float]:
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x: Any) -> Any:
            b, t, d = x.shape
            q, k, v = (
                z.view(b, t, HEADS, d // HEADS).transpose(1, 2)
                for z in self.qkv(self.norm1(x)).chunk(3, dim=-1)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.position = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
            self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, tokens: Any) -> Any:
            x = self.table(tokens) + self.position(torch.arange(tokens.shape[1]))
            return F.linear(self.norm(self.blocks(x)), self.table.weight)

    model: Any = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    run = torch.compile(model) if compiled else model
    x, y = (torch.from_numpy(a).long() for a in data())

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(run(x).view(-1, VOCAB), y.view(-1))
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def keras_step() -> Callable[[], float]:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    import numpy as np

    tokens = keras.Input((LENGTH,), dtype="int32")
    table = keras.layers.Embedding(VOCAB, WIDTH)
    x = table(tokens) + keras.layers.Embedding(LENGTH, WIDTH)(keras.ops.arange(LENGTH))
    for _ in range(LAYERS):
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y, use_causal_mask=True)
        x = x + y
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(4 * WIDTH, activation="gelu")(y)
        x = x + keras.layers.Dense(WIDTH)(y)
    x = keras.layers.LayerNormalization()(x)
    model = keras.Model(tokens, keras.layers.Dense(VOCAB, use_bias=False)(x))
    model.compile(
        keras.optimizers.AdamW(RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    inputs, targets = data()

    def step() -> float:
        return float(np.asarray(model.train_on_batch(inputs, targets)))

    return step


CONTESTANTS: dict[str, Callable[[], Callable[[], float]]] = {
    "shardpar": shardpar_step,
    "flax.nnx": flax_step,
    "torch eager": lambda: torch_step(False),
    "torch compile": lambda: torch_step(True),
    "keras (jax)": keras_step,
}


def work(name: str, steps: int) -> None:
    """A contestant's process: says `ready`, then runs some steps for each line it is sent."""
    try:
        step = CONTESTANTS[name]()
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    loss = 0.0
    for _ in range(3):
        loss = step()
    print(json.dumps({"ready": True, "loss": loss}), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss = step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall_s": wall, "cpu_s": cpu, "loss": loss}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="*", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        work(arguments.contestant, arguments.steps)
        return
    running: dict[str, Any] = {}
    for name in arguments.only:
        process = subprocess.Popen(
            [sys.executable, __file__, "--contestant", name, "--steps", str(arguments.steps)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        line = process.stdout.readline() if process.stdout else ""
        answer = json.loads(line) if line.strip() else {"missing": "it did not start"}
        if "ready" in answer:
            running[name] = process
        else:
            print(f"{name}: left out: {answer['missing']}", file=sys.stderr)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in running}
    for _ in range(arguments.rounds):
        for name, process in running.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            results[name].append(json.loads(process.stdout.readline()))
    for process in running.values():
        process.stdin.close()
        process.wait()
    tokens = arguments.steps * TOKENS
    rows = [
        {
            "contestant": name,
            "tokens_per_cpu_s": round(statistics.median(tokens / t["cpu_s"] for t in times), 1),
            "tokens_per_s": round(statistics.median(tokens / t["wall_s"] for t in times), 1),
            "loss": round(times[-1]["loss"], 4),
        }
        for name, times in results.items()
    ]
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
        return
    print("| contestant | tokens / CPU-s | tokens / s | last loss |")
    print("|---|---|---|---|")
    for row in rows:
        print("| {contestant} | {tokens_per_cpu_s} | {tokens_per_s} | {loss} |".format(**row))


if __name__ == "__main__":
    main()

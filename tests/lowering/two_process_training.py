"""One of two processes that train one plan together; each writes down the losses it saw.

python -m tests.lowering.two_process_training PROCESS PORT FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import optax

from shardpar.lowering.devices import use_virtual_devices
from shardpar.lowering.lower import lower
from shardpar.spec.text import plan_from_text
from tests.lowering.tiny import batches, captured

STEPS = 4


def main() -> None:
    process, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    use_virtual_devices(4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    for path in sorted(folder.glob("*.yaml")):
        plan = plan_from_text(path.read_text(), path.name)
        program = lower(captured(layers=3, width=32), plan, optax.adamw(3e-3))
        state, seen = program.init(0), []
        for batch in batches(STEPS):
            state, metrics = program.step(state, batch)
            seen.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        rows = {name: value[: plan.pipelines[0].microbatch] for name, value in batch.items()}
        evaluated = [float(x) for x in program.evaluate(state, rows)]
        out = {"seen": seen, "evaluated": evaluated}
        (folder / f"{path.stem}-{process}.json").write_text(json.dumps(out))
    print("done", flush=True)


if __name__ == "__main__":
    main()

"""Supervises a trainer that is a few lines of Python; for tests that do not train.

python -m tests.run.supervise FOLDER NODE NODES TRAINER [OPTION=VALUE ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from shardpar.errors import RunError
from shardpar.run.options import SuperviseOptions
from shardpar.run.supervisor import Job, Supervisor

QUICK = {"heartbeat_s": 0.2, "lost_after_s": 2.0, "backoff_s": 0.1, "join_s": 5.0, "start_s": 10.0}


def main() -> None:
    folder, node, nodes, trainer, *given = sys.argv[1:]
    values = {key: float(value) for key, value in (text.split("=") for text in given)}
    options: dict[str, Any] = {**QUICK, **values}
    # The stand-in trainers do not know how to wait for their turn.
    options["standby"] = "none"
    options["give_up_after"] = int(options.get("give_up_after", 5))
    command = [sys.executable, "-c", trainer, folder]
    job = Job(
        Path(folder), command, command, node, int(nodes), "localhost", SuperviseOptions(**options)
    )
    try:
        with Supervisor(job, lambda words: print(words, file=sys.stderr, flush=True)) as supervisor:
            sys.exit(supervisor.run())
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Runs a simulated federation from a config: the heavy half of `shardpar train` for them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from shardpar.cli.planning import use_devices
from shardpar.cli.signals import asked_by_signal
from shardpar.cli.stored import earlier_run, require_same
from shardpar.cli.tables import byte_text, console, print_json
from shardpar.config.model_source import build_options, find_model, load_model_source
from shardpar.config.save import to_gin, to_yaml
from shardpar.config.schema import FederatedConfig
from shardpar.errors import DataError
from shardpar.fl.algorithms.fedavg import FedAvg
from shardpar.fl.clients import ClientData
from shardpar.fl.evaluation import Evaluation, Predict
from shardpar.fl.loop import Outcome, Surroundings, spending
from shardpar.fl.loop import train as run_loop
from shardpar.fl.population import Population, population
from shardpar.fl.rounds import message_shapes
from shardpar.fl.saving import Savings
from shardpar.fl.simulated_federation import SimulatedFederation, simulated_federation
from shardpar.fl.task import Task
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.directory import RunDirectory
from shardpar.run.environment import describe_environment
from shardpar.run.metrics import MetricsLog
from shardpar.run.progress import Progress, clock_time
from shardpar.run.report import write_report

_MAY_CHANGE = (
    "data.path", "data.eval_path", "federated.chunk", "secagg.deadline_s", "privacy.ledger",
)  # fmt: skip


def train(
    config: FederatedConfig, name: str, devices: int | None, *, json: bool, dry_run: bool
) -> None:
    """`shardpar train` of a federation, all of it in this process."""
    use_devices(devices)
    started = time.monotonic()
    path = config.train.run_dir
    _require_same_run(config)
    with asked_by_signal() as signals, Progress() as progress, ExitStack() as stack:
        with progress.phase("reading the data"):
            found = population(config.data)
        with progress.phase("tracing the model"):
            task, predict = federated_task(config, found.data)
            federation = simulated_federation(
                task, found.data, config.federated, config.privacy, config.secagg
            )
        _describe(config, found, federation, progress.say)
        if dry_run:
            return
        directory = RunDirectory(Path(path)) if path else RunDirectory.fresh(name, datetime.now())
        directory.make()
        config = replace(config, train=replace(config.train, run_dir=str(directory.path)))
        checkpoints = stack.enter_context(
            Checkpoints(directory.checkpoints, config.checkpoint, notify=progress.say)
        )
        metrics = stack.enter_context(
            MetricsLog(
                directory.metrics,
                tensorboard=directory.tensorboard,
                stdout=sys.stdout if json else None,
            )
        )
        texts = {"config.yaml": to_yaml(config), "config.gin": to_gin(config)}
        progress.say(f"run directory: {directory.path}")
        outcome = run_loop(
            federation.rounds,
            config.federated.rounds,
            None if found.held is None else Evaluation(task, found.held, predict),
            config.train.eval_every,
            config.checkpoint,
            Surroundings(
                Savings(checkpoints),
                metrics,
                progress,
                texts,
                lambda: directory.write(texts),
                signals.should_stop,
                _spend(config, federation, directory, stack),
            ),
        )
    _conclude(config, name, directory, outcome, started, json=json)


def federated_task(config: FederatedConfig, data: ClientData) -> tuple[Task, Predict | None]:
    """A config's model as all parties train it, and its `predict`, if it has one.

    Raises:
      ConfigError: the model file fails.
      CaptureError: the model keeps statistics of its batches.
      DataError: the model does not take examples such as these.
    """
    module = load_model_source(find_model(config.model.source))
    options = build_options(module, config.model)
    task = Task.of(lambda rngs: module.build(options, rngs), module.loss)
    _require_fit(config, task, data)
    return task, getattr(module, "predict", None)


def _require_fit(config: FederatedConfig, task: Task, data: ClientData) -> None:
    source = config.model.source
    try:
        message_shapes(task, FedAvg(), task.init(config.federated.seed), data.fields)
    except KeyError as error:
        raise DataError(
            f"{source} asks for batch[{error}], which the examples have not: they have "
            f"{', '.join(data.fields)}; use another model, or other data"
        ) from None
    except (ValueError, TypeError) as error:
        shapes = ", ".join(f"{name} {field.shape[1:]}" for name, field in data.fields.items())
        raise DataError(
            f"{source} does not take these examples ({shapes} each): {str(error).splitlines()[0]}"
        ) from None


def _describe(
    config: FederatedConfig,
    found: Population,
    federation: SimulatedFederation,
    say: Callable[[str], None],
) -> None:
    """What will be trained, in a few lines."""
    counts, federated = found.data.counts, config.federated
    held = 0 if found.held is None else len(next(iter(found.held.values())))
    say(
        f"{found.data.clients} clients hold {int(counts.sum())} examples, {int(counts.min())} to "
        f"{int(counts.max())} each; {held} are held out"
    )
    each = getattr(federation.rounds, "client_bytes", 0)
    say(
        f"{federated.algorithm}: {federated.rounds} rounds, "
        f"{byte_text(each)} to and from a client in each"
    )
    if config.secagg.enabled and config.privacy.kind != "distributed":
        say("sums are rounded as under secure aggregation; a simulation hides nothing")
    if federation.privacy is not None:
        release, budget = federation.privacy.release, federation.privacy.budget
        say(
            f"privacy: noise multiplier {release.noise_multiplier:.4g} for epsilon "
            f"{budget.epsilon:g} at delta {budget.delta:g}, of one {budget.unit}; the noise is "
            "from the seed, so it hides nobody"
        )


def _spend(
    config: FederatedConfig,
    federation: SimulatedFederation,
    directory: RunDirectory,
    stack: ExitStack,
) -> Callable[[int], float | None] | None:
    if federation.privacy is None:
        return None
    # Privacy was put together, so the extra that ledgers need is there.
    from shardpar.fl.ledger import Ledger

    path = directory.path / config.privacy.ledger
    ledger = stack.enter_context(Ledger(path, federation.privacy.budget))
    return spending(ledger, federation.privacy.release)


def _require_same_run(config: FederatedConfig) -> None:
    """Refuses to go on with another model, other data or another algorithm than the run had.

    Raises:
      ConfigError: naming what differs.
    """
    earlier = earlier_run(config)
    if earlier is None:
        return
    directory, then = earlier
    now_, then_ = _fixed(config), _fixed(then)
    # How many rounds there are decides how much noise each of them has.
    if config.privacy.kind == "none":
        now_.pop("federated.rounds")
    require_same(directory, then_, now_)


def _fixed(config: FederatedConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"model.source": config.model.source}
    values |= {f"model.{key}": value for key, value in config.model.options}
    for section in ("data", "federated", "privacy", "secagg"):
        values |= {f"{section}.{name}": x for name, x in vars(getattr(config, section)).items()}
    for name in _MAY_CHANGE:
        values.pop(name, None)
    return values


@dataclass(frozen=True)
class _Ending:
    status: str
    words: tuple[str, ...]


def _ending(outcome: Outcome) -> _Ending:
    words = [f"round {outcome.position.round_}"]
    words += [f"loss {outcome.loss:.4f}"] if outcome.loss is not None else []
    words += [f"{key} {value:.4f}" for key, value in outcome.scores.items()]
    words += [f"epsilon {outcome.epsilon:.3f}"] if outcome.epsilon is not None else []
    status = "privacy budget spent" if outcome.budget_spent else "finished"
    return _Ending(status, tuple(words))


def _conclude(
    config: FederatedConfig,
    name: str,
    directory: RunDirectory,
    outcome: Outcome,
    started: float,
    *,
    json: bool,
) -> None:
    screen = console(stderr=True)
    round_ = outcome.position.round_
    if outcome.stopped:
        screen.print(
            f"stopped after round {round_} and saved; go on with: "
            f"shardpar train --resume {directory.path}",
            highlight=False,
        )
        return
    took = clock_time(time.monotonic() - started)
    ending = _ending(outcome)
    facts = {
        "model": config.model.source,
        "algorithm": config.federated.algorithm,
        "rounds": str(round_),
        "this session": took,
    }
    if outcome.epsilon is not None:
        facts["epsilon"] = f"{outcome.epsilon:.4g} at delta {config.privacy.delta:g}"
    write_report(
        directory,
        title=name,
        status=ending.status,
        facts=facts,
        environment=describe_environment(jax.devices()),
    )
    if outcome.budget_spent:
        screen.print(
            f"the privacy budget is spent after round {round_} of {config.federated.rounds}; the "
            "model is as it is then",
            highlight=False,
        )
    screen.print(f"done in {took}: {', '.join(ending.words)}", highlight=False)
    if json:
        last: dict[str, Any] = {"round": round_, **outcome.scores}
        print_json(last | ({"epsilon": outcome.epsilon} if outcome.epsilon is not None else {}))
    screen.print(f"report: {directory.report}", highlight=False)

"""Plans, clusters and layer graphs as YAML that people read and edit; each one round-trips."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import yaml
from msgspec import Meta

from shardpar.errors import PlanError, SpecError
from shardpar.spec.cluster import Cluster, DeviceKind, Hosts, Link, Source
from shardpar.spec.graph import LayerGraph
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import (
    TENSOR_DIMS,
    Attention,
    LayerStrategy,
    Objective,
    Pipeline,
    Plan,
    Recompute,
    Schedule,
    Stage,
    Zero,
)

PLAN_FORMAT = "shardpar-plan/1"
CLUSTER_FORMAT = "shardpar-cluster/1"
GRAPH_FORMAT = "shardpar-graph/1"

MOST_CHARACTERS = 500_000
MOST_ENTRIES = 40_000
MOST_DEPTH = 50
"""What a file may hold, aliases written out: more is a mistake, and would be read for minutes."""

_SHOWN = 700
"""Characters of a message: one that repeats a whole list says less than its two ends."""

_Axes = Annotated[list[str], Meta(max_length=64)]
_Figure = Annotated[float, Meta(ge=0, le=1e300)]

_BY_RECOMPUTE = ("saved_bytes", "whole_bytes", "scratch_bytes", "fixed_bytes")


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Strategy(_Strict):
    layers: str
    tensor: _Axes = []
    fsdp: _Axes = []
    zero1: _Axes = []
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    context: _Axes = []
    attention: Attention = "gather"


class _Stage(_Strict):
    devices: list[int]
    layers: list[_Strategy]
    mesh: Annotated[dict[str, int], Meta(max_length=64)] = {}
    peak_bytes: _Figure | None = None


class _Pipeline(_Strict):
    sequences: int
    microbatch: int
    stages: list[_Stage]
    schedule: Schedule = "1f1b"


class _Objective(_Strict):
    step_s: _Figure
    lower_bound_s: _Figure
    search_s: _Figure
    gap: float = 0.0


class _Plan(_Strict):
    format: str
    cluster: str
    global_batch: int
    pipelines: list[_Pipeline]
    objective: _Objective | None = None
    tensor_dims: tuple[str, ...] = TENSOR_DIMS
    zero: Zero = "none"


class _Kind(_Strict):
    matmul_flops: dict[str, float]
    memory_bytes: float
    memory_bandwidth: float
    efficiency: float = 0.6
    source: Source = "datasheet"
    note: str = ""
    extra_copies: float = 0.0
    overlap: float | None = None


class _Link(_Strict):
    bandwidth: float
    latency_s: float = 1e-5
    source: Source = "datasheet"
    note: str = ""


class _Hosts(_Strict):
    kind: str
    devices: int
    count: int = 1


class _Links(_Strict):
    intra_host: _Link
    inter_host: _Link


class _Speed(_Strict):
    speed: float
    devices: list[int]


class _Cluster(_Strict):
    format: str
    name: str
    kinds: dict[str, _Kind]
    hosts: list[_Hosts]
    links: _Links
    speeds: list[_Speed] = []


class _Flow(dict[str, Any]):
    """A mapping printed on one line."""


class _FlowList(list[Any]):
    """A list printed on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Flow, lambda d, v: d.represent_mapping("tag:yaml.org,2002:map", v, flow_style=True)
)
_Dumper.add_representer(
    _FlowList, lambda d, v: d.represent_sequence("tag:yaml.org,2002:seq", v, flow_style=True)
)
_Dumper.add_representer(  # PyYAML folds some line breaks away unless they stand in double quotes
    str,
    lambda d, v: d.represent_scalar(
        "tag:yaml.org,2002:str", v, style='"' if v.splitlines() not in ([], [v]) else None
    ),
)


class Loader(yaml.SafeLoader):
    """PyYAML's loader, which finds fault with what would be misread or never end.

    Reads `3e-4` as a number, which YAML 1.1 does not. Refuses a key given twice, numbers of
    more than 64 bits, and more entries than any file needs: a few lines of aliases to
    aliases can stand for more values than there is memory.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._entries = 0
        self._entries_under: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Composes a node, and counts it: an alias counts as often as all it stands for."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        before, self._depth = self._entries, self._depth + 1
        if self._depth > MOST_DEPTH:
            raise _fault(f"nested more than {MOST_DEPTH} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self._entries += 1
            self._entries_under[id(node)] = self._entries - before
        elif id(node) not in self._entries_under:
            raise _fault(f'alias "{event.anchor}" stands inside itself', event.start_mark)
        else:
            self._entries += self._entries_under[id(node)]
        if self._entries > MOST_ENTRIES:
            raise _fault(
                f"more than {MOST_ENTRIES:,} entries, aliases written out", event.start_mark
            )
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Composes a mapping whose keys are plain and different."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _fault("a key is a list or a mapping; write a name", key.start_mark)
            if key.value in seen:
                raise _fault(f'key "{key.value}" is given twice', key.start_mark)
            seen.add(key.value)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node.

        PyYAML builds tagged values (`!!int ''`) without looking whether they are what they say.
        """
        kind = node.tag.rpartition(":")[2]
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            shown = f'"{node.value}"' if isinstance(node, yaml.ScalarNode) else "this"
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise _fault(
                f"{shown} cannot be read as {kind}: {reason}; if it is text, write it in quotes",
                node.start_mark,
            ) from None
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise _fault("a whole number of more than 64 bits; write it as 1e20", node.start_mark)
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise _fault("half of a surrogate pair, which is no character", node.start_mark)
        return value


def _fault(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


for _class in (Loader, _Dumper):  # the dumper too, so that it puts the name "1e5" in quotes
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def plan_to_text(plan: Plan) -> str:
    """The plan as YAML; `plan_from_text` reads it back equal."""
    document: dict[str, Any] = {"format": PLAN_FORMAT, "cluster": plan.cluster}
    if plan.objective is not None:
        document["objective"] = _Flow(
            step_s=plan.objective.step_s,
            lower_bound_s=plan.objective.lower_bound_s,
            gap=round(plan.objective.gap, 6),
            search_s=plan.objective.search_s,
        )
    document["global_batch"] = plan.global_batch
    if plan.tensor_dims != TENSOR_DIMS:
        document["tensor_dims"] = _FlowList(plan.tensor_dims)
    if plan.zero != "none":
        document["zero"] = plan.zero
    document["pipelines"] = [
        {
            "sequences": pipeline.sequences,
            "microbatch": pipeline.microbatch,
            "schedule": pipeline.schedule,
            "stages": [_stage_document(stage) for stage in pipeline.stages],
        }
        for pipeline in plan.pipelines
    ]
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


def _stage_document(stage: Stage) -> dict[str, Any]:
    document: dict[str, Any] = {
        "devices": _FlowList(stage.devices),
        "mesh": _Flow(stage.mesh.axes),
    }
    if stage.peak_bytes is not None:
        document["peak_bytes"] = _number(stage.peak_bytes)
    layers = []
    for strategy in stage.layers:
        entry = _Flow(layers=strategy.layers)
        for key in ("tensor", "fsdp", "zero1", "context"):
            if getattr(strategy, key):
                entry[key] = _FlowList(getattr(strategy, key))
        if strategy.sequence_parallel:
            entry["sequence_parallel"] = True
        if strategy.attention != "gather":
            entry["attention"] = strategy.attention
        if strategy.recompute != "none":
            entry["recompute"] = strategy.recompute
        layers.append(entry)
    document["layers"] = layers
    return document


def plan_from_text(text: str, where: str = "plan") -> Plan:
    """Reads a plan.

    Args:
      text: YAML, as `plan_to_text` writes or a person does.
      where: what to call the text in errors, usually its file.

    Raises:
      PlanError: with the line, the key, what was got and what to write instead.
    """
    document, file = _read(text, _Plan, PLAN_FORMAT, where, PlanError)
    pipelines = []
    for p, pipeline in enumerate(document.pipelines):
        stages = tuple(
            _stage(stage, file, ("pipelines", p, "stages", s))
            for s, stage in enumerate(pipeline.stages)
        )
        with file.at("pipelines", p):
            pipelines.append(
                Pipeline(pipeline.sequences, pipeline.microbatch, stages, pipeline.schedule)
            )
    _require_apart(document, file)
    objective = document.objective
    with file.at():
        plan = Plan(
            cluster=document.cluster,
            global_batch=document.global_batch,
            tensor_dims=tuple(document.tensor_dims),
            zero=document.zero,
            objective=None
            if objective is None
            else Objective(objective.step_s, objective.lower_bound_s, objective.search_s),
            pipelines=tuple(pipelines),
        )
    return plan


def _stage(stage: _Stage, file: File, at: Steps) -> Stage:
    layers = []
    for i, entry in enumerate(stage.layers):
        with file.at(*at, "layers", i):
            layers.append(
                LayerStrategy(
                    entry.layers,
                    tuple(entry.tensor),
                    tuple(entry.fsdp),
                    tuple(entry.zero1),
                    entry.sequence_parallel,
                    entry.recompute,
                    tuple(entry.context),
                    entry.attention,
                )
            )
    with file.at(*at, "mesh", instead_of="mesh"):
        mesh = Mesh(tuple(stage.mesh.items()))
    with file.at(*at):
        made = Stage(tuple(stage.devices), mesh, tuple(layers), stage.peak_bytes)
    return made


def _require_apart(document: _Plan, file: File) -> None:
    """That no device is in two stages: `Plan` says so too, but not where."""
    owners: dict[int, Steps] = {}
    for p, pipeline in enumerate(document.pipelines):
        for s, stage in enumerate(pipeline.stages):
            at = ("pipelines", p, "stages", s)
            for i, device in enumerate(stage.devices):
                mine = owners.get(device, at)[:2] == at[:2]
                if pipeline.schedule == "interleaved" and mine:
                    owners.setdefault(device, at)
                    continue
                if device in owners:
                    raise file.error(
                        f"device {device} belongs to {_path(owners[device])} too; each device "
                        "has one stage",
                        (*at, "devices", i),
                    )
                owners[device] = at


def cluster_to_text(cluster: Cluster) -> str:
    """The cluster as YAML; `cluster_from_text` reads it back equal."""

    def link(value: Link) -> dict[str, Any]:
        return msgspec.to_builtins(value)  # type: ignore[no-any-return]

    kinds = {}
    for kind in cluster.kinds:
        fields = msgspec.to_builtins(kind)
        fields["matmul_flops"] = _Flow(kind.matmul_flops)
        del fields["name"]
        if not kind.extra_copies:
            del fields["extra_copies"]
        if kind.overlap is None:
            del fields["overlap"]
        kinds[kind.name] = fields
    document: dict[str, Any] = {
        "format": CLUSTER_FORMAT,
        "name": cluster.name,
        "kinds": kinds,
        "hosts": [_Flow(msgspec.to_builtins(hosts)) for hosts in cluster.hosts],
        "links": {"intra_host": link(cluster.intra_host), "inter_host": link(cluster.inter_host)},
    }
    if cluster.speeds:
        by_speed: dict[float, list[int]] = {}
        for device, speed in cluster.speeds:
            by_speed.setdefault(speed, []).append(device)
        document["speeds"] = [
            _Flow(speed=speed, devices=_FlowList(devices)) for speed, devices in by_speed.items()
        ]
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


def cluster_from_text(text: str, where: str = "cluster") -> Cluster:
    """Reads a cluster.

    Raises:
      SpecError: with the line, the key, what was got and what to write instead.
    """
    document, file = _read(text, _Cluster, CLUSTER_FORMAT, where, SpecError)
    kinds, hosts, links = [], [], []
    for name, kind in document.kinds.items():
        with file.at("kinds", name, instead_of=f'device kind "{name}"'):
            kinds.append(
                DeviceKind(
                    name,
                    tuple(kind.matmul_flops.items()),
                    kind.memory_bytes,
                    kind.memory_bandwidth,
                    kind.efficiency,
                    kind.source,
                    kind.note,
                    kind.extra_copies,
                    kind.overlap,
                )
            )
    for i, some in enumerate(document.hosts):
        with file.at("hosts", i, instead_of=f'hosts of kind "{some.kind}"'):
            hosts.append(Hosts(some.kind, some.devices, some.count))
    for key in ("intra_host", "inter_host"):
        link = getattr(document.links, key)
        with file.at("links", key, instead_of="link"):
            links.append(Link(link.bandwidth, link.latency_s, link.source, link.note))
    speeds = sorted((d, entry.speed) for entry in document.speeds for d in entry.devices)
    with file.at(instead_of=f'cluster "{document.name}"'):
        cluster = Cluster(
            document.name, tuple(kinds), tuple(hosts), links[0], links[1], tuple(speeds)
        )
    return cluster


def graph_to_text(graph: LayerGraph) -> str:
    """The layer graph as YAML; `graph_from_text` reads it back equal."""
    document = {"format": GRAPH_FORMAT, **msgspec.to_builtins(graph)}
    for cls in document["classes"]:
        for key in _BY_RECOMPUTE:
            if cls.get(key):
                cls[key] = _Flow(cls[key])
            else:
                cls.pop(key, None)
        if cls.get("products") is None:
            cls.pop("products", None)
        if not cls.get("views_bytes"):
            cls.pop("views_bytes", None)
        for key in ("parameters", "tied", "inputs", "outputs", "products"):
            if key in cls:
                cls[key] = [_Flow(entry) for entry in cls[key]]
    document["layers"] = [
        _Flow({**entry, "tied": _Flow(entry["tied"])} if entry.get("tied") else
              {k: v for k, v in entry.items() if k != "tied"})
        for entry in document["layers"]
    ]  # fmt: skip
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)


def graph_from_text(text: str, where: str = "graph") -> LayerGraph:
    """Reads a layer graph.

    Raises:
      SpecError: with what is wrong and where.
    """
    file = _parse(text, where, SpecError)
    file.require_format(GRAPH_FORMAT)
    data = {k: v for k, v in file.data.items() if k != "format"}
    for entries, key in (*(("classes", key) for key in _BY_RECOMPUTE), ("layers", "tied")):
        listed = data.get(entries)
        for entry in listed if isinstance(listed, list) else ():
            if isinstance(entry, dict) and isinstance(entry.get(key), dict):
                entry[key] = list(entry[key].items())
    try:
        return msgspec.convert(data, LayerGraph)
    except (msgspec.ValidationError, SpecError, TypeError) as error:
        raise SpecError(_brief(f"{where}: {error}")) from None


def _number(value: float) -> float | int:
    return int(value) if abs(value) < 2**53 and value == int(value) else value


Document = TypeVar("Document")
Steps = tuple[str | int, ...]


@dataclass(frozen=True)
class File:
    """A text that was parsed: its values, and for errors where each of them stands.

    Attributes:
      where: what to call it, usually its path.
      error_type: what to raise.
      root: the YAML node of it all.
      data: its values.
    """

    where: str
    error_type: type[SpecError]
    root: yaml.Node
    data: dict[Any, Any]

    @contextmanager
    def at(self, *steps: str | int, instead_of: str = "") -> Iterator[None]:
        """Tells a broken rule of what is built inside with its line and path.

        Args:
          steps: keys and indices from the top to what the value is built of.
          instead_of: what the value calls itself at the start of a message, where the
            path says the same.
        """
        try:
            yield
        except SpecError as error:
            message = str(error)
            if instead_of:
                message = message.removeprefix(f"{instead_of}: ")
            raise self.error(message, steps) from None

    def error(self, message: str, steps: Steps) -> SpecError:
        """The error of a fault at a path; a message that goes on the path is joined to it."""
        node = _node_at(self.root, steps)
        keys = {key.value: value for key, value in _pairs(node)}
        goes_on = re.match(r"(\w+)[\w.\[\]]* (is|has) ", message)
        # The line is that of the first key the message speaks of, if it names one.
        spoken = [word for word in re.findall(r"\w+", message[:_SHOWN]) if word in keys]
        if spoken:
            node = keys[spoken[0]]
        glue = "" if not steps else "." if goes_on and goes_on[1] in keys else ": "
        line = node.start_mark.line + 1
        return self.error_type(_brief(f"{self.where} line {line}: {_path(steps)}{glue}{message}"))

    def require_format(self, form: str) -> None:
        """That the file is of this format and version."""
        got = self.data.get("format")
        if got != form:
            raise self.error_type(
                _brief(f'{self.where}: format is {got!r}; this version reads "{form}"')
            )


def _parse(text: str, where: str, error_type: type[SpecError]) -> File:
    if len(text) > MOST_CHARACTERS:
        raise error_type(
            f"{where}: {len(text):,} characters; a file may have {MOST_CHARACTERS:,}: is it the "
            "right one?"
        )
    loader, root = None, None
    try:
        loader = Loader(text)
        root = loader.get_single_node()
        data = None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _not_yaml(where, mark, error.problem or error.context, error_type) from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # Escapes of no character ("\\UFFFFFFFF") come as what `chr` raises.
        mark = loader.get_mark() if loader and root is None else None
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise _not_yaml(where, mark, reason, error_type) from None
    if root is None or not isinstance(data, dict):
        raise error_type(f"{where}: expected keys and values at the top, got {type(data).__name__}")
    return File(where, error_type, root, data)


def _not_yaml(where: str, mark: Any, reason: Any, error_type: type[SpecError]) -> SpecError:
    line = f" line {mark.line + 1}" if mark else ""
    return error_type(_brief(f"{where}{line}: not YAML: {reason}"))


def _read(
    text: str, document: type[Document], form: str, where: str, error_type: type[SpecError]
) -> tuple[Document, File]:
    file = _parse(text, where, error_type)
    file.require_format(form)
    try:
        return msgspec.convert(file.data, document), file
    except msgspec.ValidationError as error:
        raise error_type(_brief(_explain(str(error), document, file))) from None


def _brief(message: str) -> str:
    """A message as one paragraph: what does not print is escaped, what is too long is cut."""
    if len(message) > 2 * _SHOWN:  # escaping all of a long one would take its time
        message = message[:_SHOWN] + message[-_SHOWN:]
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 200]} … {shown[-200:]}"


def _explain(message: str, document: Any, file: File) -> str:
    """msgspec's message with the line in the file, and the nearest key or the values allowed."""
    reason, _, path = message.partition(" - at `")
    steps, expected = _walk(path, file.data, document)
    node = _node_at(file.root, steps)
    unknown = re.search(r"unknown field `(.*)`", reason, re.DOTALL)
    if unknown:
        known = list(getattr(expected, "__struct_fields__", ()))
        near = difflib.get_close_matches(unknown[1], known, 1)
        hint = f'did you mean "{near[0]}"?' if near else f"known keys are {', '.join(known)}"
        reason = f'unknown key "{unknown[1]}"; {hint}'
        node = next((key for key, _ in _pairs(node) if key.value == unknown[1]), node)
    elif path.startswith("key"):
        node = next((key for key, _ in _pairs(node) if not key.tag.endswith(":str")), node)
        reason = f'a key is not text; write "{node.value}" in quotes'
    else:
        reason = reason[0].lower() + reason[1:]
        if get_origin(expected) is Literal:
            *first, last = get_args(expected)
            reason += f"; write {', '.join(first)} or {last}"
    place = _path(steps)
    return f"{file.where} line {node.start_mark.line + 1}: " + (
        f"{place}: {reason}" if place else reason
    )


def _path(steps: Steps) -> str:
    """Keys and indices as text: "pipelines[0].stages[1]"."""
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return place.removeprefix(".")


def _walk(path: str, data: Any, document: Any) -> tuple[Steps, Any]:
    """msgspec's path as keys and indices, and the type that the schema wants there.

    `[...]` is a key that it does not tell: it is the first whose value is not of its type.
    """
    steps: list[str | int] = []
    for key, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", path.partition("$")[2]):
        inner = _type_inside(document, key or index)
        step: Any = key or (int(index) if index != "..." else _culprit(data, inner))
        if not isinstance(data, list if isinstance(step, int) else dict) or step is None:
            break
        steps.append(step)
        data, document = data[step], inner
    return tuple(steps), _bare(document)


def _culprit(mapping: Any, expected: Any) -> Any:
    for key, value in mapping.items():
        try:
            msgspec.convert(value, expected)
        except msgspec.ValidationError:
            return key
    return None


def _type_inside(document: Any, step: str) -> Any:
    """The type that a type gives to what stands at a key or index, its bounds included."""
    document = _bare(document)
    if hasattr(document, "__struct_fields__"):
        return get_type_hints(document, include_extras=True)[step]
    return get_args(document)[-1 if get_origin(document) is dict else 0]


def _bare(document: Any) -> Any:
    """A type without its bounds, and without None where that may stand in its place."""
    if get_origin(document) is Annotated:
        return _bare(get_args(document)[0])
    if type(None) in get_args(document):
        return _bare(next(arg for arg in get_args(document) if arg is not type(None)))
    return document


def _pairs(node: Any) -> list[tuple[Any, Any]]:
    return node.value if isinstance(node, yaml.MappingNode) else []


def _node_at(node: Any, steps: Steps) -> Any:
    """The YAML node at a path, or the last one on the way, where a tag hides the rest."""
    for step in steps:
        if isinstance(step, int):
            inner = node.value[step] if isinstance(node, yaml.SequenceNode) else None
        else:
            # Merged keys come first, and those of the mapping itself hold against them.
            inner = next((v for k, v in reversed(_pairs(node)) if k.value == step), None)
        if inner is None:
            break
        node = inner
    return node

"""Plans, clusters and layer graphs as YAML that people read and edit; each one round-trips."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import yaml

from shardpar.errors import PlanError, SpecError
from shardpar.spec.cluster import Cluster, DeviceKind, Hosts, Link
from shardpar.spec.graph import LayerGraph
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import (
    TENSOR_DIMS,
    LayerStrategy,
    Objective,
    Pipeline,
    Plan,
    Recompute,
    Schedule,
    Stage,
)

PLAN_FORMAT = "shardpar-plan/1"
CLUSTER_FORMAT = "shardpar-cluster/1"
GRAPH_FORMAT = "shardpar-graph/1"


_BY_RECOMPUTE = ("saved_bytes", "whole_bytes", "scratch_bytes")


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Strategy(_Strict):
    layers: str
    tensor: list[str] = []
    fsdp: list[str] = []
    zero1: list[str] = []
    sequence_parallel: bool = False
    recompute: Recompute = "none"


class _Stage(_Strict):
    devices: list[int]
    layers: list[_Strategy]
    mesh: dict[str, int] = {}
    peak_bytes: float | None = None


class _Pipeline(_Strict):
    sequences: int
    microbatch: int
    stages: list[_Stage]
    schedule: Schedule = "1f1b"


class _Objective(_Strict):
    step_s: float
    lower_bound_s: float
    search_s: float
    gap: float = 0.0


class _Plan(_Strict):
    format: str
    cluster: str
    global_batch: int
    pipelines: list[_Pipeline]
    objective: _Objective | None = None
    tensor_dims: tuple[str, ...] = TENSOR_DIMS


class _Kind(_Strict):
    matmul_flops: dict[str, float]
    memory_bytes: float
    memory_bandwidth: float
    efficiency: float = 0.6
    source: str = "datasheet"
    note: str = ""
    extra_copies: float = 0.0


class _Link(_Strict):
    bandwidth: float
    latency_s: float = 1e-5
    source: str = "datasheet"
    note: str = ""


class _Hosts(_Strict):
    kind: str
    devices: int
    count: int = 1


class _Links(_Strict):
    intra_host: _Link
    inter_host: _Link


class _Cluster(_Strict):
    format: str
    name: str
    kinds: dict[str, _Kind]
    hosts: list[_Hosts]
    links: _Links


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
    """Reads `3e-4` as a number, which YAML 1.1 does not, and refuses a key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Builds a mapping after checking that no key is given twice."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'key "{key.value}" is given twice', key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


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
        for key in ("tensor", "fsdp", "zero1"):
            if getattr(strategy, key):
                entry[key] = _FlowList(getattr(strategy, key))
        if strategy.sequence_parallel:
            entry["sequence_parallel"] = True
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
    document = _read(text, _Plan, PLAN_FORMAT, where, PlanError)
    try:
        return Plan(
            cluster=document.cluster,
            global_batch=document.global_batch,
            tensor_dims=tuple(document.tensor_dims),
            objective=None
            if document.objective is None
            else Objective(
                document.objective.step_s,
                document.objective.lower_bound_s,
                document.objective.search_s,
            ),
            pipelines=tuple(
                Pipeline(
                    pipeline.sequences,
                    pipeline.microbatch,
                    tuple(_stage(stage) for stage in pipeline.stages),
                    pipeline.schedule,
                )
                for pipeline in document.pipelines
            ),
        )
    except SpecError as error:
        raise PlanError(f"{where}: {error}") from None


def _stage(stage: _Stage) -> Stage:
    return Stage(
        tuple(stage.devices),
        Mesh(tuple(stage.mesh.items())),
        tuple(
            LayerStrategy(
                entry.layers,
                tuple(entry.tensor),
                tuple(entry.fsdp),
                tuple(entry.zero1),
                entry.sequence_parallel,
                entry.recompute,
            )
            for entry in stage.layers
        ),
        stage.peak_bytes,
    )


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
        kinds[kind.name] = fields
    document = {
        "format": CLUSTER_FORMAT,
        "name": cluster.name,
        "kinds": kinds,
        "hosts": [_Flow(msgspec.to_builtins(hosts)) for hosts in cluster.hosts],
        "links": {"intra_host": link(cluster.intra_host), "inter_host": link(cluster.inter_host)},
    }
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


def cluster_from_text(text: str, where: str = "cluster") -> Cluster:
    """Reads a cluster.

    Raises:
      SpecError: with the line, the key, what was got and what to write instead.
    """
    document = _read(text, _Cluster, CLUSTER_FORMAT, where, SpecError)
    try:
        return Cluster(
            document.name,
            tuple(
                DeviceKind(
                    name,
                    tuple(kind.matmul_flops.items()),
                    kind.memory_bytes,
                    kind.memory_bandwidth,
                    kind.efficiency,
                    _source(kind.source, f"kinds.{name}"),
                    kind.note,
                    kind.extra_copies,
                )
                for name, kind in document.kinds.items()
            ),
            tuple(Hosts(h.kind, h.devices, h.count) for h in document.hosts),
            *(
                Link(
                    link.bandwidth, link.latency_s, _source(link.source, f"links.{key}"), link.note
                )
                for key, link in (
                    ("intra_host", document.links.intra_host),
                    ("inter_host", document.links.inter_host),
                )
            ),
        )
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _source(text: str, where: str) -> Any:
    if text not in ("measured", "datasheet", "assumed"):
        raise SpecError(f'{where}.source is "{text}"; write measured, datasheet or assumed')
    return text


def graph_to_text(graph: LayerGraph) -> str:
    """The layer graph as YAML; `graph_from_text` reads it back equal."""
    document = {"format": GRAPH_FORMAT, **msgspec.to_builtins(graph)}
    for cls in document["classes"]:
        for key in _BY_RECOMPUTE:
            if cls.get(key):
                cls[key] = _Flow(cls[key])
            else:
                cls.pop(key, None)
        for key in ("parameters", "tied", "inputs", "outputs"):
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
    data = _parse(text, where, SpecError)
    _require_format(data, GRAPH_FORMAT, where, SpecError)
    data = {k: v for k, v in data.items() if k != "format"}
    for entries, key in (*(("classes", key) for key in _BY_RECOMPUTE), ("layers", "tied")):
        listed = data.get(entries)
        for entry in listed if isinstance(listed, list) else ():
            if isinstance(entry, dict) and isinstance(entry.get(key), dict):
                entry[key] = list(entry[key].items())
    try:
        return msgspec.convert(data, LayerGraph)
    except (msgspec.ValidationError, SpecError, TypeError) as error:
        raise SpecError(f"{where}: {error}") from None


def _number(value: float) -> float | int:
    return int(value) if math.isfinite(value) and value == int(value) else value


Document = TypeVar("Document")


def _parse(text: str, where: str, error_type: type[SpecError]) -> Any:
    try:
        data = yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise error_type(f"{where}{line}: not YAML: {error.problem or error.context}") from None
    except (
        yaml.YAMLError, ValueError, RecursionError, TypeError, LookupError, AttributeError
    ) as error:  # fmt: skip
        # PyYAML builds tagged values (`!!int ''`) without looking whether they are what they say.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise error_type(f"{where}: not YAML: {reason}") from None
    if not isinstance(data, Mapping):
        raise error_type(f"{where}: expected keys and values at the top, got {type(data).__name__}")
    return data


def _require_format(data: Any, form: str, where: str, error_type: type[SpecError]) -> None:
    got = data.get("format")
    if got != form:
        raise error_type(f'{where}: format is {got!r}; this version reads "{form}"')


def _read(
    text: str, document: type[Document], form: str, where: str, error_type: type[SpecError]
) -> Document:
    data = _parse(text, where, error_type)
    _require_format(data, form, where, error_type)
    try:
        return msgspec.convert(data, document)
    except msgspec.ValidationError as error:
        raise error_type(_explain(str(error), data, text, document, where)) from None


Steps = list[str | int]


def _explain(message: str, data: Any, text: str, document: Any, where: str) -> str:
    """msgspec's message with the line in the file, and the nearest key or the values allowed."""
    reason, _, path = message.partition(" - at `")
    steps = _steps(path, message, data, document)
    node, expected = _node_at(text, steps), _type_at(document, steps)
    unknown = re.search(r"unknown field `(.*)`", reason)
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
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return f"{where} line {node.start_mark.line + 1}: " + (
        f"{place.lstrip('.')}: {reason}" if place else reason
    )


def _steps(path: str, message: str, data: Any, document: Any) -> Steps:
    """msgspec's path as keys and indices; `[...]`, a key it does not tell, is looked for."""
    steps: Steps = []
    at = data
    for key, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", path.partition("$")[2]):
        step: Any = key or (int(index) if index != "..." else _culprit(at, message, data, document))
        if not isinstance(at, list if isinstance(step, int) else dict) or step is None:
            break
        steps.append(step)
        at = at[step]
    return steps


def _culprit(mapping: dict[Any, Any], message: str, data: Any, document: Any) -> Any:
    """The first key of a mapping inside `data` that alone gives the same error."""
    everything = dict(mapping)
    for key, value in everything.items():
        mapping.clear()
        mapping[key] = value
        try:
            msgspec.convert(data, document)
        except msgspec.ValidationError as error:
            if str(error) == message:
                return key
    return None


def _pairs(node: Any) -> list[tuple[Any, Any]]:
    return node.value if isinstance(node, yaml.MappingNode) else []


def _node_at(text: str, steps: Steps) -> Any:
    """The YAML node at a path, or the last one on the way, where an alias or merge hides it."""
    node: Any = yaml.compose(text, Loader=Loader)
    for step in steps:
        if isinstance(step, int):
            node = node.value[step]
        else:
            node = next((value for key, value in _pairs(node) if key.value == step), node)
    return node


def _type_at(document: Any, steps: Steps) -> Any:
    """The type the schema `document` gives to what stands at a path."""
    for step in steps:
        if isinstance(step, str) and hasattr(document, "__struct_fields__"):
            document = get_type_hints(document)[step]
        else:
            document = get_args(document)[-1 if isinstance(step, str) else 0]
        if type(None) in get_args(document):
            document = next(arg for arg in get_args(document) if arg is not type(None))
    return document

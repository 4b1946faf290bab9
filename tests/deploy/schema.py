"""Holds a document to the few words of JSON Schema that `kubernetes.schema.yaml` uses.

Kubernetes itself drops or refuses fields it does not know; here they are always an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "integer": int, "boolean": bool,
}  # fmt: skip
_WORDS = {
    "$ref", "type", "required", "properties", "additionalProperties", "items", "enum", "pattern",
    "minimum",
}  # fmt: skip


def read_schema() -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent / "kubernetes.schema.yaml").read_text())


def problems(document: Any, schema: dict[str, Any]) -> list[str]:
    """What is wrong with a document, each with its place; none if it is right."""
    kinds = schema["oneOf"]["kind"]
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind not in kinds:
        return [f"kind is {kind!r}, not one of {', '.join(kinds)}"]
    return list(_check(document, kinds[kind], schema["$defs"], kind))


def _check(value: Any, rule: dict[str, Any], named: dict[str, Any], at: str) -> Iterator[str]:
    assert set(rule) <= _WORDS, f"{at}: the schema says {set(rule) - _WORDS}, which nothing checks"
    if "$ref" in rule:
        yield from _check(value, named[rule["$ref"]], named, at)
        return
    wanted = rule.get("type")
    if wanted is not None and (
        not isinstance(value, _TYPES[wanted]) or (wanted == "integer" and isinstance(value, bool))
    ):
        yield f"{at}: {value!r} is no {wanted}"
        return
    if "enum" in rule and value not in rule["enum"]:
        yield f"{at}: {value!r} is not one of {rule['enum']}"
    if "pattern" in rule and re.fullmatch(rule["pattern"], str(value)) is None:
        yield f"{at}: {value!r} is not like {rule['pattern']}"
    if "minimum" in rule and value < rule["minimum"]:
        yield f"{at}: {value!r} is less than {rule['minimum']}"
    if wanted == "array":
        for n, item in enumerate(value):
            yield from _check(item, rule["items"], named, f"{at}[{n}]")
    if wanted == "object":
        known, others = rule.get("properties", {}), rule.get("additionalProperties")
        for key in rule.get("required", ()):
            if key not in value:
                yield f"{at}: there is no {key}"
        for key, inner in value.items():
            if key in known:
                yield from _check(inner, known[key], named, f"{at}.{key}")
            elif others is not None:
                yield from _check(inner, others, named, f"{at}.{key}")
            else:
                yield f"{at}: there is no field {key}"

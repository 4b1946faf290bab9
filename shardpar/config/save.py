"""Writes a resolved config as a file that trains the same run again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import yaml

from shardpar.config.schema import AnyConfig
from shardpar.config.yaml_file import Dumper

_HEADER = """\
# A resolved shardpar config: every key with the value of the run, defaults included.
# Train from it again:  shardpar train {name} [section.key=value ...]
"""


def to_yaml(config: AnyConfig) -> str:
    """The whole config as YAML.

    Args:
      config: from `load`.

    Returns:
      Text of a .yaml file that `load` reads back to an equal config.

    >>> from shardpar.config.schema import RunConfig
    >>> to_yaml(RunConfig()).splitlines()[3:5]
    ['model:', '  source: gpt']
    """
    parts = [_HEADER.format(name="FILE.yaml")]
    for name, values in _sections(config):
        section = {name: {key: _as_list(value) for key, value in values.items()}}
        parts.append(
            yaml.dump(section, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000)
        )
    return "\n".join(parts)


def to_gin(config: AnyConfig) -> str:
    """The whole config as gin.

    Args:
      config: from `load`.

    Returns:
      Text of a .gin file that `load` reads back to an equal config.

    >>> from shardpar.config.schema import RunConfig
    >>> to_gin(RunConfig()).splitlines()[3:4]
    ["model.source = 'gpt'"]
    """
    parts = [_HEADER.format(name="FILE.gin")]
    for name, values in _sections(config):
        parts.append("".join(f"{name}.{key} = {value!r}\n" for key, value in values.items()))
    return "\n".join(parts)


def _sections(config: AnyConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    for field in fields(config):
        section = getattr(config, field.name)
        if field.name == "model":
            yield "model", {"source": section.source, **dict(section.options)}
        else:
            yield field.name, {f.name: getattr(section, f.name) for f in fields(section)}


def _as_list(value: Any) -> Any:
    return [_as_list(item) for item in value] if isinstance(value, tuple) else value

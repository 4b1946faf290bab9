"""Reads a config file with everything it includes, and decides which binding wins.

A file's own bindings and macros win over those of the files it includes, and a later include
wins over an earlier one. gin and YAML files may include each other.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from shardpar.config.bindings import (
    Document,
    MacroUse,
    config_error,
    leaves,
    resolve_macros,
)
from shardpar.config.bundled import bundled_configs, find_file
from shardpar.config.gin_file import parse_gin
from shardpar.config.yaml_file import parse_yaml

_PARSERS: dict[str, Callable[[str, str], Document]] = {
    ".gin": parse_gin,
    ".yaml": parse_yaml,
    ".yml": parse_yaml,
}

# Far above any config and far below what makes reading one slow: a data file that was named
# by mistake is refused before it is read.
_MAX_BYTES = 1 << 20


def read_config_file(path: str) -> Document:
    """Reads a config file and its includes.

    Args:
      path: a .gin, .yaml or .yml file, or the name of a bundled one, such as configs/gpt.gin.

    Returns:
      One document without includes and macros, whose bindings have plain values. A macro that
      nothing uses is kept as a binding outside every section: most often it is a key whose
      section was forgotten.

    Raises:
      ConfigError: a file cannot be found, read or parsed, or holds nothing.
    """
    found = find_file(path, None)
    if found is None:
        raise config_error([f"{path}: {_why_missing(path)}"])
    documents = list(_documents(found, ()))
    macros = {macro.name: macro for document in documents for macro in document.macros}
    written = [b for document in documents for b in (*document.bindings, *document.macros)]
    used = {leaf.name for b in written for leaf in leaves(b.value) if isinstance(leaf, MacroUse)}
    winners = {b.name: b for document in documents for b in document.bindings}
    bindings, problems = resolve_macros(winners.values(), macros)
    unused, more_problems = resolve_macros(
        (macro for name, macro in macros.items() if name not in used), macros
    )
    return Document(
        bindings=(*bindings, *unused),
        problems=(*(p for d in documents for p in d.problems), *problems, *more_problems),
    )


def _documents(path: str, trail: tuple[str, ...]) -> Iterator[Document]:
    """The document of a file after those of its includes, so that the last word wins."""
    document = _PARSERS[_suffix(path)](_text(path), path)
    if not any((document.bindings, document.includes, document.macros, document.problems)):
        raise config_error(
            [
                f"{path}: holds no settings; write one, such as {_example(path)}, or name no "
                "config to run the demo"
            ]
        )
    trail = (*trail, os.path.realpath(path))
    for include in document.includes:
        found = find_file(include.path, os.path.dirname(path))
        if found is None:
            folder = os.path.dirname(os.path.abspath(path))
            raise config_error(
                [f"{include.place}: include {include.path!r}: there is no such file in {folder}"]
            )
        if os.path.realpath(found) in trail:
            raise config_error(
                [
                    f"{include.place}: include {include.path!r}: the files include each other in a "
                    "circle; delete one of the includes"
                ]
            )
        yield from _documents(os.path.normpath(found), trail)
    yield document


def _suffix(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        configs = [n for n in sorted(os.listdir(path)) if os.path.splitext(n)[1] in _PARSERS]
        hint = f", such as {os.path.join(path, configs[0])}" if configs else ""
        raise config_error([f"{path}: is a folder; name a config file{hint}"])
    if suffix not in _PARSERS:
        raise config_error(
            [f"{path}: a config ends in {', '.join(_PARSERS)}, not in {suffix!r}; rename the file"]
        )
    return suffix


def _text(path: str) -> str:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise config_error([f"{path}: is not a regular file"])
        if status.st_size > _MAX_BYTES:
            raise config_error(
                [f"{path}: has {status.st_size} bytes, a config at most {_MAX_BYTES}; is it data?"]
            )
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise config_error([f"{path}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise config_error(
            [
                f"{path}: is not a text file: byte {error.object[error.start]:#04x} at position "
                f"{error.start} is not UTF-8"
            ]
        ) from None


def _example(path: str) -> str:
    return "train.steps = 100" if path.endswith(".gin") else "train: {steps: 100}"


def _why_missing(path: str) -> str:
    bundled = bundled_configs()
    stems = {os.path.splitext(os.path.basename(name))[0]: name for name in reversed(bundled)}
    near = difflib.get_close_matches(path, bundled, n=1) or [
        stems[stem]
        for stem in difflib.get_close_matches(
            os.path.splitext(os.path.basename(path))[0], stems, n=1
        )
    ]
    if "=" in path:
        hint = "; to override a setting, name the config first and the override after it"
    elif near:
        hint = f"; did you mean {near[0]}?"
    else:
        hint = ""
    return f"there is no such config file{hint} (bundled are {', '.join(bundled)})"

"""Decides what a run is: defaults, then the config file, then the overrides, all checked.

Every problem of a config is found in one go and told in one `ConfigError`, a line each.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardpar.config.bindings import COMMAND_LINE, Binding, Place, config_error
from shardpar.config.bundled import bundled_models, demo_config, find_data, find_folder
from shardpar.config.files import read_config_file
from shardpar.config.keys import nearest
from shardpar.config.model_source import ModelOptions, find_model, read_model_options
from shardpar.config.rules import check
from shardpar.config.schema import (
    FEDERATED,
    AnyConfig,
    FederatedConfig,
    ModelConfig,
    RunConfig,
    config_class,
    field_hints,
    section_classes,
)
from shardpar.config.values import Plain, convert, show, takes_bare_text
from shardpar.config.yaml_file import parse_value
from shardpar.errors import ConfigError

_NAME = re.compile(r"(?P<section>[^\W\d]\w*)\.(?P<key>[^\W\d]\w*)")
_PATHS = (
    "data.path", "data.eval_path", "plan.file", "plan.cluster", "train.plan_schedule",
    "buckets.plans",
)  # fmt: skip
_PATTERNS = ("data.path", "data.eval_path")

Hints = Mapping[str, Mapping[str, Any]]


@dataclass
class _Findings:
    """What came of the bindings so far.

    Attributes:
      values: that fit, by section and key.
      places: of every binding, by full name.
      bad: full names of keys whose values are unusable.
      problems: one line each.
    """

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def reject(self, name: str, place: Place | str, text: str) -> None:
        self.bad.add(name)
        self.problems.append(f"{place}: {text}")


def load(
    path: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    find_files: bool = True,
) -> RunConfig:
    """Reads the config of a model that is planned, and checks it, without importing jax or flax.

    Args:
      path: a .gin, .yaml or .yml file, or the name of a bundled one; None is the demo.
      overrides: `section.key=value` each, value a YAML scalar or list. They win over the file,
        and a later one over an earlier one. Text needs no quotes.
      find_files: whether the files that it names must be there; without, their paths stay as
        they are written.

    Returns:
      The resolved config. Paths that were found are absolute: they are looked for beside the
      file that names them, then in the current folder.

    Raises:
      ConfigError: anything is wrong with the file, the overrides, or a file that they name.

    >>> config = load("configs/gpt.gin", ["train.steps=50", "model.layers=6"])
    >>> config.train.steps, config.model.get("layers"), config.plan.file
    (50, 6, None)
    """
    config = load_any(path, overrides, find_files=find_files)
    if isinstance(config, FederatedConfig):
        raise ConfigError(
            f"{path or 'the config'} is of a federation, which has no plan; `shardpar train` takes "
            "it, this does not"
        )
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"{path or 'the config'}: model.source={config.model.source} trains tables and has no "
            "plan; `shardpar train` takes it, this does not"
        )
    return config


def load_any(
    path: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    find_files: bool = True,
) -> AnyConfig:
    """As `load`, whatever the model is trained by.

    Which sections there are is said by the model's file; for one that is planned, a key
    `federated.*` makes the run one of a federation.

    >>> load_any("configs/fm.gin", ["table.learning_rate=0.1"]).table.learning_rate
    0.1
    >>> load_any("configs/fedavg.gin", ["federated.rounds=3"]).federated.rounds
    3
    """
    file = str(demo_config()) if path is None else os.fspath(path)
    document = read_config_file(file)
    findings = _Findings(problems=list(document.problems))
    raw = list(_split(overrides, findings))
    source, options = _model(file, [*document.bindings, *raw], findings)
    bound = {binding.section for binding in (*document.bindings, *raw)}
    kind = config_class(options.trains if options else "plan", bound)
    sections = section_classes(kind)
    hints: dict[str, Mapping[str, Any]] = {
        "model": {"source": str, **(options.hints if options else {})},
        **{name: field_hints(cls) for name, cls in sections.items()},
    }
    bindings = {b.name: b for b in (*document.bindings, *_parse(raw, hints, findings))}
    _judge(bindings.values(), hints, options is not None, findings)
    if find_files:
        _find_files(findings, folders=kind is FederatedConfig)
    config = kind(
        model=ModelConfig(source, _model_values(file, options, findings) if options else ()),
        **{name: cls(**findings.values.get(name, {})) for name, cls in sections.items()},
    )
    for conflict in check(config):
        if findings.bad.isdisjoint(conflict.keys):
            place = _culprit(conflict.keys, findings.places) or file
            findings.problems.append(f"{place}: {conflict.text}")
    if findings.problems:
        raise config_error(findings.problems)
    return config


def _split(overrides: Iterable[str], findings: _Findings) -> Iterable[Binding]:
    """The overrides as bindings to text that is yet to be parsed."""
    for override in overrides:
        name, equals, text = override.partition("=")
        match = _NAME.fullmatch(name.strip())
        if not equals or not match:
            findings.problems.append(
                f"{COMMAND_LINE}: {override!r} is no override; write section.key=value, such as "
                "train.steps=100"
            )
        elif not text.strip():
            findings.reject(
                match[0],
                COMMAND_LINE,
                f"{match[0]} is given no value; write one (null is none) after the equals sign",
            )
        else:
            yield Binding(match["section"], match["key"], text.strip(), Place(COMMAND_LINE))


def _parse(raw: Iterable[Binding], hints: Hints, findings: _Findings) -> Iterable[Binding]:
    for binding in raw:
        hint = hints.get(binding.section, {}).get(binding.key)
        try:
            value = _override_value(binding.value, hint)
        except ValueError as error:
            findings.reject(binding.name, binding.place, f"{binding.name}: {error}")
        else:
            yield Binding(binding.section, binding.key, value, binding.place)


def _override_value(text: str, hint: Any) -> Any:
    # Globs, prompts and Windows paths mean something else in YAML, so text is taken as it is.
    if takes_bare_text(hint) and text[0] not in "'\"" and text not in ("null", "~"):
        return text
    return parse_value(text)


def _model(
    file: str, bindings: Iterable[Binding], findings: _Findings
) -> tuple[str, ModelOptions | None]:
    """`model.source` in its final form, and what the model offers, if that can be found out."""
    source, place = ModelConfig.source, Place(file)
    for binding in bindings:
        if binding.name == "model.source":
            source, place = binding.value, binding.place
    try:
        if place.file == COMMAND_LINE:
            source = _override_value(source, str)
        source = str(convert(source, str, gin=place.is_gin))
    except ValueError as error:
        findings.reject("model.source", place, f"model.source {error}")
        return ModelConfig.source, None
    try:
        path = find_model(source, _folder(place))
        options = read_model_options(path)
    except ValueError as error:
        findings.reject("model.source", place, f"model.source: {error}")
        return source, None
    except ConfigError as error:
        findings.bad.add("model.source")
        findings.problems.extend(str(error).splitlines())
        return source, None
    return (source if source in bundled_models() else str(path)), options


def _judge(
    bindings: Iterable[Binding], hints: Hints, model_known: bool, findings: _Findings
) -> None:
    """Sorts bindings into values that fit and problems."""
    unknown_sections = set()
    for binding in bindings:
        findings.places[binding.name] = binding.place
        if binding.section == "model" and (binding.key == "source" or not model_known):
            continue
        gin = binding.place.is_gin
        if binding.section not in hints:
            if binding.section not in unknown_sections or not binding.section:
                findings.reject(binding.name, binding.place, _unknown_section(binding, hints))
            unknown_sections.add(binding.section)
            continue
        if binding.key not in hints[binding.section]:
            findings.reject(binding.name, binding.place, _unknown_key(binding, hints))
            continue
        try:
            value = convert(binding.value, hints[binding.section][binding.key], gin=gin)
        except ValueError as error:
            findings.reject(binding.name, binding.place, f"{binding.name} {error}")
        else:
            findings.values.setdefault(binding.section, {})[binding.key] = value


def _unknown_section(binding: Binding, hints: Hints) -> str:
    got = show(binding.value, gin=binding.place.is_gin)
    near = nearest(binding.section, binding.key, hints)
    if binding.section:
        text = f"there is no section {binding.section} (got {binding.name} = {got})"
        sections = difflib.get_close_matches(binding.section, {*hints, FEDERATED}, n=1)
        near = near or tuple(f"section {name}" for name in sections)
    elif binding.key in hints:
        return f"{binding.key} is a section (got {got}); write its keys one by one below it"
    else:
        macro = " and no value uses it as a macro" if binding.place.is_gin else ""
        text = f"{binding.key} = {got} stands in no section{macro}"
    return _advise(text, near, f"sections are {', '.join(sorted(hints))}")


def _unknown_key(binding: Binding, hints: Hints) -> str:
    near = nearest(binding.section, binding.key, hints)
    got = show(binding.value, gin=binding.place.is_gin)
    keys = ", ".join(sorted(hints[binding.section]))
    return _advise(
        f"there is no key {binding.name} (got {got})", near, f"keys of {binding.section} are {keys}"
    )


def _advise(text: str, near: Sequence[str], allowed: str) -> str:
    return f"{text}; did you mean {near[0]}? ({allowed})" if near else f"{text}; {allowed}"


def _find_files(findings: _Findings, *, folders: bool) -> None:
    """Makes the paths of files that must exist absolute; data may be in `folders` instead."""
    for name in _PATHS:
        section, _, key = name.partition(".")
        written = findings.values.get(section, {}).get(key)
        if written is not None:
            place = findings.places[name]
            folder, patterns = _folder(place), name in _PATTERNS
            if findings.values.get("data", {}).get("format") == "sklearn" and patterns:
                continue
            try:
                found = (
                    find_folder(written, folder)
                    if folders
                    else tuple(one if one is None else find_data(one, folder) for one in written)
                    if isinstance(written, tuple)
                    else find_data(written, folder, patterns=patterns)
                )
            except ValueError as error:
                del findings.values[section][key]
                findings.reject(name, place, f"{name}: {error}")
            else:
                findings.values[section][key] = found


def _model_values(
    file: str, options: ModelOptions, findings: _Findings
) -> tuple[tuple[str, Plain], ...]:
    """Every option with its value, once the model's own class has accepted them."""
    values = {**options.defaults, **findings.values.get("model", {})}
    bad = {name.removeprefix("model.") for name in findings.bad if name.startswith("model.")}
    missing = [name for name in options.hints if name not in values and name not in bad]
    for name in missing:
        findings.reject(
            f"model.{name}",
            file,
            f"model.{name} has no default in {options.path}; write model.{name}=...",
        )
    if not missing and not bad:
        try:
            options.cls(**values)
        # `__post_init__` is the model author's: whatever it raises is its verdict.
        except (Exception, SystemExit) as error:
            named = [n for n in values if re.search(rf"\b{re.escape(n)}\b", str(error))]
            place = _culprit([f"model.{n}" for n in (*named, "source")], findings.places)
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            text = str(error).partition("\n")[0]
            if isinstance(error, NameError):
                text += "; options may use only the standard library and msgspec"
            findings.problems.append(f"{place or file}: model: {kind}{text}")
            findings.bad.update(f"model.{name}" for name in named)
    return tuple((name, values[name]) for name in options.hints if name in values)


def _culprit(keys: Iterable[str], places: Mapping[str, Place]) -> Place | None:
    """Where the key stands that a reader should look at first."""
    written = [places[key] for key in keys if key in places]
    from_command_line = [place for place in written if place.file == COMMAND_LINE]
    return next(iter((*from_command_line, *written)), None)


def _folder(place: Place) -> str | None:
    return None if place.file == COMMAND_LINE else os.path.dirname(place.file)

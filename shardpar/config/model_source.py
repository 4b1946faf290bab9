"""Finds a model file, learns its options without importing flax, and later imports it whole.

A model file imports flax, which takes seconds, while a config must be checked at once. So only
its options class is run, with the few statements that `lift_options` says it needs.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import importlib.util
import os
import re
import sys
import traceback
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shardpar.config.bindings import Place, config_error, cut
from shardpar.config.bundled import bundled_models, find_file
from shardpar.config.options_tree import LiftedOptions, ModelFileError, lift_options
from shardpar.config.schema import CONFIGS, ModelConfig
from shardpar.config.values import Plain, convert, freeze
from shardpar.errors import ConfigError

_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class ModelOptions:
    """The options that a model file offers.

    Attributes:
      path: of the model file.
      cls: the options dataclass, made without importing the rest of the file.
      hints: the type of each option, in the model's order.
      defaults: of the options that have one.
      trains: how such a model is trained: what the file's constant TRAINS says, or "plan".
    """

    path: str
    cls: type
    hints: dict[str, Any]
    defaults: dict[str, Plain]
    trains: str = "plan"


def find_model(source: str, folder: str | None = None) -> Path:
    """The file that `model.source` means.

    Args:
      source: the name of a bundled model, or a path to a .py file.
      folder: where the config that says so is; None if the command line does.

    Returns:
      The absolute path of the file.

    Raises:
      ValueError: there is no such model; the message says which there are.

    >>> find_model("gpt").name
    'gpt.py'
    """
    bundled = bundled_models()
    if source in bundled:
        return bundled[source]
    if _NAME.fullmatch(source):
        near = difflib.get_close_matches(source, bundled, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"there is no bundled model {source!r}; {hint}bundled are {', '.join(bundled)}, and a "
            "model of your own is named by its path, such as 'my_model.py'"
        )
    found = find_file(source, folder)
    if found is None:
        where = os.getcwd() if folder is None else os.path.abspath(folder)
        raise ValueError(
            f"there is no file {source!r} in {where}; bundled are {', '.join(bundled)}"
        )
    if not os.path.isfile(found) or not found.endswith(".py"):
        raise ValueError(f"{source!r} is no Python file; name one that ends in .py")
    return Path(os.path.abspath(found))


def read_model_options(path: Path) -> ModelOptions:
    """Learns a model's options, in milliseconds and without importing what it imports.

    Args:
      path: of the model file.

    Returns:
      The options class with the types and defaults of its fields.

    Raises:
      ConfigError: the file cannot be read or parsed, breaks its contract (one frozen dataclass
        whose name ends in Options, `build(options, rngs)`, `loss(model, batch)`), or an
        option's type or default is none that a config can hold.

    >>> read_model_options(find_model("gpt")).defaults["layers"]
    4
    """
    line: int | None = None
    try:
        tree = ast.parse(path.read_bytes(), str(path))
        trains = _trains(tree)
        lifted = lift_options(tree, trains)
        line = lifted.line
        cls, hints = _run(lifted, path)
    except OSError as error:
        raise config_error([f"{path}: cannot be read: {error.strerror}"]) from None
    except SyntaxError as error:
        text = f": {cut(error.text.strip())!r}" if error.text else ""
        place = Place(str(path), error.lineno or None)
        raise config_error([f"{place}: {error.msg}{text}"]) from None
    except ModelFileError as error:
        raise config_error([f"{Place(str(path), error.line)}: {error}"]) from None
    # Whatever else goes wrong does so in the file's own statements.
    except (Exception, SystemExit) as error:
        raise _failed(path, line, error) from error
    return dataclasses.replace(_checked(path, lifted, cls, hints), trains=trains)


def _trains(tree: ast.Module) -> str:
    """What the constant TRAINS says.

    Raises:
      ModelFileError: something that there is no trainer for.
    """
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "TRAINS" for target in statement.targets
        ):
            value = getattr(statement.value, "value", None)
            if value not in CONFIGS:
                raise ModelFileError(
                    f"TRAINS must be one of {', '.join(map(repr, CONFIGS))}", statement.lineno
                )
            return str(value)
    return "plan"


def load_model_source(path: str | Path) -> types.ModuleType:
    """Imports a model file for real, flax and all.

    Args:
      path: of the model file.

    Returns:
      The module. The same path with the same text gives the same module, so that its classes
      stay the same classes.

    Raises:
      ConfigError: the file cannot be read, or fails while it is imported; the error that it
        failed with is the cause.
    """
    path = Path(os.path.abspath(path))
    try:
        digest = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise config_error([f"{path}: cannot be read: {error.strerror}"]) from None
    name = f"_shardpar_model_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise config_error([f"{path}: is no Python file; name one that ends in .py"])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception | SystemExit):
            raise _failed(path, None, error) from error
        raise
    return module


def build_options(module: types.ModuleType, config: ModelConfig) -> Any:
    """The options object that the module's own `build` takes.

    Args:
      module: from `load_model_source`.
      config: section `model` of a loaded config.

    Returns:
      An instance of the module's options class.

    Raises:
      ConfigError: the module's class does not take these options.
    """
    found = {
        cls
        for name, cls in vars(module).items()
        if name.endswith("Options") and getattr(cls, "__module__", None) == module.__name__
    }
    try:
        (cls,) = found
        return cls(**dict(config.options))
    except (TypeError, ValueError) as error:
        raise config_error([f"{module.__file__}: model options do not fit: {error}"]) from error


def _run(lifted: LiftedOptions, path: Path) -> tuple[type, dict[str, Any]]:
    module = types.ModuleType(f"_shardpar_options_{hashlib.sha256(str(path).encode()).hexdigest()}")
    # dataclasses looks a class's module up in sys.modules, so it is there while that runs.
    sys.modules[module.__name__] = module
    try:
        exec(compile(lifted.program, str(path), "exec", dont_inherit=True), vars(module))
        cls = vars(module)[lifted.class_name]
        return cls, typing.get_type_hints(cls, vars(module), include_extras=True)
    finally:
        del sys.modules[module.__name__]


def _checked(path: Path, lifted: LiftedOptions, cls: type, hints: dict[str, Any]) -> ModelOptions:
    if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        place = Place(str(path), lifted.line)
        raise config_error(
            [f"{place}: {cls.__name__} must be a frozen dataclass; write @dataclass(frozen=True)"]
        )
    lines = dict(lifted.field_lines)
    kept: dict[str, Any] = {}
    defaults: dict[str, Plain] = {}
    problems = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        kept[field.name] = hints[field.name]
        try:
            _check_hint(field.name, hints[field.name])
            has_default, default = _default(field)
            if has_default:
                defaults[field.name] = convert(freeze(default), hints[field.name])
        except (TypeError, ValueError) as error:
            place = Place(str(path), lines.get(field.name, lifted.line))
            problems.append(f"{place}: {cls.__name__}.{field.name}: {error}")
    if problems:
        raise config_error(problems)
    return ModelOptions(str(path), cls, kept, defaults)


def _check_hint(name: str, hint: Any) -> None:
    if name == "source":
        raise ValueError("model.source already names the model file; rename the field")
    try:
        msgspec.convert(None, hint)
    except msgspec.ValidationError:
        pass
    except TypeError as error:
        raise TypeError(
            f"its type is none that a config can hold ({str(error).partition(chr(10))[0]}); use "
            "int, float, bool, str, Literal, a tuple of them, or one of them | None"
        ) from None


def _default(field: dataclasses.Field[Any]) -> tuple[bool, Any]:
    if field.default_factory is not dataclasses.MISSING:
        return True, field.default_factory()
    return field.default is not dataclasses.MISSING, field.default


def _failed(path: Path, line: int | None, error: BaseException) -> ConfigError:
    """What to tell of an exception that a model file raised: its last line in that file."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        line = error.lineno
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(path):
            line = frame.lineno
    hint = ""
    if isinstance(error, ImportError) and error.name:
        hint = "; install it, or put what it holds into the model file, which is imported alone"
    text = str(error).partition("\n")[0]
    return config_error([f"{Place(str(path), line)}: {type(error).__name__}: {text}{hint}"])

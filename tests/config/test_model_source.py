from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shardpar.config import build_options, find_model, load, load_model_source
from shardpar.config.model_source import read_model_options
from shardpar.errors import ConfigError

CONTRACT = "\ndef build(options, rngs): ...\ndef loss(model, batch): ...\n"
HEAD = """\
from __future__ import annotations
import math, jax_is_not_imported as jax
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from msgspec import Meta
"""


@pytest.fixture
def model(folder):
    def write_model(text: str) -> Path:
        path = folder / "own.py"
        path.write_text(HEAD + text + CONTRACT)
        return path

    return write_model


def message(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        read_model_options(path)
    return str(error.value).removeprefix(str(path))


def test_options_are_read_without_importing_the_file(folder):
    options = read_model_options(folder / "tiny.py")
    assert options.cls.__name__ == "TinyOptions"
    assert options.defaults["activation"] == "gelu"
    assert list(options.hints)[:2] == ["width", "heads"]
    assert "flax_is_not_imported_for_this" not in sys.modules
    assert not [name for name in sys.modules if name.startswith("_shardpar_options")]


def test_constants_aliases_bases_and_helpers_come_along(model):
    path = model(
        "Positive = Annotated[int, Meta(ge=1)]\n"
        "WIDTH = int(math.sqrt(4096))\n"
        "def half(x: jax.Array): return x // 2\n"
        "class Base:\n    pass\n"
        "UNUSED = jax.numpy.ones(3)\n"
        "@dataclass(frozen=True)\n"
        "class OwnOptions(Base):\n"
        "    width: Positive = WIDTH\n"
        "    hidden: 'Positive' = half(WIDTH)\n"
        "    names: tuple[str, ...] = field(default_factory=lambda: ('a',))\n"
        "    def dtype(self) -> jax.Array: return jax.numpy.float32\n"
    )
    assert read_model_options(path).defaults == {"width": 64, "hidden": 32, "names": ("a",)}


def test_a_field_without_default_must_be_set(model, write):
    model("@dataclass(frozen=True)\nclass OwnOptions:\n    width: int\n")
    path = write("run.yaml", "model: {source: own.py}")
    with pytest.raises(ConfigError, match=r"^run\.yaml: model\.width has no default in .*own\.py"):
        load(path)
    assert load(path, ["model.width=3"]).model.options == (("width", 3),)


def test_options_keep_the_order_of_the_model_not_of_the_config(write):
    path = write("run.yaml", "model: {heads: 2, width: 8, source: tiny.py}")
    assert [name for name, _ in load(path).model.options][:2] == ["width", "heads"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("class Own: ...", ": has no options class; write `@dataclass(frozen=True)` and `class "
         "MyOptions: ...` with one field per key of section model"),
        ("class AOptions: ...\nclass BOptions: ...",
         ":7: has 2 classes whose names end in Options: AOptions (line 6) and BOptions (line 7); "
         "rename all but the one whose fields are the keys of section model"),
        ("@dataclass\nclass AOptions:\n    a: int = 1",
         ":7: AOptions must be a frozen dataclass; write @dataclass(frozen=True)"),
        ("@dataclass(frozen=True)\nclass AOptions:\n    a: Any = jax.float32",
         ":8: AOptions uses jax, which comes from jax_is_not_imported, but options may use only "
         "the standard library and msgspec, so that a config is checked at once; keep the option "
         "as text or a number, and convert it in `build`"),
        ("@dataclass(frozen=True)\nclass AOptions:\n    a: int = 1 / 0",
         ":8: ZeroDivisionError: division by zero"),
        ("@dataclass(frozen=True)\nclass AOptions:\n    a: int = exit(3)", ":8: SystemExit: 3"),
        ("@dataclass(frozen=True)\nclass AOptions:\n    a: Nope = 1",
         ":7: NameError: name 'Nope' is not defined"),
        ("@dataclass(frozen=True)\nclass AOptions:\n    a: Annotated[int, Meta(ge=1)] = 0\n"
         "    b: float = 'x'",
         ":8: AOptions.a: must be an integer >= 1; got 0\n"
         "PATH:9: AOptions.b: must be a number; got 'x'"),
        ("@dataclass(frozen=True)\nclass AOptions:\n    source: str = ''",
         ":8: AOptions.source: model.source already names the model file; rename the field"),
        ("@dataclass(frozen=True)\nclass AOptions:\n    a: dict = field(default_factory=dict)",
         ":8: AOptions.a: a config cannot hold {}"),
        ("x = (", ":6: '(' was never closed: 'x = ('"),
        ("@dataclass(frozen=True)\nclass AOptions: a: int = 1\ndef build(options): ...",
         ":8: `build` must take two arguments: write `def build(options, rngs): ...`"),
    ],
)  # fmt: skip
def test_a_model_file_that_breaks_its_contract(folder, text, expected):
    path = folder / "own.py"
    own_build = "def build" in text
    contract = CONTRACT.partition("\n")[2].partition("\n")[2] if own_build else CONTRACT
    path.write_text(f"{HEAD}{text}\n{contract}")
    assert message(path) == expected.replace("PATH", str(path))


def test_build_and_loss_must_be_there(folder):
    path = folder / "own.py"
    path.write_text(HEAD + "@dataclass(frozen=True)\nclass AOptions:\n    a: int = 1")
    assert message(path) == (
        ": has no function `build`; write `def build(options, rngs): ...` at the top level"
    )


@pytest.mark.parametrize("content", [b"\x00", b"\xff\xfe", b"# coding: nonsense\n", b"(" * 3000])
def test_a_file_that_is_not_python(folder, content):
    path = folder / "own.py"
    path.write_bytes(content)
    assert "\n" not in message(path)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("gtp", "did you mean 'gpt'?"),
        ("no/such.py", "there is no file 'no/such.py' in"),
        (".", "'.' is no Python file"),
        ("", "there is no file ''"),
        ("\x00", "there is no file"),
    ],
)
def test_a_source_that_names_no_model(folder, source, expected):
    with pytest.raises(ValueError, match="no") as error:
        find_model(source)
    assert expected in str(error.value)


def test_importing_a_model_file_gives_one_module_per_text(model):
    path = model("").with_name("plain.py")
    path.write_text("from dataclasses import dataclass\n@dataclass(frozen=True)\nclass AOptions:\n"
                    "    a: 'int' = 1\n" + CONTRACT)  # fmt: skip
    first = load_model_source(path)
    assert load_model_source(path) is first
    assert sys.modules[first.__name__] is first
    path.write_text(path.read_text() + "\nx = 1\n")
    assert load_model_source(path) is not first


def test_the_real_class_is_built_from_a_loaded_config(folder, write):
    write("own.py", "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass AOptions:\n"
          "    a: int = 1\n    b: tuple[int, ...] = ()\n" + CONTRACT)  # fmt: skip
    config = load(write("run.yaml", "model: {source: own.py, b: [1, 2]}"))
    module = load_model_source(find_model(config.model.source))
    assert build_options(module, config.model) == module.AOptions(a=1, b=(1, 2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import not_there", ":1: ModuleNotFoundError: No module named 'not_there'; install it, or "
         "put what it holds into the model file, which is imported alone"),
        ("\nx = nothing", ":2: NameError: name 'nothing' is not defined"),
        ("import sys\nsys.exit(1)", ":2: SystemExit: 1"),
    ],
)  # fmt: skip
def test_a_model_file_that_fails_when_imported(folder, text, expected):
    path = folder / "own.py"
    path.write_text(text)
    before = set(sys.modules)
    with pytest.raises(ConfigError) as error:
        load_model_source(path)
    assert str(error.value) == f"{path}{expected}"
    assert error.value.__cause__ is not None
    assert set(sys.modules) == before

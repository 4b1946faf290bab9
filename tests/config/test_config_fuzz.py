"""Whatever a user writes, the answer is a config or one ConfigError, never anything else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardpar.config import RunConfig, load
from shardpar.config.schema import field_hints, section_classes
from shardpar.errors import ConfigError

SETTINGS = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NAMES = [f"{name}.{key}" for name, cls in section_classes().items() for key in field_hints(cls)]
WORDS = [
    *NAMES, "model.source", "model.width", "model.heads", "model.widths", "train", "steps", "N",
    "%N", "'tiny.py'", "'gpt'", "tiny.py", "include", "'fuzz.gin'", "import", "from", "@", "%", "/",
    "=", ":", ",", "[", "]", "{", "}", "(", ")", "-", "- ", "? ", "&a", "*a", "!!int", "!!set", "|",
    ">", "#", "\n", "\n  ", "\n\t", " ", "'", '"', "'''", "\\", "5", "-1", "3e-4", "1e999", "0x1F",
    "010", "9" * 40, "null", "None", "true", "True", ".nan", "'text'", "text", "'*.gin'", "<<",
    "---", "%YAML", "é", "\ud7ff", "\x85", "\u2028", "\x0c", "\r", "lambda", "f''", "b''", "1j",
    "...", "~", "$",
]  # fmt: skip

sentences = st.lists(st.sampled_from(WORDS), max_size=25).map("".join)
lines = st.tuples(
    st.sampled_from([*NAMES, "model.source", "model.width", "N"]),
    st.sampled_from([" = ", ": ", "="]),
    st.one_of(sentences, st.sampled_from(WORDS), st.text(max_size=5)),
).map("".join)
texts = st.one_of(sentences, st.lists(lines, max_size=5).map("\n".join), st.text())
contents = st.one_of(st.binary(), texts.map(lambda text: text.encode(errors="surrogatepass")))
overrides = st.one_of(texts, lines, st.text(alphabet=st.characters(exclude_categories=())))


def load_or_config_error(path: str, changes: list[str]) -> str:
    """Loads; what any config error must look like is checked here."""
    try:
        assert isinstance(load(path, changes), RunConfig)
    except ConfigError as error:
        message = str(error)
    else:
        return ""
    for line in message.split("\n"):
        assert line.isprintable()
        assert line.startswith((f"{path}", "command line: ", str(Path.cwd()))), line
    return message


@pytest.mark.parametrize("name", ["fuzz.gin", "fuzz.yaml"])
@given(content=contents)
@SETTINGS
def test_any_file_is_a_config_or_a_config_error(folder, name, content):
    (folder / name).write_bytes(content)
    load_or_config_error(name, [])


@given(changes=st.lists(overrides, max_size=3))
@SETTINGS
def test_any_override_is_applied_or_a_config_error(folder, changes):
    (folder / "fuzz.yaml").write_text("model: {source: tiny.py}")
    load_or_config_error("fuzz.yaml", changes)


@given(path=st.text(alphabet=st.characters(categories=["L", "N", "P"]), max_size=20))
@SETTINGS
def test_any_path_is_a_config_or_a_config_error(folder, path):
    assert "\n" not in load_or_config_error(path, [])


@given(text=texts)
@SETTINGS
def test_any_model_file_has_options_or_is_a_config_error(folder, text):
    (folder / "fuzz.yaml").write_text("model: {source: fuzz.py}")
    (folder / "fuzz.py").write_text((folder / "tiny.py").read_text() + text, errors="replace")
    load_or_config_error("fuzz.yaml", [])

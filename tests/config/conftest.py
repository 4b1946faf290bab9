"""A folder to run in, with a model file of one's own in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

TINY_MODEL = """\
from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import flax_is_not_imported_for_this as nnx
from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]


@dataclass(frozen=True)
class TinyOptions:
    width: Positive = 64
    heads: Positive = 4
    vocab_size: Positive = 256
    max_length: Positive = 128
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    activation: Literal["relu", "gelu"] = "gelu"
    widths: tuple[int, ...] = ()
    name: str | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")


def build(options: TinyOptions, rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Module()


def loss(model, batch):
    return 0.0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(TINY_MODEL)
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[[str, str], str]:
    def write_file(name: str, text: str) -> str:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write_file

"""Files of each format, small and the same for all tests."""

from __future__ import annotations

import random

import pytest

from shardpar.ps.data.options import SparseDataOptions

FIELDS = 5


def libffm_text(lines, seed=0):
    draw = random.Random(seed)
    return "".join(
        f"{draw.randrange(2)} "
        + " ".join(f"{f}:{draw.randrange(1000)}:{draw.choice(['1', '0.5'])}" for f in range(FIELDS))
        + "\n"
        for _ in range(lines)
    )


@pytest.fixture
def libffm_file(tmp_path):
    """Writes a libffm file of so many lines; each has its number as the first id."""

    def write(lines, name="some.ffm", start=0):
        path = tmp_path / name
        text = "".join(f"1 0:{start + n}:1 1:7:0.5\n" for n in range(lines))
        path.write_text(text)
        return SparseDataOptions(path=str(path), format="libffm", slots=2)

    return write

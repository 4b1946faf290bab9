"""`shardpar reshard`: what it takes to bring an array from one layout to another."""

from __future__ import annotations

from typing import Annotated

import typer

from shardpar.cli.arguments import ClusterFile, Json, read_cluster
from shardpar.errors import SpecError
from shardpar.spec.graph import DTYPE_BYTES
from shardpar.spec.layout_text import layout_from_text


def reshard(
    src: Annotated[
        str,
        typer.Argument(metavar="SRC", help='Where it is: "[0,1]{split0:2} + [2] across partial".'),
    ],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Where it shall be.")],
    shape: Annotated[
        str, typer.Option("--shape", metavar="N,N,…", help="Of the whole array; 1 for a scalar.")
    ],
    dtype: Annotated[str, typer.Option("--dtype", help="Of its elements.")] = "float32",
    cluster: ClusterFile = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="Draw it: a .png, .svg or .pdf file."),
    ] = None,
    json: Json = False,
) -> None:
    """Show the communications between two layouts: who sends which slice to whom, and the bytes.

    A layout is groups of devices, what each axis of a group's mesh does (splitD:n splits dim D,
    dup:n keeps copies, partial:n holds addends), and what holds across the groups.

    Examples:

        shardpar reshard "[0,1]{split0:2}" "[2,3]{split1:2}" --shape 8,8

        shardpar reshard "[0,1]{split0:2} + [2] across partial" "[0,1]{split0:2} + [2] across dup"
        --shape 8,8 --out sync.png
    """
    # Routing needs scipy, which --help need not wait for.
    from shardpar.cli.reshard_views import show

    show(
        layout_from_text(src, "SRC"),
        layout_from_text(dst, "DST"),
        _sizes(shape),
        dtype,
        _itemsize(dtype),
        read_cluster(cluster) if cluster else None,
        out=out,
        json=json,
    )


def _sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 10**12 for part in parts):
        raise SpecError(
            f'--shape is "{text}"; write the size of each dim, 1 or more, such as --shape 8,8'
        )
    return tuple(map(int, parts))


def _itemsize(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise SpecError(f'--dtype is "{dtype}"; write one of {", ".join(DTYPE_BYTES)}')
    return DTYPE_BYTES[dtype]

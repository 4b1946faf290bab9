"""Keeps what a party or an aggregator knows between two messages: one file, whole or not there.

A file is replaced in one step that survives kill -9 and power cuts, and has the SHA-256 of its
content in front, so that what comes back is what was written or an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import msgspec
import numpy as np

from shardpar.errors import CheckpointError, PartyError, RunError
from shardpar.fl.messages import Tensor, array_of, tensor_of
from shardpar.run.durable import sync_directory, write_atomically
from shardpar.run.leaves import named_leaves

Tree = Any
Tensors = dict[str, Tensor]
S = TypeVar("S", bound=msgspec.Struct)

_DIGEST_BYTES = 32


def tensors_of(tree: Tree) -> Tensors:
    """The leaves of a tree by their paths, as they are sent and stored.

    >>> list(tensors_of({"params": {"w": np.zeros(2)}}))
    ['params/w']
    """
    return {name: tensor_of(np.asarray(leaf)) for name, leaf in named_leaves(tree)[0].items()}


def tree_of(tensors: Mapping[str, Tensor], like: Tree, *, party: str) -> Tree:
    """The tree in some tensors, of NumPy arrays.

    Args:
      tensors: what came.
      like: a tree of arrays, or of their shapes and dtypes, that it must be as.
      party: whose it is.

    Raises:
      PartyError: it has other leaves, shapes or dtypes.
    """
    wanted, structure = named_leaves(like)
    if tensors.keys() != wanted.keys():
        odd = sorted(tensors.keys() ^ wanted.keys())[:5]
        raise PartyError(f"{party}: arrays {odd} are missing or too many", party=party)
    leaves = []
    for name, leaf in wanted.items():
        array = array_of(tensors[name], party=party)
        if array.shape != tuple(leaf.shape) or array.dtype != leaf.dtype:
            raise PartyError(
                f"{party}: {name} is {array.dtype}{list(array.shape)} where "
                f"{leaf.dtype}{list(leaf.shape)} was agreed on",
                party=party,
            )
        leaves.append(array)
    return jax.tree.unflatten(structure, leaves)


def write_record(path: Path, record: msgspec.Struct) -> None:
    """Replaces a file by a record, durably.

    Raises:
      RunError: the disk is full or failing; the old file is untouched.
    """
    content = msgspec.msgpack.encode(record)
    try:
        write_atomically(path, hashlib.sha256(content).digest() + content)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}; make room, restart") from None


def read_record(path: Path, kind: type[S]) -> S | None:
    """The record in a file, or None if there is no file.

    Raises:
      CheckpointError: the file is not as it was written, or is of another version.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    try:
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("its checksum is wrong")
        return msgspec.msgpack.decode(content, type=kind)
    except (ValueError, msgspec.DecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); restore it from a copy, or begin the job anew under "
            "another net.job with empty run directories"
        ) from None


def remove_record(path: Path) -> None:
    """Removes a file, durably; one that is not there is no error."""
    path.unlink(missing_ok=True)
    sync_directory(path.parent)

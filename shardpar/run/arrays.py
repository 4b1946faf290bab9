"""Moves the arrays of a state between devices and disk: the only place that calls Orbax.

Orbax writes asynchronously, one chunk per shard, and on restore each device reads only
the slices that its new sharding gives it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax import checkpoint as ocp

from shardpar.errors import CheckpointError
from shardpar.run.leaves import is_key

# Orbax gives up on a save after this long; its own ten minutes are short for a shared disk.
_SAVE_TIMEOUT_S = 6 * 3600


class ArrayStore:
    """Writes and reads flat dicts of arrays; one write at a time."""

    def __init__(self) -> None:
        # Trained numbers hardly get smaller, and to try costs more than all the rest of a save.
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)
        # Directories made in the background make Orbax's threads wait ten minutes for them when
        # the process is about to end.
        options = ocp.options.AsyncOptions(
            timeout_secs=_SAVE_TIMEOUT_S, create_directories_asynchronously=False
        )
        logging.getLogger("concurrent.futures").addFilter(_is_news)
        self._orbax = ocp.AsyncCheckpointer(handler, async_options=options)

    def begin_write(self, path: Path, leaves: Mapping[str, jax.Array]) -> None:
        """Copies the arrays from their devices and starts to write them.

        Args:
          path: a directory that does not exist yet.
          leaves: from `snapshot`. Their buffers may be donated once this returns.

        Raises:
          OSError, ValueError, RuntimeError: what Orbax raises when it cannot begin.
        """
        # Orbax refuses arrays without elements; their shape, in the manifest, says it all.
        arrays = {name: leaf for name, leaf in leaves.items() if leaf.size}
        if arrays:
            with _no_orbax_tracebacks():
                self._orbax.save(path, args=ocp.args.PyTreeSave(arrays))

    def finish_write(self) -> None:
        """Waits for the write to end.

        Raises:
          OSError, ValueError, RuntimeError: what Orbax met, such as a full disk, which it
            reports here and not when the write begins.
        """
        with _no_orbax_tracebacks():
            self._orbax.wait_until_finished()

    def read(self, path: Path, target: Mapping[str, Any], *, partial: bool) -> dict[str, jax.Array]:
        """Reads arrays straight into the shardings wanted.

        Args:
          path: a directory that a finished write left.
          target: shape, dtype and sharding of each array by name; they must be the stored ones.
          partial: whether arrays may be stored that the target leaves out.

        Returns:
          The arrays by name, bit for bit as they were written.

        Raises:
          CheckpointError: a leaf of the target has no sharding, or Orbax cannot read.
        """
        bare = [name for name, leaf in target.items() if getattr(leaf, "sharding", None) is None]
        if bare:
            raise CheckpointError(
                f"the restore target says not where {bare[0]} shall be; "
                "give each jax.ShapeDtypeStruct a sharding"
            )
        stored = {name: _bits(leaf) for name, leaf in target.items() if _bits(leaf).size}
        places = {
            name: ocp.ArrayRestoreArgs(
                sharding=target[name].sharding, global_shape=bits.shape, dtype=bits.dtype
            )
            for name, bits in stored.items()
        }
        read: Mapping[str, jax.Array] = {}
        if stored:
            order = ocp.args.PyTreeRestore(
                item=stored, restore_args=places, partial_restore=partial
            )
            try:
                read = self._orbax.restore(path, args=order)
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from error
        return {name: _restored(leaf, read.get(name)) for name, leaf in target.items()}

    def close(self) -> None:
        """Waits for Orbax's threads to end; what they met was for `finish_write` to raise."""
        with _no_orbax_tracebacks(), suppress(OSError, ValueError, RuntimeError):
            self._orbax.close()


def as_arrays(leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Turns numpy arrays and scalars among the leaves into what jax makes of them.

    Args:
      leaves: anything with shape and dtype, by name.

    Returns:
      Arrays by name; those that were arrays already are the same objects.

    >>> import numpy as np
    >>> str(as_arrays({"w": np.ones(2)})["w"].dtype)
    'float32'
    """
    return {
        name: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        for name, leaf in leaves.items()
    }


def snapshot(leaves: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], bool]:
    """The arrays' bits, copied where they lie in host memory.

    Args:
      leaves: arrays by name.

    Returns:
      What `begin_write` takes, and whether all of it is copies: then the buffers of the leaves
      may be donated at once, and not only when `begin_write` has returned.

    >>> bits, is_free = snapshot({"w": jnp.ones(2)})
    >>> is_free, bits["w"].tolist()
    (True, [1.0, 1.0])
    """
    bits = {
        name: jax.random.key_data(leaf) if is_key(leaf) else leaf for name, leaf in leaves.items()
    }
    # Orbax copies device memory to the host before it returns. Where the array already is in
    # host memory that "copy" is the live buffer, which the next step may overwrite.
    on_host = {name: array for name, array in bits.items() if _is_on_host(array)}
    copies = jax.device_put(
        list(on_host.values()), [array.sharding for array in on_host.values()], may_alias=False
    )
    jax.block_until_ready(copies)
    return {**bits, **dict(zip(on_host, copies, strict=True))}, len(on_host) == len(bits)


def _is_on_host(array: jax.Array) -> bool:
    kind = array.sharding.memory_kind or ""
    return "host" in kind or any(device.platform == "cpu" for device in array.sharding.device_set)


def _bits(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of what is stored for a leaf: for random keys, their bits."""
    plain = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.eval_shape(jax.random.key_data, plain) if is_key(leaf) else plain


def _restored(leaf: Any, bits: jax.Array | None) -> jax.Array:
    if bits is None:
        empty = _bits(leaf)
        bits = jnp.zeros(empty.shape, empty.dtype, device=leaf.sharding)
    return jax.random.wrap_key_data(bits, impl=leaf.dtype) if is_key(leaf) else bits


def _is_news(entry: logging.LogRecord) -> bool:
    # Writes that a full disk cut short may end after Orbax has closed its event loop and has
    # raised to us what went wrong; each of them would log a traceback of its own.
    error = entry.exc_info[1] if entry.exc_info else None
    return not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed")


@contextmanager
def _no_orbax_tracebacks() -> Iterator[None]:
    # Orbax logs each error of its threads with a traceback and then raises it to us, who
    # report it in one line. Only its own error records are held back, and only meanwhile.
    def is_wanted(entry: logging.LogRecord) -> bool:
        return entry.levelno < logging.ERROR or "orbax" not in entry.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

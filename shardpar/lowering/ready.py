"""A jitted function compiled ahead for its only shapes, and dispatched by jit's fast path."""

from __future__ import annotations

from typing import Any

from shardpar.lowering.elsewhere import in_order


class Ready:
    """Calls go to the jitted function, which finds what was compiled: half the dispatch time.

    Attributes:
      compiled: the same, with XLA's figures of its memory and its shardings.
    """

    def __init__(self, jitted: Any, *shapes: Any) -> None:
        """Compiles.

        Args:
          jitted: from `jax.jit`.
          shapes: ShapeDtypeStructs of all arguments it will ever get, with shardings.
        """
        self.compiled = jitted.lower(*shapes).compile()
        self.call = in_order(jitted)

"""What the backward is given and what it computes again, for each recompute choice of a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from shardpar.capture._compat import call_equations

Policy = Callable[..., bool]

_VIEWS = frozenset({
    "sharding_constraint", "reshape", "transpose", "squeeze", "slice", "dynamic_slice",
    "convert_element_type", "broadcast_in_dim", "expand_dims", "copy", "name",
})  # fmt: skip


def policy_of(recompute: str, gathers: bool) -> Policy | None:
    """The `jax.checkpoint` policy of a layer; None where it needs no checkpoint at all.

    Args:
      recompute: "none", "selective" or "full".
      gathers: the layer gathers weights or sequences that must not be kept gathered.
    """
    if recompute == "full":
        return jax.checkpoint_policies.nothing_saveable
    if recompute == "selective":
        return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return results_but_not_views if gathers else None


def results_but_not_views(primitive: Any, *_: Any, **params: Any) -> bool:
    """Whether the backward is given a value rather than made to compute it again.

    Gathered weights, and their views and casts, are as large as the weights: kept, they
    would undo fsdp. A name on the gathered value would not do, as a policy is asked
    about every value on the way to the name, too.
    """
    if primitive.name == "custom_vjp_call":
        return any(eqn.primitive.name not in _VIEWS for eqn in call_equations(params))
    return primitive.name not in _VIEWS

"""Finds the key that a misspelt or misplaced one was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping


def nearest(section: str, key: str, known: Mapping[str, Collection[str]]) -> tuple[str, ...]:
    """The known keys that `section.key` most likely stands for.

    The same key in another section comes first, then a similar key in the same section, then
    a similar one anywhere.

    Args:
      section: as written; may be unknown, or "" for a key outside every section.
      key: as written.
      known: the keys of each section.

    Returns:
      Full names, the likeliest first; empty if nothing comes near.

    >>> known = {"train": ("steps", "seed"), "optimizer": ("learning_rate",)}
    >>> nearest("train", "learning_rate", known), nearest("train", "step", known)
    (('optimizer.learning_rate',), ('train.steps',))
    >>> nearest("trian", "steps", known), nearest("train", "xyzzy", known)
    (('train.steps',), ())
    """
    same_key = tuple(f"{name}.{key}" for name, keys in known.items() if key in keys)
    if same_key:
        return tuple(difflib.get_close_matches(f"{section}.{key}", same_key, cutoff=0.0))
    if section in known:
        inside = difflib.get_close_matches(key, known[section], n=1)
        if inside:
            return (f"{section}.{inside[0]}",)
    names = {inner: f"{name}.{inner}" for name, keys in known.items() for inner in keys}
    elsewhere = difflib.get_close_matches(key, names, n=1, cutoff=0.75)
    return tuple(names[inner] for inner in elsewhere)

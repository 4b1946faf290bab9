"""Decides whether a value fits the type of its key, and says in words what would.

msgspec does the judging; this file adds what a config needs beyond it (finite numbers, 64-bit
integers, real text) and the words.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

import msgspec

from shardpar.config.bindings import cut, leaves

Plain: TypeAlias = "bool | int | float | str | tuple[Plain, ...] | None"

_NOUNS: dict[Any, tuple[str, str]] = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_NULLS = ("none", "null", "~")


def convert(value: Any, hint: Any, *, gin: bool = False) -> Plain:
    """Checks a value against a type hint.

    Args:
      value: as a parser read it.
      hint: of the field, with msgspec.Meta bounds where it has any.
      gin: whether to word the message for gin, where null is None.

    Returns:
      The value: integers have become floats where the hint says so, and lists tuples.

    Raises:
      ValueError: it does not fit; the message starts with "must be".

    >>> convert(1, float), convert([1, 2], tuple[int, ...])
    (1.0, (1, 2))
    >>> convert(0, Annotated[int, msgspec.Meta(ge=1)] | None)
    Traceback (most recent call last):
    ...
    ValueError: must be an integer >= 1, or null; got 0
    """
    problem = next(filter(None, map(_unfit, leaves(value))), None)
    if problem is None:
        try:
            converted = msgspec.convert(value, hint, strict=True)
        except msgspec.ValidationError:
            problem = _hint_for(value, hint)
        else:
            if _is_null_spelled_out(converted, hint):
                problem = f"; for no value write {'None' if gin else 'null'} without quotes"
            else:
                try:
                    return freeze(converted)
                except TypeError:
                    problem = ""
    raise ValueError(f"must be {allowed(hint, gin=gin)}; got {show(value, gin=gin)}{problem}")


def freeze(value: Any) -> Plain:
    """A plain value with tuples for lists.

    Raises:
      TypeError: the value is none that a config file can hold.

    >>> freeze([1, ["a"]])
    (1, ('a',))
    """
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a config cannot hold {show(value)}")


def allowed(hint: Any, *, gin: bool = False) -> str:
    """What a hint allows, in words.

    >>> allowed(Annotated[float, msgspec.Meta(gt=0.0, le=1.0)])
    'a number > 0 and <= 1'
    >>> allowed(Literal["none", "full"] | None), allowed(bool, gin=True)
    ("one of 'none', 'full', or null", 'True or False')
    >>> allowed(tuple[int, ...]), allowed(tuple[int, str])
    ('a list of integers', 'a list of an integer, text')
    """
    parts = [_in_words(part, gin) for part in alternatives(hint) if part is not type(None)]
    if type(None) in alternatives(hint):
        parts.append("None" if gin else "null")
    return ", or ".join(parts)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone.

    >>> alternatives(int | None)
    (<class 'int'>, <class 'NoneType'>)
    """
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def takes_bare_text(hint: Any) -> bool:
    """Whether a key wants text and nothing else, so that an override needs no quotes.

    >>> takes_bare_text(str | None), takes_bare_text(int | str), takes_bare_text(Literal["a"])
    (True, False, False)
    """
    bases = {_base(part)[0] for part in alternatives(hint)}
    return str in bases and bases <= {str, type(None)}


def show(value: Any, *, gin: bool = False) -> str:
    """A value as it is written in a file, cut where it gets long.

    >>> show(None), show(True, gin=True), show(["a", None])
    ('null', 'True', "['a', None]")
    """
    if isinstance(value, bool) or value is None:
        text = {None: "None", True: "True", False: "False"}[value]
        return text if gin else {"None": "null"}.get(text, text.lower())
    try:
        text = repr(value)
    except ValueError:  # an integer beyond what Python prints
        text = "an integer of thousands of digits"
    return cut(text)


def _base(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A hint without its Annotated shell, and what the shell held."""
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def _in_words(hint: Any, gin: bool) -> str:
    base, metadata = _base(hint)
    if base is bool:
        return "True or False" if gin else "true or false"
    if get_origin(base) is Literal:
        choices = [show(choice, gin=gin) for choice in get_args(base)]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if get_origin(base) in (tuple, list):
        items = get_args(base)
        if len(items) == 1 or items[1:] == (...,):
            inner, limits = _base(items[0])
            if inner in _NOUNS:
                return f"a list of {_NOUNS[inner][1]}{_bounds(limits)}"
            return f"a list, each item {allowed(items[0], gin=gin)}"
        return f"a list of {', '.join(allowed(item, gin=gin) for item in items)}"
    noun = _NOUNS[base][0] if base in _NOUNS else getattr(base, "__name__", str(base))
    return noun + _bounds(metadata)


def _bounds(metadata: tuple[Any, ...]) -> str:
    limits = [
        f" {sign} {limit:g}"
        if limit == round(limit, 6) and abs(limit) < 1e6
        else f" {sign} {limit}"
        for meta in metadata
        for name, sign in _BOUNDS.items()
        if (limit := getattr(meta, name, None)) is not None
    ]
    return " and".join(limits)


def _unfit(leaf: Any) -> str | None:
    """Why a value fits nowhere, whatever the key."""
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return ", which is not finite"
    if isinstance(leaf, int) and not -(2**63) <= leaf < 2**63:
        return ", which does not fit into 64 bits"
    if isinstance(leaf, str) and not leaf.isascii():
        try:
            leaf.encode()
        except UnicodeEncodeError:
            return ", which is not valid Unicode"
    return None


def _is_null_spelled_out(value: Any, hint: Any) -> bool:
    nullable = takes_bare_text(hint) and type(None) in alternatives(hint)
    return nullable and isinstance(value, str) and value.lower() in _NULLS


def _hint_for(value: Any, hint: Any) -> str:
    """What to write instead, where that can be guessed."""
    bases = [_base(part)[0] for part in alternatives(hint)]
    if isinstance(value, str):
        choices = [c for base in bases for c in _choices(base) if isinstance(c, str)]
        near = difflib.get_close_matches(value, choices, n=1)
        if near:
            return f"; did you mean {near[0]!r}?"
        if int in bases or float in bases:
            bare = _number(value, whole=float not in bases)
            if bare:
                return f"; write {bare} without quotes"
    elif isinstance(value, float) and int in bases and value.is_integer():
        return f"; write {int(value)}"
    elif isinstance(value, int | float) and not isinstance(value, bool) and str in bases:
        return f"; write {str(value)!r} in quotes"
    return ""


def _choices(base: Any) -> Iterator[Any]:
    if get_origin(base) is Literal:
        yield from get_args(base)


def _number(text: str, whole: bool) -> str:
    """The number that a text spells, as it is written without quotes; "" if it spells none."""
    try:
        return str(int(text)) if whole else f"{float(text):g}"
    except ValueError:
        return ""

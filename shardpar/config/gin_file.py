"""Reads the gin language with gin's own parser, and none of gin's global registry.

Bindings `section.key = value`, macros and includes are kept; what would run code (references,
imports) or depend on the caller (scopes) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from tokenize import TokenError
from typing import Any

from gin import config_parser

from shardpar.config.bindings import (
    Binding,
    Document,
    DocumentBuilder,
    Include,
    MacroUse,
    Place,
    config_error,
    cut,
    leaves,
)

_BAD_TOKEN = re.compile(r"Failed to parse token '(?P<token>.*)'", re.DOTALL)


@dataclass(frozen=True)
class _Reference:
    """`@name` or `@name()` inside a value."""

    text: str


class _Delegate(config_parser.ParserDelegate):
    """Keeps what gin would look up in its registry as plain values."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Reference:
        return _Reference(f"@{scoped_configurable_name}{'()' if evaluate else ''}")

    def macro(self, macro_name: str) -> MacroUse:
        return MacroUse(macro_name)


def parse_gin(text: str, file: str) -> Document:
    r"""Parses a gin file without judging its keys.

    Args:
      text: what the file holds.
      file: what to call it in places and messages.

    Returns:
      Its bindings, macros and includes. A name that is bound twice, a reference, an import or
      a scope is one of its `problems`.

    Raises:
      ConfigError: the text is not gin.

    >>> document = parse_gin("STEPS = 5\ntrain.steps = %STEPS", "run.gin")
    >>> [(b.name, b.value, str(b.place)) for b in document.bindings]
    [('train.steps', MacroUse(name='STEPS'), 'run.gin:2')]
    """
    document = DocumentBuilder()
    for statement in _statements(text, file):
        place = Place(file, statement.location.line_num)
        match statement:
            case config_parser.BindingStatement():
                _add_binding(document, statement, place)
            case config_parser.IncludeStatement(filename=path):
                if document.has_bindings:
                    document.object_to(
                        place,
                        f"include {path!r} stands below a binding, but this file's own bindings "
                        "win over included ones; move the include to the top",
                    )
                document.include(Include(path, place))
            case config_parser.ImportStatement():
                document.object_to(
                    place,
                    f"{statement.format()!r} is not needed and not allowed in a config; delete it "
                    "(your own model file is named by model.source = 'file.py')",
                )
    return document.build()


def _add_binding(
    document: DocumentBuilder, statement: config_parser.BindingStatement, place: Place
) -> None:
    name = ".".join(filter(None, (statement.selector, statement.arg_name)))
    values = leaves(statement.value)
    reference = next((value for value in values if isinstance(value, _Reference)), None)
    if statement.scope:
        document.object_to(
            place,
            f"{statement.scope}/{name}: scopes have no meaning here; write {name} = ...",
        )
    elif reference is not None:
        document.object_to(
            place,
            f"{name} = {reference.text}: references to functions have no meaning here; write a "
            "plain value, or a macro: NAME = value and then %NAME",
        )
    elif statement.arg_name:
        document.bind(Binding(statement.selector, statement.arg_name, statement.value, place))
    else:
        document.define(Binding("", statement.selector, statement.value, place))


def _statements(text: str, file: str) -> Iterator[Any]:
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        # Not `for statement in parser`: the parser lets the StopIteration of a file that ends
        # too early escape, and a loop would take it for the end and drop what it was reading.
        while (statement := parser.parse_statement()) is not None:
            yield statement
    except SyntaxError as error:
        raise config_error([f"{Place(file, error.lineno)}: {_explain(error)}"]) from None
    except TokenError as error:
        reason, (line, _) = error.args
        line = min(line, text.count("\n") + 1)
        raise config_error([f"{Place(file, line)}: not gin: {reason}"]) from None
    except RecursionError:
        raise config_error([f"{file}: values are nested too deeply to read"]) from None
    # The parser asserts, unpacks and indexes its way through bad text; whatever it stumbles
    # over, the file is to blame.
    except Exception as error:
        if isinstance(error, StopIteration):
            reason = "the file ends in the middle of a statement"
        else:
            reason = str(error).partition("\n")[0] or type(error).__name__
        raise config_error([f"{file}: not gin: {reason}; write section.key = value"]) from None


def _explain(error: SyntaxError) -> str:
    bad_token = _BAD_TOKEN.search(str(error.msg))
    if bad_token:
        token = cut(bad_token["token"])
        return (
            f"cannot read the value {token}; write text in quotes ({token!r}), "
            "numbers plainly, and the constants as None, True, False"
        )
    line = cut((error.text or "").strip())
    reason = str(error.msg).partition("\n")[0].partition("  Got ")[0].rstrip(".")
    return f"not gin: {reason}, in {line!r}; write section.key = value"

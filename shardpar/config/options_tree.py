"""Decides which statements of a model file its options class needs, by reading the syntax tree.

Only the standard library and msgspec may be among them: whatever else a model file imports or
computes stays untouched.
"""

from __future__ import annotations

import ast
import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

_BATCHES = {"build": "(options, rngs)", "loss": "(model, batch)"}
_CONTRACTS = {"nodes": {"fit": "(options, nodes, sources, targets, weights)"}}
_Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class LiftedOptions:
    """The part of a model file that its options need.

    Attributes:
      class_name: of the options dataclass.
      line: where the class stands.
      field_lines: where each field of the class itself stands.
      program: the statements to run, in the order of the file.
    """

    class_name: str
    line: int
    field_lines: tuple[tuple[str, int], ...]
    program: ast.Module


class ModelFileError(ValueError):
    """A model file breaks its contract; `line` says where, if it is in one place."""

    def __init__(self, text: str, line: int | None = None) -> None:
        super().__init__(text)
        self.line = line


def lift_options(tree: ast.Module, trains: str = "plan") -> LiftedOptions:
    """Finds the options class of a model file and everything it is made from.

    Args:
      tree: the parsed file.
      trains: what such a model is trained by, which says what functions it must have.

    Returns:
      The class and the statements it needs.

    Raises:
      ModelFileError: there is not exactly one options class, it needs a foreign import, or
        a function, such as `build` or `loss`, is missing or takes other arguments.

    >>> source = '''
    ... import dataclasses, jax
    ... WIDTH = 64
    ... @dataclasses.dataclass(frozen=True)
    ... class TinyOptions:
    ...     width: int = WIDTH
    ... def build(options, rngs): return jax.nn
    ... def loss(model, batch): return 0
    ... '''
    >>> print(ast.unparse(lift_options(ast.parse(source)).program))
    import dataclasses
    WIDTH = 64
    <BLANKLINE>
    @dataclasses.dataclass(frozen=True)
    class TinyOptions:
        width: int = WIDTH
    """
    body = list(_single_imports(tree.body))
    options = _options_class(body)
    definers: dict[str, list[ast.stmt]] = {}
    for statement in body:
        for name in _bound_names(statement):
            definers.setdefault(name, []).append(statement)
    for name, arguments in _CONTRACTS.get(trains, _BATCHES).items():
        if name in definers:
            _check_signature(definers[name][-1], name, arguments)
        elif "*" not in definers:
            raise ModelFileError(
                f"has no function `{name}`; write `def {name}{arguments}: ...` at the top level"
            )
    needed = _need(options, definers, options.name, {})
    program = [statement for statement in body if id(statement) in needed or _is_future(statement)]
    return LiftedOptions(
        options.name,
        options.lineno,
        tuple(
            (statement.target.id, statement.lineno)
            for statement in options.body
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        ),
        ast.Module([_WithoutSignatures().visit(copy.deepcopy(node)) for node in program], []),
    )


def _single_imports(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements, with `import a, b` taken apart so that each can be needed alone."""
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                single = copy.copy(statement)
                single.names = [alias]
                yield single
        else:
            yield statement


def _options_class(body: Iterable[ast.stmt]) -> ast.ClassDef:
    found = [n for n in body if isinstance(n, ast.ClassDef) and n.name.endswith("Options")]
    if not found:
        raise ModelFileError(
            "has no options class; write `@dataclass(frozen=True)` and `class MyOptions: ...` with "
            "one field per key of section model"
        )
    if len(found) > 1:
        names = " and ".join(f"{node.name} (line {node.lineno})" for node in found)
        raise ModelFileError(
            f"has {len(found)} classes whose names end in Options: {names}; rename all but the one "
            "whose fields are the keys of section model",
            found[1].lineno,
        )
    return found[0]


def _bound_names(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.Import | ast.ImportFrom):
        for alias in statement.names:
            dotted = isinstance(statement, ast.Import) and alias.asname is None
            yield alias.name.partition(".")[0] if dotted else alias.asname or alias.name
    elif isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))
    else:
        alias = getattr(statement, "name", None)
        if isinstance(alias, ast.Name):  # `type X = ...`, from Python 3.12 on
            yield alias.id


def _check_signature(statement: ast.stmt, name: str, arguments: str) -> None:
    if not isinstance(statement, _Function) or statement.decorator_list:
        return
    spec = statement.args
    positional = len(spec.posonlyargs) + len(spec.args)
    required = positional - len(spec.defaults)
    keywords_required = any(default is None for default in spec.kw_defaults)
    given = arguments.count(",") + 1
    if required > given or (positional < given and spec.vararg is None) or keywords_required:
        count = {2: "two", 5: "five"}[given]
        raise ModelFileError(
            f"`{name}` must take {count} arguments: write `def {name}{arguments}: ...`",
            statement.lineno,
        )


def _need(
    statement: ast.stmt,
    definers: Mapping[str, list[ast.stmt]],
    owner: str,
    needed: dict[int, ast.stmt],
) -> dict[int, ast.stmt]:
    """`needed` and what `statement` needs on top, by id; itself included.

    Bodies of functions run late or never, so what only they use is left out if it is foreign.
    """
    if id(statement) in needed:
        return needed
    needed = {**needed, id(statement): statement}
    for name, is_late in _used_names(statement, late=False):
        for definer in definers.get(name.id, ()):
            module = _foreign_module(definer)
            if module is not None and not is_late:
                raise ModelFileError(
                    f"{owner} uses {name.id}, which comes from {module}, but options may use only "
                    "the standard library and msgspec, so that a config is checked at once; keep "
                    "the option as text or a number, and convert it in `build`",
                    name.lineno,
                )
            try:
                needed = needed if module else _need(definer, definers, owner, needed)
            except ModelFileError:
                if not is_late:
                    raise
    return needed


def _used_names(node: ast.AST, late: bool) -> Iterator[tuple[ast.Name, bool]]:
    """Each name that a node reads, and whether only the body of a function does."""
    if isinstance(node, ast.Name):
        yield node, late
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        body = [node.body] if isinstance(node, ast.Lambda) else node.body
        defaults = filter(None, (*node.args.defaults, *node.args.kw_defaults))
        for part in (*getattr(node, "decorator_list", ()), *defaults):
            yield from _used_names(part, late)
        for part in body:
            yield from _used_names(part, late=True)
    else:
        if isinstance(node, ast.AnnAssign):
            yield from _quoted_names(node.annotation)
        for child in ast.iter_child_nodes(node):
            yield from _used_names(child, late)


def _quoted_names(annotation: ast.expr) -> Iterator[tuple[ast.Name, bool]]:
    """Names inside quoted types; counted as late, for a Literal's choices look the same."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                quoted = ast.parse(node.value, mode="eval")
            except (SyntaxError, ValueError):
                continue
            yield from _used_names(quoted, late=True)


def _foreign_module(statement: ast.stmt) -> str | None:
    """The module that an import takes from outside the standard library and msgspec."""
    if isinstance(statement, ast.Import):
        module = statement.names[0].name
    elif isinstance(statement, ast.ImportFrom):
        module = "." * statement.level + (statement.module or "")
    else:
        return None
    top = module.partition(".")[0]
    return None if top == "msgspec" or top in sys.stdlib_module_names else module


def _is_future(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"


class _WithoutSignatures(ast.NodeTransformer):
    """Drops the types of functions, which may name what is not imported here."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

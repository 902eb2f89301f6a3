"""Equations: parsed from Python syntax, checked against an allow-list, printed as C++.

A text becomes a tree of `Node`s; everything else in the library sees only the tree.
"""

from __future__ import annotations

import ast
import keyword
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .errors import EquationError, known

MAX_CHARACTERS = 10_000
MAX_NODES = 2_000
MAX_DEPTH = 100

# arity of every function of the language; each target header defines it as <name>_
FUNCTIONS = {
    "exp": 1, "log": 1, "sqrt": 1, "tanh": 1, "sigmoid": 1, "sin": 1, "cos": 1, "atan": 1, "erf": 1,
    "erfc": 1, "abs": 1, "sign": 1, "minimum": 2, "maximum": 2, "where": 3, "detach": 1,
}  # fmt: skip
CONSTANTS = {"pi": math.pi}

# what a constant may be made of: checked before a compiler sees it
_ARITHMETIC: dict[str, Callable[..., float]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    "**": operator.pow, "neg": operator.neg,
}  # fmt: skip
_BINARY = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**"}
_COMPARE = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}", re.ASCII)
_NOT_TEXT = re.compile(r"[^\n\t\x20-\x7f]")
_CPP_WORDS = {
    "alignas", "alignof", "and", "and_eq", "asm", "auto", "bitand", "bitor", "bool", "break",
    "case", "catch", "char", "char8_t", "char16_t", "char32_t", "class", "co_await", "co_return",
    "co_yield", "compl", "concept", "const", "const_cast", "consteval", "constexpr", "constinit",
    "continue", "decltype", "default", "delete", "do", "double", "dynamic_cast", "else", "enum",
    "explicit", "export", "extern", "false", "float", "for", "friend", "goto", "if", "inline",
    "int", "long", "mutable", "namespace", "new", "noexcept", "not", "not_eq", "nullptr",
    "operator", "or", "or_eq", "private", "protected", "public", "real", "register",
    "reinterpret_cast", "requires", "return", "short", "signed", "sizeof", "static",
    "static_assert", "static_cast", "struct", "switch", "template", "this", "thread_local", "throw",
    "true", "try", "typedef", "typeid", "typename", "union", "unsigned", "using", "virtual", "void",
    "volatile", "wchar_t", "while", "xor", "xor_eq", "NULL", "NAN", "INFINITY",
}  # fmt: skip
# no text reaches a source, a comment neither; but what looks like one is surely no equation
_DIRECTIVE = re.compile(r"#\s*(?:include|define|undef|pragma)\b|#(?:if|elif|else|endif|line|error)")


@dataclass(frozen=True)
class Node:
    """An operation: `op` is an operator, a function, or "name" or "number" with a `value`."""

    op: str
    args: tuple[Node, ...] = ()
    value: str | float = 0.0

    def names(self) -> set[str]:
        """Every name that the expression reads."""
        if self.op == "name":
            return {str(self.value)}
        return set().union(*(arg.names() for arg in self.args))

    def substitute(self, names: Mapping[str, Node]) -> Node:
        """The same expression with some names replaced."""
        if self.op == "name":
            return names.get(str(self.value), self)
        return Node(self.op, tuple(arg.substitute(names) for arg in self.args), self.value)


def number(value: float) -> Node:
    """A constant."""
    return Node("number", value=float(value))


def name(identifier: str) -> Node:
    """What a name stands for."""
    return Node("name", value=identifier)


@dataclass(frozen=True)
class Statement:
    """`target = expression`, on line `line` (1-based) of its block."""

    target: str
    expression: Node
    line: int


def needed(statements: Sequence[Statement], outputs: set[str]) -> list[Statement]:
    """The statements that `outputs` depend on; compilers warn of the others."""
    kept: list[Statement] = []
    wanted = set(outputs)
    for statement in reversed(statements):
        if statement.target in wanted:
            kept.append(statement)
            wanted |= statement.expression.names()
    return kept[::-1]


def check_label(label: object, what: str) -> str:
    """Return `label` if it can be part of a C++ symbol, else raise EquationError."""
    if not isinstance(label, str) or not _NAME.fullmatch(label):
        raise EquationError(
            f"{what} {_quote(label)} is not a name: "
            "a letter, then up to 63 letters, digits and _ (ASCII)"
        )
    return label


def check_name(identifier: object, what: str) -> str:
    """Return the name if it can stand in equations and in C++, else raise EquationError."""
    identifier = check_label(identifier, what)
    if identifier.endswith("_") or "__" in identifier:
        raise EquationError(
            f"{what} '{identifier}': "
            "names that end in _ or contain __ are kept for the generated code"
        )
    if identifier in _CPP_WORDS:
        raise EquationError(f"{what} '{identifier}' is a word of C++; choose another name")
    if keyword.iskeyword(identifier):
        raise EquationError(f"{what} '{identifier}' is a word of Python; choose another name")
    if identifier in FUNCTIONS or identifier in CONSTANTS:
        raise EquationError(
            f"{what} '{identifier}' is already a function or constant of the equations"
        )
    return identifier


def parse_block(text: str, readable: Iterable[str]) -> tuple[Statement, ...]:
    """Parse a block of assignments. `readable` are the names it may read before assigning them.

    Raises EquationError, naming the line and the offending word.
    """
    known_names = set(readable)
    statements = []
    lines = _checked_text(text).splitlines()
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    text = "\n".join(line[indent:] for line in lines)
    for statement in _parse(text, "exec").body:
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            raise _error(text, statement, "only assignments such as 'h = v + x' are allowed")
        target = statement.targets[0]
        if not isinstance(target, ast.Name):
            raise _error(text, target, "only a plain name can be assigned")
        expression = _convert(text, statement.value, known_names)
        try:
            check_name(target.id, "name")
        except EquationError as error:
            raise _error(text, target, str(error)) from None
        known_names.add(target.id)
        statements.append(Statement(target.id, expression, statement.lineno))
    return tuple(statements)


def parse_expression(text: str, readable: Iterable[str]) -> Node:
    """Parse one expression that may read the names in `readable`. Raises EquationError."""
    text = _checked_text(text).strip()
    if not text:
        raise EquationError("line 1: an empty expression; write one, such as 'where(u < 0, 0, 1)'")
    return _convert(text, _parse(text, "eval").body, set(readable))


def _quote(value: object) -> str:
    """A user's text made safe and short enough for a message."""
    shown = value[:60] if isinstance(value, str) else value
    return ascii(shown)[:80]


def _error(text: str, node: Any, reason: str) -> EquationError:
    line = getattr(node, "lineno", 1)
    word = ast.get_source_segment(text, node) if hasattr(node, "lineno") else None
    return EquationError(f"line {line}: {_quote((word or text).strip())}: {reason}")


def _checked_text(text: object) -> str:
    if not isinstance(text, str):
        raise EquationError(f"equations must be text, got {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        size = f"equations of {len(text)} characters"
        raise EquationError(f"{size}; at most {MAX_CHARACTERS} are allowed")
    if odd := _NOT_TEXT.search(text):
        line = text.count("\n", 0, odd.start()) + 1
        raise EquationError(f"line {line}: {_quote(odd[0])}: equations are plain ASCII text")
    if odd := _DIRECTIVE.search(text):
        line = text.count("\n", 0, odd.start()) + 1
        raise EquationError(f"line {line}: {_quote(odd[0])}: not a comment of equations")
    return text


def _parse(text: str, mode: str) -> Any:
    try:
        return ast.parse(text, mode=mode)
    except SyntaxError as error:
        word = _quote((error.text or "").strip())
        where = f"line {error.lineno}: {word}: " if error.lineno else ""
        raise EquationError(f"{where}{error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        reason = f"equations are too deep or malformed ({type(error).__name__})"
        raise EquationError(reason) from None


def _convert(text: str, root: ast.expr, readable: set[str]) -> Node:
    count = 0
    refused = partial(_error, text)

    def convert(node: ast.expr, depth: int, condition: bool = False) -> Node:
        nonlocal count
        count += 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            most = f"{MAX_NODES} terms or {MAX_DEPTH} levels"
            raise EquationError(f"line {node.lineno}: expression is too large (over {most})")
        deeper = depth + 1
        if condition and not isinstance(node, ast.Compare):
            raise refused(node, "where() takes a comparison first, such as where(u < 0, a, b)")
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return _finite(text, node, lambda: float(value))
            case ast.Name(id=identifier):
                if identifier in CONSTANTS:
                    return number(CONSTANTS[identifier])
                if identifier not in readable:
                    raise refused(node, f"unknown name. {known(readable | set(CONSTANTS))}")
                return name(identifier)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return convert(operand, deeper)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return folded(node, Node("neg", (convert(operand, deeper),)))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                pair = convert(left, deeper), convert(right, deeper)
                return folded(node, Node(_BINARY[type(op)], pair))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if (
                condition and type(op) in _COMPARE
            ):
                return Node(_COMPARE[type(op)], (convert(left, deeper), convert(right, deeper)))
            case ast.Compare():
                place = "only as the first argument of where()"
                raise refused(node, f"a single comparison is allowed, and {place}")
            case ast.Call(func=ast.Name(id=f), args=args, keywords=[]) if f in FUNCTIONS:
                if len(args) != FUNCTIONS[f]:
                    reason = f"{f}() takes {FUNCTIONS[f]} arguments, got {len(args)}"
                    raise refused(node, reason)
                where = f == "where"
                parts = (convert(a, deeper, where and i == 0) for i, a in enumerate(args))
                return Node(f, tuple(parts))
            case ast.Call(func=ast.Name()):
                reason = f"unknown function, or keywords in its call. {known(FUNCTIONS)}"
                raise refused(node, reason)
        listed = "+ - * / **, where() and the listed functions"
        raise refused(node, f"only numbers, names, {listed} are allowed")

    def folded(node: ast.expr, tree: Node) -> Node:
        """Refuse constant arithmetic that overflows (9**9**9) before a compiler ever sees it."""
        if not tree.names():
            _finite(text, node, lambda: _constant(tree))
        return tree

    return convert(root, 0)


def _constant(tree: Node) -> float:
    if tree.op == "number":
        return float(tree.value)
    values = [_constant(arg) for arg in tree.args]
    # a function of constants (log(2)) is bounded by its arguments: any finite stand-in will do
    return _ARITHMETIC[tree.op](*values) if tree.op in _ARITHMETIC else 1.0


def _finite(text: str, node: ast.expr, value: Callable[[], float]) -> Node:
    try:
        result = value()
        if not isinstance(result, complex) and math.isfinite(result):
            return number(result)
    except (OverflowError, ZeroDivisionError):
        pass
    raise _error(text, node, "this constant is not a finite number")


def small_power(node: Node) -> bool:
    """x**2 and x**3 are products on every target, hence exact; other powers are the library's."""
    return node.op == "**" and node.args[1].op == "number" and node.args[1].value in (2.0, 3.0)


def plain(text: str) -> list[str]:
    """Equations that were checked, a statement a line, without comments, quotes or backslashes."""
    lines = text.strip("\n").splitlines()
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return ast.unparse(ast.parse("\n".join(line[indent:] for line in lines))).splitlines()

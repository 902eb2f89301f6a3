"""Equations in Python syntax: checked against an allow-list, and parsed into trees."""

from __future__ import annotations

import ast
import difflib
import io
import keyword
import math
import operator
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import Any

from ..errors import EquationError, known
from .functions import FUNCTIONS
from .tree import Node, Statement, name, number

MAX_CHARACTERS = 10_000
MAX_NODES = 2_000
MAX_DEPTH = 100
# a chain of operators is cut into statements of this height: recursion over trees stays shallow
MAX_HEIGHT = 50

# terms of an argument that is written out more than once
MAX_COPIED = 16

CONSTANTS = {"pi": math.pi}

# what a constant may be made of: checked before a compiler sees it
_ARITHMETIC: dict[str, Callable[..., float]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    "**": operator.pow, "neg": operator.neg,
}  # fmt: skip
_BINARY = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**"}
_COMPARE = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
# what is said of what other languages have
_INSTEAD: dict[type[ast.AST], str] = {
    ast.BitXor: "^ is no power; write **",
    ast.FloorDiv: "// is not known; write floor(a / b)",
    ast.BitAnd: "& is not known; in where() write and",
    ast.BitOr: "| is not known; in where() write or",
    ast.Invert: "~ is not known; in where() write not",
    ast.IfExp: "write where(condition, a, b) instead of a if condition else b",
}
_ELSEWHERE = {
    "min": "minimum", "max": "maximum", "clip": "clamp", "pow": "**", "ln": "log",
    "arctan": "atan", "fabs": "abs", "sgn": "sign", "heaviside": "fire",
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}", re.ASCII)
_NEWLINE = "\n"  # which no f-string of Python 3.10 may hold
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


class _Text(str):
    """Equations without the indentation that their lines have in common, and how much that is."""

    indent = 0


def check_label(label: object, what: str) -> str:
    """Return `label` if it can be part of a C++ symbol, else raise EquationError."""
    if not isinstance(label, str) or not _NAME.fullmatch(label):
        raise EquationError(
            f"{what} {_named(label)} is not a name: "
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
    statements: list[Statement] = []
    lines = _checked_text(text).splitlines()
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    text = _Text("\n".join(line[indent:] for line in lines))
    text.indent = indent
    for statement in _parse(text, "exec").body:
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            reason = "only assignments such as 'h = v + x' are allowed"
            raise _error(text, statement, reason + _written_out(statement))
        target = statement.targets[0]
        if not isinstance(target, ast.Name):
            raise _error(text, target, "only a plain name can be assigned")

        def part(tree: Node, target: str = target.id, line: int = statement.lineno) -> Node:
            statements.append(Statement(f"{target}_{len(statements)}_", tree, line))
            return name(statements[-1].target)

        expression = _convert(text, statement.value, known_names, part)
        try:
            check_name(target.id, "name")
        except EquationError as error:
            raise _error(text, target, str(error)) from None
        known_names.add(target.id)
        statements.append(Statement(target.id, expression, statement.lineno))
    return tuple(statements)


def parse_expression(text: str, readable: Iterable[str]) -> Node:
    """Parse one expression that may read the names in `readable`. Raises EquationError."""
    given = _checked_text(text)
    text = _Text(given.strip())
    text.indent = len(given) - len(given.lstrip(" "))
    if not text:
        raise EquationError("line 1: an empty expression; write one, such as 'where(u < 0, 0, 1)'")
    return _convert(text, _parse(text, "eval").body, set(readable))


def _written_out(statement: ast.stmt) -> str:
    """What to write instead of `v += x`."""
    match statement:
        case ast.AugAssign(target=ast.Name(id=target), op=op, value=value) if type(op) in _BINARY:
            rest = ast.unparse(value)
            rest = rest if isinstance(value, ast.Name | ast.Constant | ast.Call) else f"({rest})"
            return f"; write {target} = {target} {_BINARY[type(op)]} {rest}"[:80]
    return ""


def nearest(identifier: str, names: Iterable[str]) -> str:
    """The name that was probably meant, as part of an error."""
    names = sorted(names)
    if identifier == "beta":
        is_there = "tau" in names
        kept = "snnTorch's beta, the share of v that is kept, is 1 - 1 / tau"
        return f"; {kept}." if is_there else f"; {kept}: make one of them a parameter."
    if identifier in _ELSEWHERE and _ELSEWHERE[identifier] in (*names, "**"):
        return f"; did you mean '{_ELSEWHERE[identifier]}'?"
    spelled = "".join(_greek(letter) or letter for letter in identifier[:64])
    same = [name for name in names if name.lower() == spelled.lower()]
    if near := same or difflib.get_close_matches(spelled, names, 1):
        return f"; did you mean '{near[0]}'?"
    return ""


def _greek(letter: str) -> str:
    """What a Greek letter is called, in lower case; "" for all others, also if they look alike."""
    if letter.isascii() or not letter.isalpha():
        return ""
    import unicodedata

    named = unicodedata.name(letter, "").split()
    return named[-1].lower() if named[:1] == ["GREEK"] else ""


def place_of(text: str, line: int, word: str, *, read: bool) -> str:
    """Where the statement of this line reads a word, or assigns it: "line 2, column 5"."""
    rest = "\n".join(text.splitlines()[line - 1 :])
    found = re.compile(rf"\b{word}\b").search(rest, rest.index("=") if read else 0)
    return _at(rest, found.start() if found else 0, line)


def _named(label: object) -> str:
    """A label made safe for a message; one Greek letter as it is, with what to write."""
    named = _greek(label) if isinstance(label, str) and len(label) == 1 else ""
    return f"'{label}' (write {named})" if named else _quote(label)


def _quote(value: object) -> str:
    """A user's text made safe and short enough for a message."""
    shown = value[:60] if isinstance(value, str) else value
    return ascii(shown)[:80]


def _error(text: str, node: Any, reason: str) -> EquationError:
    where, word = "line 1", None
    if hasattr(node, "lineno"):
        column = node.col_offset + 1 + getattr(text, "indent", 0)
        where, word = f"line {node.lineno}, column {column}", ast.get_source_segment(text, node)
    return EquationError(f"{where}: {_quote((word or text).strip())}: {reason}")


def _checked_text(text: object) -> str:
    if not isinstance(text, str):
        raise EquationError(f"equations must be text, got {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        size = f"equations of {len(text)} characters"
        raise EquationError(f"{size}; at most {MAX_CHARACTERS} are allowed")
    if odd := _NOT_TEXT.search(text):
        named = _greek(odd[0])
        shown, write = (f"'{odd[0]}'", f"; write {named}") if named else (_quote(odd[0]), "")
        reason = f"{shown}: equations are plain ASCII text{write}"
        raise EquationError(f"{_at(text, odd.start())}: {reason}")
    if odd := _DIRECTIVE.search(text):
        reason = f"{_quote(odd[0])}: not a comment of equations"
        raise EquationError(f"{_at(text, odd.start())}: {reason}")
    return text


def _at(text: str, index: int, line: int = 1) -> str:
    """Line and column of a character; `line` is that of the first."""
    before = text[:index]
    return f"line {line + before.count(_NEWLINE)}, column {index - before.rfind(_NEWLINE)}"


def _parse(text: str, mode: str) -> Any:
    try:
        return ast.parse(text, mode=mode)
    except SyntaxError as error:
        word, reason = _quote((error.text or "").strip()), error.msg
        if re.match(r"\s*d\w+\s*/\s*dt\b", error.text or ""):
            reason = (
                "a step is written out, such as h = v + (x - v) / tau for dv/dt = (x - v) / tau"
            )
        where = f"line {error.lineno}" if error.lineno else ""
        if error.lineno and error.offset:
            where += f", column {error.offset + getattr(text, 'indent', 0)}"
        raise EquationError(f"{where}: {word}: {reason}".removeprefix(": ")) from None
    except (ValueError, RecursionError, MemoryError) as error:
        reason = f"equations are too deep or malformed ({type(error).__name__})"
        raise EquationError(reason) from None


def _convert(
    text: str, root: ast.expr, readable: set[str], part: Callable[[Node], Node] | None = None
) -> Node:
    """The tree of one expression. `part` makes a statement of the beginning of a long chain."""
    count = 0
    refused = partial(_error, text)

    def counted(node: ast.expr, depth: int) -> None:
        nonlocal count
        count += 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise too_large(node)

    def too_large(node: ast.expr) -> EquationError:
        most = f"{MAX_NODES} terms or {MAX_DEPTH} levels"
        return refused(node, f"expression is too large (over {most})")

    def chained(node: ast.BinOp, depth: int) -> Node:
        """a + b + c is ((a + b) + c): a loop over the operators, however many there are."""
        links = [node]
        while isinstance(left := links[-1].left, ast.BinOp) and type(left.op) in _BINARY:
            counted(left, depth)
            links.append(left)
        tree = convert(links[-1].left, depth + 1)
        for link in reversed(links):
            pair = tree, convert(link.right, depth + 1)
            tree = folded(link, Node(_BINARY[type(link.op)], pair))
            if part and tree.height >= MAX_HEIGHT:
                tree = part(tree)
            elif tree.height > MAX_DEPTH:
                raise too_large(link)
        return tree

    def convert(node: ast.expr, depth: int, condition: bool = False) -> Node:
        counted(node, depth)
        deeper = depth + 1
        if condition and not isinstance(node, ast.Compare | ast.BoolOp) and not _negates(node):
            raise refused(node, "where() takes a comparison first, such as where(u < 0, a, b)")
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return _finite(text, node, lambda: float(value))
            case ast.Name(id=identifier):
                if identifier in CONSTANTS:
                    return number(CONSTANTS[identifier])
                if identifier not in readable:
                    names = readable | set(CONSTANTS)
                    meant = nearest(identifier, names)
                    raise refused(node, f"unknown name{meant or '.'} {known(names)}")
                return name(identifier)
            case ast.BoolOp(op=op, values=parts) if condition:
                both = "&&" if isinstance(op, ast.And) else "||"
                return reduce(
                    lambda a, b: Node(both, (a, b)), [convert(p, deeper, True) for p in parts]
                )
            case ast.UnaryOp(op=ast.Not(), operand=operand) if condition:
                return Node("!", (convert(operand, deeper, True),))
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return convert(operand, deeper)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return folded(node, Node("neg", (convert(operand, deeper),)))
            case ast.BinOp(op=op) if type(op) in _BINARY:
                return chained(node, depth)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if (
                condition and type(op) in _COMPARE
            ):
                return Node(_COMPARE[type(op)], (convert(left, deeper), convert(right, deeper)))
            case ast.Compare() | ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
                place = "only in the first argument of where()"
                raise refused(node, f"comparisons of two, and, or, not are allowed {place}")
            case ast.Call(func=ast.Name(id=f), args=args, keywords=[]) if f in FUNCTIONS:
                if len(args) != FUNCTIONS[f].arity:
                    reason = f"{f}() takes {FUNCTIONS[f].arity} arguments, got {len(args)}"
                    raise refused(node, reason)
                if f in ("fire", "add_grad") and part is None:
                    raise refused(node, f"{f}() stands in the equations of a model only")
                where = f == "where"
                trees = [convert(a, deeper, where and i == 0) for i, a in enumerate(args)]
                if written := FUNCTIONS[f].written:
                    # it reads its arguments more than once: large ones get names
                    sizes = [len([*tree.walk()]) for tree in trees]
                    named = zip(trees, sizes, strict=True)
                    return written(*(part(t) if part and n > MAX_COPIED else t for t, n in named))
                return Node(f, tuple(trees))
            case ast.Call(func=ast.Name(id=f)):
                meant = "" if f in FUNCTIONS else nearest(f, FUNCTIONS)
                reason = f"unknown function, or keywords in its call{meant or '.'}"
                raise refused(node, f"{reason} {known(FUNCTIONS)}")
            case ast.Call(func=ast.Attribute(attr=f)) if f in FUNCTIONS:
                raise refused(node, f"functions have no module here; write {f}(...)")
            case ast.Call(func=ast.Attribute(attr=f)) if meant := nearest(f, FUNCTIONS):
                raise refused(node, f"functions have no module here{meant}")
            case ast.Attribute(attr=constant) if constant in CONSTANTS:
                raise refused(node, f"constants have no module here; write {constant}")
            case ast.BinOp(op=op) | ast.UnaryOp(op=op) if type(op) in _INSTEAD:
                raise refused(node, _INSTEAD[type(op)])
            case ast.IfExp():
                raise refused(node, _INSTEAD[ast.IfExp])
        listed = "+ - * / **, where() and the listed functions"
        raise refused(node, f"only numbers, names, {listed} are allowed")

    def folded(node: ast.expr, tree: Node) -> Node:
        """Refuse constant arithmetic that overflows (9**9**9) before a compiler ever sees it."""
        if not tree.names():
            _finite(text, node, lambda: _constant(tree))
        return tree

    return convert(root, 0)


def _negates(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


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


def plain(text: str) -> list[str]:
    """Equations that were checked, a statement a line, without comments, quotes or backslashes."""
    lines: list[list[str]] = [[]]
    dedented = textwrap.dedent(text.expandtabs()).strip("\n")
    for token in tokenize.generate_tokens(io.StringIO(dedented).readline):
        if token.type == tokenize.NEWLINE:
            lines.append([])
        elif token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.OP):
            lines[-1].append(token.string)
    return [" ".join(line) for line in lines if line]

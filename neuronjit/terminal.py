"""What a command prints: tables on a terminal, plain lines in a pipe, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager


def clean(text: object) -> str:
    """One line that moves no cursor and hides nothing: what is not printable is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def say(as_json: bool, data: object, words: str) -> None:
    """A result: its data for a machine, or words for people."""
    if as_json:
        say_json(data)
    else:
        say_lines(words)


def say_lines(words: str) -> None:
    """Lines of text, each of them cleaned."""
    sys.stdout.write("".join(clean(line) + "\n" for line in words.split("\n")))


def complain(words: str) -> None:
    """The same on stderr."""
    lines = [clean(line) for line in words.split("\n")]
    sys.stderr.write("neuronjit-cache: " + "\n".join(lines) + "\n")


def say_json(data: object) -> None:
    """Data for a machine; JSON escapes by itself."""
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def ask(question: str) -> bool:
    """Whether the answer is yes; none is no."""
    sys.stdout.write(f"{clean(question)} [y/N] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def in_bytes(size: float) -> str:
    """A number of bytes for people, e.g. "33.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table for people; in a pipe a line a row, with tabs between the columns."""
    cells = [[clean(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        lines = [list(heads), *cells] if any(heads) else cells
        sys.stdout.write("".join("\t".join(line) + "\n" for line in lines))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*heads, box=box.SIMPLE_HEAD, show_header=any(heads))
    for row in cells:
        drawn.add_row(*(Text(cell, overflow="fold") for cell in row))  # Text: no markup in names
    Console().print(drawn)


@contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, if that is a terminal. Yields what moves it on by one."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("compiling", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)

"""Log lines, progress with rate and time left, and tables.

Lines and progress go to standard error, results to standard output. Progress is a live bar in a
terminal, and a plain line every few seconds elsewhere.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, JustifyMethod

Advance = Callable[[int], None]
LINE_EVERY_S = 10.0
MOST_OF_A_WORD = 12  # columns; longer words, e.g. paths, may be broken in a narrow table


class Report:
    """Where a command logs its progress; `Report(quiet=True)` prints nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    @cached_property
    def console(self) -> Console:
        """The one console on standard error; lines logged to it appear above a progress bar."""
        from rich.console import Console

        return Console(stderr=True, quiet=self.quiet, highlight=False)

    def log(self, message: str) -> None:
        """Log one line to standard error: plain text, never markup, wrapped in a terminal."""
        if self.quiet:
            return
        try:
            if sys.stderr.isatty():
                self.console.print(harmless(message), markup=False, emoji=False)
            else:
                print(harmless(message), file=sys.stderr, flush=True)
        except BrokenPipeError:
            raise
        except OSError:  # e.g. a full disk or a closed terminal: the work continues
            pass

    @contextmanager
    def track(
        self, task: str, total: int, unit: str, note: Callable[[], str] = str
    ) -> Iterator[Advance]:
        """Show the progress of a task; call the yielded function with the number of units done.

        Args:
            task: its name.
            total: number of units.
            unit: their name.
            note: returns what the line of progress ends with, "" for nothing.
        """
        if self.quiet:
            yield lambda _: None
        elif self.console.is_terminal:
            with self._bar(task, total, unit, note) as advance:
                yield advance
        else:
            yield _Lines(task, total, unit, note, self.log)

    @contextmanager
    def _bar(self, task: str, total: int, unit: str, note: Callable[[], str]) -> Iterator[Advance]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, refresh_per_second=4, transient=True) as bar:
            handle = bar.add_task(task, total=total, rate="", note="")
            start, done = time.perf_counter(), 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                rate = done / max(time.perf_counter() - start, 1e-9)
                said = f"{_amount(rate, unit)}/s"
                bar.update(handle, advance=count, rate=said, note=_noted(note))

            yield advance
        self.log(_finished(task, done, unit, time.perf_counter() - start))

    def table(
        self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1
    ) -> None:
        """Print a table on standard output.

        If the terminal is too narrow, left-aligned columns wrap, except the first of several; if
        that is not enough, each row is printed as a block of lines. Numbers are never cut.

        Args:
            title: above the table.
            header: names of the columns; none is shown if all are empty.
            rows: cells as text.
            left: number of left-aligned columns; the others are right-aligned.
        """
        if self.quiet:
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        wraps = range(min(1, left - 1), left)
        cells = [[harmless(cell) for cell in row] for row in (header, *rows)]
        if _least_width(cells, wraps) > console.width:
            _print_lines(console, harmless(title), cells)
            return
        table = Table(
            title=Text(harmless(title)),
            show_header=any(header),
            box=box.SIMPLE_HEAD,
            title_justify="left",
            title_style="bold",
            pad_edge=False,
            min_width=min(len(title), 78),
            padding=(0, 1, 0, 0),
        )
        for number, name in enumerate(header):
            side: JustifyMethod = "left" if number < left else "right"
            table.add_column(name, justify=side, no_wrap=number not in wraps, overflow="fold")
        for row in cells[1:]:
            table.add_row(*map(Text, row))
        console.print(table)


def _least_width(cells: Sequence[Sequence[str]], wraps: Container[int]) -> int:
    """Return the least width of a table in characters, if some columns wrap between words."""
    from rich.cells import cell_len

    widths = [
        max(
            min(MOST_OF_A_WORD, max(map(cell_len, cell.split()), default=0))
            if number in wraps
            else cell_len(cell)
            for cell in column
        )
        for number, column in enumerate(zip(*cells, strict=True))
    ]
    return sum(widths) + len(widths)


def _print_lines(console: Console, title: str, cells: Sequence[Sequence[str]]) -> None:
    """Print a table as lines: the first cell of each row, and the named others below it."""
    from rich.padding import Padding
    from rich.text import Text

    console.print(Text(title, "bold"))
    names, *rows = cells
    for first, *rest in rows:
        console.print(Text(first), overflow="fold")
        for name, cell in zip(names[1:], rest, strict=True):
            if cell:
                line = f"{name}: {cell}" if name else cell
                console.print(Padding(Text(line, overflow="fold"), (0, 0, 0, 2)))


QUIET = Report(quiet=True)


class _Lines:
    def __init__(
        self,
        task: str,
        total: int,
        unit: str,
        note: Callable[[], str],
        log: Callable[[str], None],
    ) -> None:
        self.task, self.total, self.unit, self.note, self.log = task, total, unit, note, log
        self.done = 0
        self.start = self.last = time.perf_counter()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.perf_counter()
        if self.done >= self.total:
            self.log(_finished(self.task, self.done, self.unit, now - self.start))
        elif now - self.last >= LINE_EVERY_S:
            self.last = now
            rate = self.done / (now - self.start)
            self.log(
                f"{self.task}: {100 * self.done / self.total:.0f} %, {_amount(rate, self.unit)}/s, "
                f"{duration((self.total - self.done) / rate)} left{_noted(self.note)}"
            )


def _noted(note: Callable[[], str]) -> str:
    said = note()
    return f", {said}" if said else ""


def _finished(task: str, done: int, unit: str, seconds: float) -> str:
    rate = _amount(done / max(seconds, 1e-9), unit).removesuffix(f" {unit}")
    return f"{task}: {_amount(done, unit)} in {duration(seconds)}, {rate}/s"


def _amount(count: float, unit: str) -> str:
    return size(count) if unit == "bytes" else f"{count:,.0f} {unit}"


def harmless(text: str) -> str:
    """Return text without control characters, which names of files may contain.

    A byte that is not valid UTF-8 is shown as an escape, as in caf\\xe9.
    """
    return "".join(map(_harmless, text))


def _harmless(char: str) -> str:
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}"


def duration(seconds: float) -> str:
    """Format seconds: 0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Format a number of bytes: 3.1 MiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def percent(share: float | None) -> str:
    """Format a share in 0..1 as a percentage with two decimals, None as a dash."""
    return "–" if share is None else f"{100 * share:.2f}"

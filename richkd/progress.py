"""What a stage says while it runs: lines, progress with rate and time left, tables.

Everything goes to standard error, so that standard output is free for results. In a terminal
progress is a live bar; elsewhere it is a plain line every few seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, JustifyMethod

Advance = Callable[[int], None]
LINE_EVERY_S = 10.0


class Report:
    """Where a stage reports to. `Report(quiet=True)` says nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    @cached_property
    def console(self) -> Console:
        """The console on standard error: one, so that lines appear above a bar, not in it."""
        from rich.console import Console

        return Console(stderr=True, quiet=self.quiet, highlight=False)

    def say(self, message: str) -> None:
        """One line; what is in it is text, never markup. A terminal wraps it between words."""
        if self.quiet:
            return
        try:
            if sys.stderr.isatty():
                self.console.print(harmless(message), markup=False, emoji=False)
            else:
                print(harmless(message), file=sys.stderr, flush=True)
        except BrokenPipeError:
            raise
        except OSError:  # a log on a disk that is full, a terminal that is gone: work goes on
            pass

    @contextmanager
    def track(self, task: str, total: int, unit: str) -> Iterator[Advance]:
        """Progress of one task: call what it yields with the number of units just done."""
        if self.quiet:
            yield lambda _: None
        elif self.console.is_terminal:
            with self._bar(task, total, unit) as advance:
                yield advance
        else:
            yield _Lines(task, total, unit, self.say)

    @contextmanager
    def _bar(self, task: str, total: int, unit: str) -> Iterator[Advance]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        with Progress(*columns, console=self.console, refresh_per_second=4, transient=True) as bar:
            handle = bar.add_task(task, total=total, rate="")
            start, done = time.perf_counter(), 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                rate = done / max(time.perf_counter() - start, 1e-9)
                bar.update(handle, advance=count, rate=f"{_amount(rate, unit)}/s")

            yield advance
        self.say(_finished(task, done, unit, time.perf_counter() - start))

    def table(
        self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1
    ) -> None:
        """A table on standard output: the first `left` columns to the left, the others right.

        Where there is no room, those to the left wrap, but not the first of several.
        """
        if self.quiet:
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

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
            wraps = number in range(min(1, left - 1), left)
            table.add_column(name, justify=side, no_wrap=not wraps, overflow="fold")
        for row in rows:
            table.add_row(*(Text(harmless(cell)) for cell in row))
        Console().print(table)


class _Lines:
    def __init__(self, task: str, total: int, unit: str, say: Callable[[str], None]) -> None:
        self.task, self.total, self.unit, self.say = task, total, unit, say
        self.done = 0
        self.start = self.last = time.perf_counter()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.perf_counter()
        if self.done >= self.total:
            self.say(_finished(self.task, self.done, self.unit, now - self.start))
        elif now - self.last >= LINE_EVERY_S:
            self.last = now
            rate = self.done / (now - self.start)
            self.say(
                f"{self.task}: {100 * self.done / self.total:.0f} %, {_amount(rate, self.unit)}/s, "
                f"{duration((self.total - self.done) / rate)} left"
            )


def _finished(task: str, done: int, unit: str, seconds: float) -> str:
    rate = _amount(done / max(seconds, 1e-9), unit).removesuffix(f" {unit}")
    return f"{task}: {_amount(done, unit)} in {duration(seconds)}, {rate}/s"


def _amount(count: float, unit: str) -> str:
    return size(count) if unit == "bytes" else f"{count:,.0f} {unit}"


def harmless(text: str) -> str:
    """Text without what would command the terminal: names come from files."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}"
                   for char in text)  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds for people: 0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes for people: 3.1 MiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def percent(share: float | None) -> str:
    """A share in 0..1 as a percentage with two decimals; a dash for None."""
    return "–" if share is None else f"{100 * share:.2f}"

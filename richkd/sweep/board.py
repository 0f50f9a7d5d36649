"""The progress of a sweep: a row for each run in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from richkd.core.progress import LINE_EVERY_S, Report, duration, percent, size
from richkd.sweep.cost import total_left
from richkd.training.precision import advice

if TYPE_CHECKING:
    from rich.console import RenderableType

    from richkd.sweep.entries import Entry

STYLES = {"training": "bold", "done": "green", "failed": "red", "stopped": "dim", "waiting": "dim"}


class Board:
    """A context manager that shows the state of all runs; without a terminal it prints lines."""

    def __init__(self, entries: Sequence[Entry], report: Report, lanes: int = 1) -> None:
        """Show `entries`, of which `lanes` train side by side without slowing each other."""
        self.entries = entries
        self.report = report
        self.lanes = lanes
        self._live: Any = None
        self._last_line = time.perf_counter()

    def __enter__(self) -> Board:
        if not self.report.quiet and self.report.console.is_terminal:
            from rich.live import Live

            self._live = Live(
                get_renderable=self.render,
                console=self.report.console,
                refresh_per_second=2,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def log(self, message: str) -> None:
        """Print a line that stays, above the rows."""
        if self._live is not None:
            self._live.console.print(message, markup=False, highlight=False, emoji=False)
        else:
            self.report.log(message)

    def log_line(self, entry: Entry) -> None:
        """Print how a run ended, or how far it is."""
        if entry.state == "failed":
            self.log(f"{entry.label} failed: {entry.reason}")
        else:
            self.log(
                f"{entry.label}: {entry.scored_on} {percent(entry.accuracy)} %, {self.summary()}"
            )

    def tick(self, entry: Entry, images: int) -> None:
        """Count images that a run has trained on, and print a line from time to time."""
        entry.images += images
        now = time.perf_counter()
        if self._live is None and now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self.report.log(f"sweep: {self.summary()}; {entry.label} at {entry.progress}")

    def summary(self) -> str:
        """Summarise all runs in one line."""
        count = {state: sum(entry.state == state for entry in self.entries) for state in STYLES}
        done = f"{count['done']} of {len(self.entries)} runs done"
        other = [f"{count[state]} {state}" for state in ("failed", "stopped") if count[state]]
        left = self.seconds_left()
        return ", ".join([done, *other, *([f"about {duration(left)} left"] if left else [])])

    def seconds_left(self) -> float | None:
        """Estimate the seconds until all runs have ended; None if a run's cost is not known."""
        left = [entry.seconds_left for entry in self.entries]
        known = [seconds for seconds in left if seconds is not None]
        return max(*known, sum(known) / self.lanes) if len(known) == len(left) else None

    def render(self) -> RenderableType:
        """Render a row for each run in training, and for as many others as there is room for."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), min_width=78)
        table.add_column("run", no_wrap=True)
        kinds = {entry.scored_on for entry in self.entries}
        score = f"{kinds.pop()} top-1" if len(kinds) == 1 else "top-1"
        for name in ("epoch", score, "best", "left"):
            table.add_column(name, justify="right", no_wrap=True)
        room = max(4, self.report.console.height - 6)
        for entry in self._shown(room):
            left = duration(entry.seconds_left) if entry.seconds_left else entry.state
            style = STYLES[entry.state]
            cells = (
                entry.label,
                entry.progress,
                percent(entry.accuracy),
                percent(entry.best),
                left,
            )
            table.add_row(*(Text(cell) for cell in cells), style=style)
        hidden = len(self.entries) - min(room, len(self.entries))
        table.caption = self.summary() + (f"; {hidden} more rows" if hidden else "")
        table.caption_justify = "left"
        return table

    def _shown(self, room: int) -> list[Entry]:
        """Choose the runs to show, those in training first; keep the order of the grid."""
        urgency = {"training": 0, "failed": 1, "done": 2, "waiting": 3, "stopped": 4}
        numbered = sorted(enumerate(self.entries), key=lambda pair: urgency[pair[1].state])
        return [entry for _, entry in sorted(numbered[:room], key=lambda pair: pair[0])]


def show_plan(entries: Sequence[Entry], title: str, engine: Engine, report: Report) -> None:
    """Print the grid, a row for each configuration, with what is left to do and what it costs."""
    rows: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        settings = entry.settings
        alpha = "" if settings.alpha is None else f"{settings.alpha}"
        row = (settings.student, f"{settings.lr:g}", settings.method, alpha)
        rows.setdefault(row, []).append(entry)
    alphas = any(alpha for *_, alpha in rows)
    costs = any(entry.cost for entry in entries)
    cells = []
    for (student, lr, method, alpha), runs in rows.items():
        to_do = [entry for entry in runs if entry.state == "waiting"]
        left = duration(total_left(to_do)) if to_do else "–"
        memory = size(to_do[0].memory) if to_do else "–"
        counts = (f"{len(runs)}", f"{len(to_do)}" if to_do else "–")
        known = (left, memory) if costs else ()
        cells.append((student, lr, method, *([alpha] if alphas else []), *counts, *known))
    header = [
        "student",
        "lr",
        "method",
        *(["α"] if alphas else []),
        "runs",
        "to do",
        *(["about", "memory"] if costs else []),
    ]
    report.table(title, header, cells, left=2)
    waiting = sum(entry.state == "waiting" for entry in entries)
    report.log(
        f"{len(entries)} runs of {entries[0].settings.epochs} epochs, {waiting} to do, "
        f"{engine.describe(entries)}"
    )
    precisions = {entry.settings.student: entry.cost.precisions for entry in entries if entry.cost}
    if line := advice({name: each for name, each in precisions.items() if each is not None}):
        report.log(line)


class Engine(Protocol):
    """The interface of an engine that trains the runs of a sweep."""

    lanes: int  # how many runs train side by side without slowing each other

    def describe(self, entries: Sequence[Entry]) -> str:
        """Describe how many runs train at once and where, and how long that takes, if known."""

    def train(self, entries: Sequence[Entry], last: int, board: Board) -> None:
        """Train runs up to epoch `last`, each in its folder; one that fails leaves the others."""

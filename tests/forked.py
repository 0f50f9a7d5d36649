"""Commands in processes of their own, without the seconds that imports take: each is a fork.

A command can be killed at a point that is told beforehand: by a signal that it sends itself before
or after a function is called for the n-th time. No moment has to be guessed.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRELOADED = (
    "richkd.cli",
    "richkd.distill",
    "richkd.precompute",
    "richkd.sweep.run",
    "richkd.demo",
    "richkd.run",
    "richkd.tools.verify",
    "richkd.tools.export",
    "richkd.report",
    "richkd.tools.hub",
    "richkd.report.evaluation",
    "richkd.report.analysis",
    "richkd.tools.inspect",
    "richkd.teachers.demo_clip",
    "open_clip",
    "torch.export",
)


@dataclass(frozen=True)
class Done:
    """What became of a command; the code is negative where a signal ended it."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Kill:
    """A signal that a command sends itself: at the n-th call of a function, after or before it."""

    at: str  # MODULE:NAME or MODULE:CLASS.NAME
    count: int = 1
    by: int = signal.SIGKILL
    before: bool = False


class Forks:
    """The process that all commands are forks of; a context manager."""

    def __enter__(self) -> Forks:
        command = [sys.executable, "-W", "ignore", __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def run(
        self,
        *words: Any,
        kill: Kill | None = None,
        values: dict[str, Any] | None = None,
        cwd: Path | None = None,
    ) -> Done:
        """Run a command of richkd to its end; `values` are set in modules first (MODULE:NAME)."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            wanted = {
                "words": list(map(str, words)),
                "kill": vars(kill) if kill else None,
                "values": values or {},
                "cwd": str(cwd or Path.cwd()),
                "folder": folder,
                "environment": dict(os.environ),
            }
            self.process.stdin.write(json.dumps(wanted) + "\n")
            self.process.stdin.flush()
            code = int(self.process.stdout.readline())
            out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
        return Done(code, out, err)


def serve() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        wanted = json.loads(line)
        child = os.fork()
        if child == 0:
            work(wanted)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def work(wanted: dict[str, Any]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{wanted['folder']}/{name}", os.O_CREAT | os.O_WRONLY), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["cwd"])
    for target, value in wanted["values"].items():
        module, _, name = target.partition(":")
        setattr(importlib.import_module(module), name, value)
    if wanted["kill"]:
        arm(Kill(**wanted["kill"]))
    from richkd.__main__ import main

    sys.argv = ["richkd", *wanted["words"]]
    code = 1
    try:
        main()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def arm(kill: Kill) -> None:
    module, _, path = kill.at.partition(":")
    owner: Any = importlib.import_module(module)
    *holders, name = path.split(".")
    for holder in holders:
        owner = getattr(owner, holder)
    original, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == kill.count and kill.before:
            os.kill(os.getpid(), kill.by)
        result = original(*arguments, **keywords)
        if calls == kill.count and not kill.before:
            os.kill(os.getpid(), kill.by)
        return result

    setattr(owner, name, counted)


if __name__ == "__main__":
    serve()

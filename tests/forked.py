"""Commands and scripts in processes of their own, without the seconds that imports take.

A server imports PyTorch, open_clip and richkd once; every process is a fork of it. A process can
be interrupted at an exact point: it sends itself a signal before or after the n-th call of a
function. No moment has to be guessed.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

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
SHIM = Path(__file__).with_name("shim")  # a folder for the PATH, with a richkd that asks the server
ADDRESS = "RICHKD_TEST_FORKS"  # the environment variable that tells the shim where the server is


@dataclass(frozen=True)
class Outcome:
    """What a command left behind; a negative code is the signal that ended it."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Kill:
    """A signal that a process sends itself after, or before, the n-th call of a function."""

    at: str  # MODULE:NAME or MODULE:CLASS.NAME
    count: int = 1
    by: int = signal.SIGKILL
    before: bool = False


class Process:
    """A fork under way, used like subprocess.Popen; its standard output and error go to files."""

    def __init__(self, address: str, request: dict[str, Any]) -> None:
        self.returncode: int | None = None
        self.out, self.err = "", ""  # once it ended
        self._outputs = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        with Path(os.devnull).open("rb") as nothing:
            self._connection = ask(address, request, [nothing, *self._outputs])
        self._answers = self._connection.makefile()
        self.pid = int(self._answers.readline())

    def output_so_far(self) -> list[str]:
        """Return what it wrote to standard output and to standard error."""
        return [
            os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()
            for file in self._outputs
        ]

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = int(self._answers.readline())
            self.out, self.err = self.output_so_far()
            for file in (self._answers, self._connection, *self._outputs):
                file.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.out, self.err

    def outcome(self) -> Outcome:
        return Outcome(self.wait(), self.out, self.err)

    def send_signal(self, by: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, by)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """The server that all processes are forks of; a context manager."""

    def __enter__(self) -> Forks:
        self._folder = tempfile.TemporaryDirectory(prefix="forks-")
        self.address = f"{self._folder.name}/socket"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen(64)  # whoever asks before the imports are done, waits
        number = listener.fileno()
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(number)],
            stdin=subprocess.PIPE,
            pass_fds=[number],
            start_new_session=True,  # the terminal's Ctrl-C is for pytest
        )
        listener.close()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()  # at which the server ends
        self._server.wait(timeout=60)
        self._folder.cleanup()

    def start(self, *words: Any, **given: Any) -> Process:
        """Start a command of richkd in a session of its own; see `_request` for `given`."""
        return Process(self.address, _request(words=list(map(str, words)), **given))

    def run(self, *words: Any, **given: Any) -> Outcome:
        """Run a command of richkd to its end."""
        return self.start(*words, **given).outcome()

    def start_python(self, script: Path | str, *words: Any, **given: Any) -> Process:
        """Start a script, a path or its text, whose modules may be loaded already."""
        name = "script" if isinstance(script, Path) else "code"
        return Process(
            self.address, _request(words=list(map(str, words)), **{name: str(script)}, **given)
        )

    def run_python(self, script: Path | str, *words: Any, **given: Any) -> Outcome:
        return self.start_python(script, *words, **given).outcome()

    @property
    def shim(self) -> dict[str, str]:
        """The environment in which a script's `richkd` is a fork, too."""
        return {"PATH": f"{SHIM}:{os.environ['PATH']}", ADDRESS: self.address}


def _request(
    kill: Kill | None = None,
    values: dict[str, Any] | None = None,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    ignore: int | None = None,
    **what: Any,
) -> dict[str, Any]:
    """What the server is asked for.

    Args:
        kill: where the process sends itself a signal.
        values: set in modules first, by MODULE:NAME.
        cwd: the working directory.
        env: environment variables beside the present ones.
        ignore: a signal that the process ignores, as one started by nohup does.
        what: `words`, and `script` or `code` where it is not richkd that runs.
    """
    return {
        "kill": vars(kill) if kill else None,
        "values": values or {},
        "cwd": str(cwd or Path.cwd()),
        "environment": {**os.environ, **(env or {})},
        "ignore": ignore,
        **what,
    }


def ask(address: str, request: dict[str, Any], streams: list[IO[bytes]]) -> socket.socket:
    """Send a request with three standard streams; the answers are the pid and the exit code."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [b"\n"], [stream.fileno() for stream in streams])
    connection.sendall(json.dumps(request).encode() + b"\n")
    return connection


# --- in the server -------------------------------------------------------------------------------


def serve(listener: socket.socket) -> None:
    """Answer each connection in a fork until standard input is closed, as when pytest ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # a collection in a fork would copy all that is loaded
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        reap()
        if os.fork() == 0:
            listener.close()
            keep(connection)
        connection.close()


def reap() -> None:
    """Wait for the keepers that ended, so that their CPU time is counted."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def keep(connection: socket.socket) -> NoReturn:
    """Fork the process that is asked for and report its pid and its exit code."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile().readline())
    child = os.fork()
    if child == 0:
        connection.close()
        work(request, streams)
    for stream in streams:
        os.close(stream)
    try:
        connection.sendall(f"{child}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(f"{code}\n".encode())
    finally:  # nobody may be listening any more
        os._exit(0)


def work(request: dict[str, Any], streams: list[int]) -> NoReturn:
    """Be the process that was asked for."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = (open(n, "rw"[n], closefd=False) for n in (0, 1))  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(
        open(2, "wb", buffering=0, closefd=False),  # noqa: SIM115
        write_through=True,
        errors="backslashreplace",
    )
    os.environ.clear()
    os.environ.update(request["environment"])
    code = 1
    try:
        os.chdir(request["cwd"])
        for target, value in request["values"].items():
            module, _, name = target.partition(":")
            setattr(importlib.import_module(module), name, value)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
        if request["ignore"]:
            signal.signal(request["ignore"], signal.SIG_IGN)
        with struck(request["kill"]):
            execute(request)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


def struck(kill: dict[str, Any] | None) -> AbstractContextManager[None]:
    """Within the block, have this process send itself the signal of a Kill."""
    if kill is None:
        return nullcontext()
    by = kill.pop("by")
    return at_call(**kill, strike=lambda: os.kill(os.getpid(), by))


def execute(request: dict[str, Any]) -> None:
    if script := request.get("script"):
        sys.argv = [script, *request["words"]]
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")
    elif code := request.get("code"):
        sys.argv = ["-c", *request["words"]]
        exec(code, {"__name__": "__main__"})  # noqa: S102
    else:
        from richkd.__main__ import main

        sys.argv = ["richkd", *request["words"]]
        main()


# --- faults at an exact point --------------------------------------------------------------------


@contextmanager
def at_call(
    at: str, count: int, strike: Callable[[], None], *, before: bool = False
) -> Iterator[None]:
    """Within the block, call `strike` after, or before, the n-th call of a function.

    Args:
        at: MODULE:NAME or MODULE:CLASS.NAME of the function.
        count: n.
        strike: what happens there.
        before: the function, rather than after it.
    """
    module, _, path = at.partition(":")
    owner: Any = importlib.import_module(module)
    *holders, name = path.split(".")
    for holder in holders:
        owner = getattr(owner, holder)
    original, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and before:
            strike()
        result = original(*arguments, **keywords)
        if calls == count and not before:
            strike()
        return result

    setattr(owner, name, counted)
    try:
        yield
    finally:
        setattr(owner, name, original)


def interrupted(at: str, count: int = 1, *, before: bool = False) -> AbstractContextManager[None]:
    """Raise KeyboardInterrupt in this process at the n-th call of a function; see `at_call`."""

    def strike() -> NoReturn:
        raise KeyboardInterrupt

    return at_call(at, count, strike, before=before)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

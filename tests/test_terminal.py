"""What people see: in terminals of 80 and 120 columns, and where there is no terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import unicodedata
from pathlib import Path

import pytest

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[()][A-Z0-9]")


def in_terminal(columns: int, folder: Path, *arguments: object) -> str:
    """What a command writes to a terminal of so many columns, its bars included."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    unset = ("COLUMNS", "LINES", "NO_COLOR")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["TERM"] = "xterm-256color"
    process = subprocess.Popen(
        [sys.executable, "-m", "richkd", *map(str, arguments)],
        cwd=folder, env=environment, stdin=slave, stdout=slave, stderr=slave,
    )  # fmt: skip
    os.close(slave)
    said = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        said += part
    os.close(master)
    text = said.decode()
    assert process.wait() == 0, text
    return text


def width(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line)


def check_readable(text: str, columns: int) -> None:
    """No line is longer than the terminal is wide, and none was cut."""
    assert "Traceback" not in text
    for line in re.split(r"[\r\n]+", ESCAPE.sub("", text)):
        assert width(line.rstrip()) <= columns, line
        assert not re.search(r"\w…(\s|$)", line), line


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_commands_in_a_terminal(
    columns: int, store: Path, shapes_teacher: Path, clip_dir: Path, tmp_path: Path
) -> None:
    commands = {
        "precompute": ("precompute", "--dataset", "shapes", "--limit", 100, "--clip", clip_dir,
                       "--teacher", "resnet8", "--teacher-weights", shapes_teacher, "--views", 2),
        "distill": ("distill", "--cache", store, "--student", "resnet8", "--epochs", 2,
                    "--out", "runs/a"),
        "sweep": ("sweep", "--cache", store, "--students", "resnet8,resnet14", "--methods",
                  "ce,kd", "--seeds", 1, "--epochs", 1),
        "report": ("report", "runs"),
        "inspect": ("inspect", store),
        "verify": ("verify", store),
        "analyze": ("analyze", store, "--out", "."),
        "evaluate": ("evaluate", "runs/a"),
        "methods": ("methods",),
        "recipes": ("recipes",),
        "models": ("models",),
        "doctor": ("doctor",),
        "help": ("--help",),
    }  # fmt: skip
    for name, arguments in commands.items():
        if columns > 80 and name not in ("precompute", "distill", "sweep", "inspect", "help"):
            continue  # a narrow terminal is the hard one
        text = in_terminal(columns, tmp_path, *arguments)
        print(f"--- {name}, {columns} columns\n{ESCAPE.sub('', text)}")
        check_readable(text, columns)
        if name in ("precompute", "distill"):
            assert " % " in text and "left" in text  # a bar, with the time left


@pytest.mark.slow
def test_commands_without_a_terminal(store: Path, tmp_path: Path) -> None:
    command = ["distill", "--cache", store, "--student", "resnet8", "--epochs", 2, "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "richkd", *map(str, command)],
        cwd=tmp_path, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "TERM")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr
    assert re.search(r"^epoch 2/2: loss .*, test .* %", done.stderr, re.MULTILINE)
    assert re.search(r"^ resnet8 by richkd +\d", done.stdout, re.MULTILINE)
    check_readable(done.stdout, 80)

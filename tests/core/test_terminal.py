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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import SHIM, Forks
from PIL import Image

from richkd.core.progress import Report
from richkd.core.streams import READABLE

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[()][A-Z0-9]")


def in_terminal(forks: Forks, columns: int, folder: Path, *arguments: object) -> str:
    """What a command writes to a terminal of so many columns, its bars included."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    unset = ("COLUMNS", "LINES", "NO_COLOR")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["TERM"] = "xterm-256color"
    process = subprocess.Popen(
        [SHIM / "richkd", *map(str, arguments)],
        cwd=folder,
        env={**environment, **forks.shim},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
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
    columns: int,
    forks: Forks,
    store: Path,
    shapes_teacher: Path,
    clip_dir: Path,
    tmp_path: Path,
) -> None:
    commands = {
        "precompute": (
            "precompute",
            "--dataset",
            "shapes",
            "--limit",
            100,
            "--clip",
            clip_dir,
            "--teacher",
            "resnet8",
            "--teacher-weights",
            shapes_teacher,
            "--views",
            2,
        ),
        "distill": (
            "distill",
            "--cache",
            store,
            "--student",
            "resnet8",
            "--epochs",
            2,
            "--out",
            "runs/a",
        ),
        "sweep": (
            "sweep",
            "--cache",
            store,
            "--students",
            "resnet8,resnet14",
            "--methods",
            "ce,kd",
            "--seeds",
            1,
            "--epochs",
            1,
        ),
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
    }
    for name, arguments in commands.items():
        if columns > 80 and name not in ("precompute", "distill", "sweep", "inspect", "help"):
            continue  # a narrow terminal is the hard one
        text = in_terminal(forks, columns, tmp_path, *arguments)
        print(f"--- {name}, {columns} columns\n{ESCAPE.sub('', text)}")
        check_readable(text, columns)
        if name in ("precompute", "distill"):
            assert " % " in text and "left" in text  # a bar, with the time left


@pytest.mark.slow
def test_commands_without_a_terminal(
    forks: Forks, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COLUMNS", "TERM"):
        monkeypatch.delenv(name, raising=False)
    command = ["distill", "--cache", store, "--student", "resnet8", "--epochs", 2, "--out", "run"]
    done = forks.run(*command, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "\x1b" not in done.out + done.err and "\r" not in done.out + done.err
    assert re.search(r"^epoch 2/2: loss .*, test .* %", done.err, re.MULTILINE)
    assert re.search(r"^ resnet8 by richkd +\d", done.out, re.MULTILINE)
    check_readable(done.out, 80)


# --- other encodings, and streams that go nowhere ------------------------------------------------


def richkd(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command line of the shell in which `richkd` is this richkd."""
    unset = ("COLUMNS", "LINES", "NO_COLOR", "PYTHONUTF8", "PYTHONIOENCODING")
    known = {name: value for name, value in os.environ.items() if name not in unset}
    script = f"set -o pipefail; richkd() {{ '{sys.executable}' -m richkd \"$@\"; }}; {command}"
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**known, **environment},
    )


def check_quiet(done: subprocess.CompletedProcess[bytes]) -> None:
    for noise in (b"Traceback", b"Exception ignored", b"Error"):
        assert noise not in done.stdout + done.stderr, done


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp932", "cp1252"])
def test_terminals_that_are_not_utf_8(encoding: str, store: Path, tmp_path: Path) -> None:
    """Names of people's own among what is shown: é, 日本 and a byte that is no UTF-8."""
    (tmp_path / "café 日本").symlink_to(store)
    (tmp_path / os.fsdecode(b"broken\xff")).symlink_to(store)
    commands = {
        "richkd inspect 'café 日本'": 0,
        "richkd inspect $'broken\\xff'": 0,
        "richkd distill --help": 0,
        "richkd methods": 0,
        "richkd methods --json": 0,
        "richkd inspect 'no 日本'": 2,
        "richkd inspect $'no\\xff'": 2,
    }
    for command, code in commands.items():
        done = richkd(
            tmp_path, command, PYTHONIOENCODING=encoding, PYTHONUTF8="0", LC_ALL="C.UTF-8"
        )
        assert done.returncode == code, done
        check_quiet(done)
        text = (done.stdout + done.stderr).decode(encoding)
        assert "?" not in text.replace("?)", "") or encoding == "cp932", text
        if "\\xff" in command:
            assert "broken\\xff" in text or "no\\xff" in text
        elif "日本" in command and encoding != "cp932":
            assert "\\u65e5\\u672c" in text
            assert ("caf\\xe9" if encoding == "ascii" else "café") in text or code
    bare = richkd(
        tmp_path, "richkd inspect 'café 日本'", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"
    )
    assert bare.returncode == 0
    check_quiet(bare)


def test_own_symbols_have_a_reading_in_letters() -> None:
    """All that the source has beside ASCII, where it may be shown."""
    source = Path(__file__).parents[2] / "richkd"
    used = {char for file in source.rglob("*.py") for char in file.read_text() if ord(char) > 127}
    assert used <= {*READABLE, *"".join(READABLE)}, used - {*READABLE}
    assert all(text.isascii() for text in READABLE.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "codes", "lines"),
    [
        ("richkd methods --json | true", (1, 141), 0),
        ("richkd methods | true", (1, 141), 0),
        ("richkd --help | head -1", (0, 1, 141), 0),
        ("richkd models | head -1", (0, 1, 141), 0),
        ("richkd --version | true", (1, 141), 0),
        ("richkd nonsense 2>&1 | true", (2,), 0),
        ("richkd methods --json >/dev/full", (2,), 1),
        ("richkd methods >/dev/full", (2,), 1),
        ("richkd --help >/dev/full", (2,), 1),
        ("richkd methods >&-", (0,), 0),
        ("richkd --help >&-", (0,), 0),
        ("richkd methods --json 2>&-", (0,), 0),
        ("richkd nonsense >&-", (2,), 1),
        ("richkd nonsense 2>&-", (2,), 0),
        ("richkd nonsense 2>/dev/full", (2,), 0),
        ("richkd nonsense <&- >&- 2>&-", (2,), 0),
    ],
)
def test_streams_that_are_closed_cut_off_or_full(
    command: str, codes: tuple[int, ...], lines: int, tmp_path: Path
) -> None:
    done = richkd(tmp_path, command)
    assert done.returncode in codes, done
    said = done.stderr.decode().splitlines()
    assert len(said) == lines and all(line.startswith("richkd: ") for line in said), done
    check_quiet(done)


@pytest.mark.slow
def test_what_is_opened_where_standard_error_is_closed_is_not_written_to(
    store: Path, tmp_path: Path
) -> None:
    done = richkd(tmp_path, f"richkd analyze '{store}' --out . --json 2>&-")
    assert done.returncode == 0 and done.stdout.startswith(b"{")
    check_quiet(done)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [20, 40])
@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_narrow_terminals(columns: int, term: str, store: Path, tmp_path: Path) -> None:
    shown = {
        "richkd models 'mobilenetv2_100'": "1280",
        f"richkd inspect '{store}'": "complete",
        "richkd methods": "Knowledge",
        "richkd evaluate --help": "--corruption-files",
        "richkd --help": "train-teacher",
    }
    for command, word in shown.items():
        done = richkd(tmp_path, command, COLUMNS=str(columns), TERM=term, NO_COLOR="1")
        assert done.returncode == 0, done
        assert re.search(rf"(?<![\w-]){word}(?!\w)", done.stdout.decode()), done.stdout.decode()
        check_quiet(done)


def test_a_table_without_room_is_lines_and_cuts_no_number(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("resnet8 by kd", "1280", "71.25"), ("a longer name by richkd", "64", "")]
    for columns in (20, 30, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        Report().table("students", ("run", "features", "top-1"), rows)
        out = capfd.readouterr().out
        assert all(len(line) <= columns for line in out.splitlines())
        for word in ("1280", "71.25", "64", "features", "top-1"):
            assert re.search(rf"(?<!\d){word}(?!\d)", out), out
        assert ("  features: 1280" in out) == (columns == 20)


# --- folders -------------------------------------------------------------------------------------


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Images in a folder whose names have spaces, accents and what is no letter."""
    root = tmp_path / "mes photos é 日本 😀 [1]"
    for split, count in (("train", 6), ("val", 2)):
        for name in ("chat é", "犬 [red]"):
            for number in range(count):
                path = root / split / name / f"{number} ü.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), (number, 0, 0)).save(path)
    return root


@pytest.mark.parametrize("home", ["~", "~/", "~/deep/er"])
def test_the_home_folder_is_where_tilde_says(
    home: str,
    run: Callable[..., Any],
    photographs: Path,
    tmp_path: Path,
    shapes_teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from richkd.config.settings import Distill, Precompute, Sweep, TrainTeacher

    own = home.rstrip("/")
    whole = str(tmp_path / own[2:]) if own[2:] else str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    one = Precompute(
        dataset=f"imagefolder:{own}/x",
        teacher_weights=f"{own}/w",
        clip=f"{own}/c",
        class_names=f"{own}/n",
        data_root=own,
        out=f"{own}/s.zarr",
        prompts=f"{own}/p",
    )
    assert one.dataset == f"imagefolder:{whole}/x" and one.data_root == whole
    assert (one.teacher_weights, one.clip, one.class_names, one.prompts, one.out) == tuple(
        f"{whole}/{name}" for name in ("w", "c", "n", "p", "s.zarr")
    )
    assert Distill(cache=f"{own}/s", out=f"{own}/r").cache == f"{whole}/s"
    assert TrainTeacher(dataset="shapes", out=f"{own}/w.safetensors").out.startswith(whole)
    assert Sweep(students=("resnet8",), out=own).out == whole
    assert Distill(cache="s3://b/~/s", dataset="imagefolder:a/~b").cache == "s3://b/~/s"
    assert Distill(cache="~no-such-user/s").cache == "~no-such-user/s"


def test_tilde_after_a_colon_and_an_equals_sign(
    run: Callable[..., Any],
    fails: Callable[..., str],
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    monkeypatch.setenv("HOME", str(tmp_path))
    done = run(
        "train-teacher",
        "--dataset",
        f"imagefolder:~/{photographs.name}",
        "--model",
        "resnet8",
        "--image-size",
        16,
        "--epochs",
        1,
        "--device",
        "cpu",
        "--out=~/w.safetensors",
    )
    assert done.code == 0, done.err
    assert (tmp_path / "w.safetensors").is_file() and not list(Path().iterdir())
    assert str(tmp_path / "none.zarr") in fails("inspect", "~/none.zarr")
    assert str(tmp_path / "none.zarr") in fails("distill", "--cache=~/none.zarr")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # there is no home
    assert fails("inspect", "~/none.zarr").code == "home-unknown"


def test_both_stages_among_strange_names(
    run: Callable[..., Any], photographs: Path, tmp_path: Path
) -> None:
    place = tmp_path / "où\nici 日本 [2]"
    place.mkdir()
    common = ("--dataset", f"imagefolder:{photographs}", "--image-size", 16, "--device", "cpu")
    weights, store, out = place / "t é.safetensors", place / "s é.zarr", place / "r é"
    teacher = run("train-teacher", *common, "--model", "resnet8", "--epochs", 1, "--out", weights)
    assert teacher.code == 0, teacher.err
    one = run(
        "precompute",
        *common,
        "--teacher",
        "resnet8",
        "--teacher-weights",
        weights,
        "--clip",
        "none",
        "--views",
        2,
        "--out",
        store,
    )
    assert one.code == 0, one.err
    two = run(
        "distill",
        "--cache",
        store,
        "--student",
        "resnet8",
        "--method",
        "kd",
        "--epochs",
        1,
        "--batch-size",
        4,
        "--device",
        "cpu",
        "--out",
        out,
    )
    assert two.code == 0, two.err
    assert (out / "summary.json").is_file()
    for command in (("inspect", store), ("verify", store), ("report", out, "--out", place)):
        done = run(*command)
        assert done.code == 0, done.err

"""What commands import: packages, for seconds differ from machine to machine.

benchmarks/start_up.py measures the seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from richkd.config.settings import Distill
from richkd.distill import distill

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
# Of what the project depends on, these are a few milliseconds each.
LIGHT = {"richkd", "typer", "rich", "filelock", "packaging", "google-crc32c", "tomli-w"}
# What comes with others and takes long; SymPy comes with PyTorch's compiler.
HIDDEN = {"sympy", "transformers", "pandas", "matplotlib", "scikit-learn"}
STORE = {"zarr", "numpy", "numcodecs"}
ALLOWED = {
    "--help": set(),
    "inspect": STORE,
    "verify": STORE | {"torch"},
    # counting of operations takes the compiler
    "report": {"torch", "sympy", "numpy", "safetensors", "plotly", "jinja2"},
    # so does the optimizer; timm's schedules bring all of timm, which brings torchvision
    "distill": STORE | {"torch", "sympy", "safetensors", "timm", "torchvision", "huggingface-hub"},
}

PROBE = """
import sys
def write() -> None:
    with open(sys.argv[1], "w") as file:
        file.write("\\n".join(sys.modules))
"""
TO_THE_END = f"""{PROBE}
from richkd.cli import execute
code = execute(sys.argv[2:])
write()
sys.exit(code)
"""
TO_THE_FIRST_STEP = f"""{PROBE}
import os
from torch.nn.modules.module import register_module_forward_pre_hook
def stop(module, _):
    if module.training:
        write()
        os._exit(0)
register_module_forward_pre_hook(stop)
from richkd.cli import execute
execute(sys.argv[2:])
sys.exit("no step was trained")
"""


def heavy() -> set[str]:
    """The packages that count: what the project depends on with every extra, but light ones."""
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    return {canonicalize_name(Requirement(line).name) for line in lines} - LIGHT | HIDDEN


def imported(tmp_path: Path, script: str, *words: object) -> set[str]:
    """The heavy packages that a fresh process has modules of, where the script ends."""
    found = tmp_path / "modules.txt"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(found), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    modules = {name.partition(".")[0] for name in found.read_text().split()}
    packages = packages_distributions()
    return heavy() & {canonicalize_name(each) for m in modules for each in packages.get(m, ())}


@pytest.fixture(scope="module")
def runs(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run."""
    folder = tmp_path_factory.mktemp("runs")
    settings: dict[str, Any] = {"student": "resnet8", "method": "kd", "epochs": 1, "device": "cpu"}
    distill(Distill(cache=str(store), out=str(folder / "kd"), **settings))
    return folder


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    assert imported(tmp_path, TO_THE_END, "--help") <= ALLOWED["--help"]


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_of_a_store(command: str, store: Path, tmp_path: Path) -> None:
    found = imported(tmp_path, TO_THE_END, command, store)
    assert found <= ALLOWED[command]
    more = f"import {'torch' if command == 'inspect' else 'timm'}\n{TO_THE_END}"
    assert not imported(tmp_path, more, command, store) <= ALLOWED[command]  # one is noticed


def test_of_a_report(runs: Path, tmp_path: Path) -> None:
    found = imported(tmp_path, TO_THE_END, "report", runs, "--out", tmp_path)
    assert found <= ALLOWED["report"]
    assert json.loads((tmp_path / "report.json").read_text())["leaderboard"]


@pytest.mark.parametrize("method", ["kd", "richkd"])
def test_of_a_first_step(method: str, store: Path, tmp_path: Path) -> None:
    words = f"--student resnet8 --method {method} --epochs 1 --device cpu --cache".split()
    command = ("distill", *words, store, "--out", tmp_path / "run")
    assert imported(tmp_path, TO_THE_FIRST_STEP, *command) <= ALLOWED["distill"]

"""Small real things that many tests share: a CLIP directory, teacher weights, a finished store."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from richkd.__main__ import prepare_threads

prepare_threads()  # as every command does, before PyTorch is loaded

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import Refusal, refusal, write_clip, write_teacher  # noqa: E402

from richkd.cli import execute  # noqa: E402
from richkd.config.settings import Precompute  # noqa: E402
from richkd.precompute import precompute  # noqa: E402


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="session")
def shapes_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from richkd.data.shapes import CLASS_NAMES

    path = tmp_path_factory.mktemp("teacher") / "resnet8.safetensors"
    return write_teacher(path, "resnet8", len(CLASS_NAMES))


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer held-out drawings: most tests do not care how many there are."""
    monkeypatch.setattr("richkd.data.datasets.SHAPES_TEST", 40)


@pytest.fixture(scope="session")
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def own_home(session_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What richkd keeps for the user is kept here."""
    monkeypatch.setenv("RICHKD_HOME", str(session_home))
    return session_home


@pytest.fixture(scope="session")
def make_store(
    tmp_path_factory: pytest.TempPathFactory, clip_dir: Path, shapes_teacher: Path
) -> Callable[..., Path]:
    """A function that writes a small store of `shapes`; settings as of Precompute, and `block`."""

    def make(block: int | None = None, **settings: Any) -> Path:
        given: dict[str, Any] = {
            "dataset": "shapes",
            "limit": 48,
            "teacher": "resnet8",
            "views": 3,
            "teacher_weights": str(shapes_teacher),
            "clip": str(clip_dir),
            "device": "cpu",
            "out": str(tmp_path_factory.mktemp("store") / "shapes.zarr"),
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("richkd.data.datasets.SHAPES_TEST", 40)
            return precompute(Precompute(**{**given, **settings}), block=block).path

    return make


@pytest.fixture(scope="session")
def store(make_store: Callable[..., Path]) -> Path:
    """A finished store that no test changes."""
    return make_store()


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command of richkd in this process."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = execute([*map(str, arguments)])
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture
def fails(run: Callable[..., Outcome]) -> Callable[..., Refusal]:
    """Run a command that must fail as the user's mistake; its one line on standard error."""

    def fails(*arguments: object) -> Refusal:
        outcome = run(*arguments)
        assert outcome.code == 2, outcome
        assert "Traceback" not in outcome.err
        return refusal(outcome.err)

    return fails


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random input in every run; the seed is shown where a test fails."""
    seed = int(os.environ.get("RICHKD_TEST_SEED") or np.random.SeedSequence().entropy % 2**32)
    print(f"RICHKD_TEST_SEED={seed}")
    torch.manual_seed(seed)
    return np.random.default_rng(seed)

"""What many tests share: a CLIP directory, teacher weights, a complete cache, commands."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chromium
import pytest
from forked import Forks, Outcome
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from richkd.__main__ import prepare_threads
from richkd.config.catalog import DEBIAN_FASHION_MNIST
from richkd.core.cpus import usable_cpus

if TYPE_CHECKING:  # PyTorch is not loaded in the process that only distributes the tests
    import numpy as np
    from helpers import Refusal

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # there are as many workers as CPUs
prepare_threads()  # as every command does, before PyTorch is loaded

for profile, examples in (("short", 20), ("long", 400)):  # --hypothesis-profile=long
    hypothesis_settings.register_profile(
        profile,
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.filter_too_much,
        ],
    )
hypothesis_settings.load_profile("short")

NEEDS = {
    "root": (lambda: os.geteuid() == 0, "only root may mount a file system"),
    "browser": (lambda: chromium.find() is not None, "Chromium is not on the PATH"),
    "real_data": (
        lambda: Path(DEBIAN_FASHION_MNIST).is_dir(),
        "Fashion-MNIST is missing (Debian's package dataset-fashion-mnist)",
    ),
}


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run all tests on up to four CPUs, and tests that are named in this process."""
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(usable_cpus(), 4) if everything else 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, (available, reason) in NEEDS.items():
        if item.get_closest_marker(marker) and not available():
            (pytest.fail if "RICHKD_TEST_ALL" in os.environ else pytest.skip)(reason)


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers import write_clip

    return write_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="session")
def shapes_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers import write_teacher

    from richkd.data.shapes import CLASS_NAMES

    path = tmp_path_factory.mktemp("teacher") / "resnet8.safetensors"
    return write_teacher(path, "resnet8", len(CLASS_NAMES))


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw fewer test images: most tests do not depend on their number."""
    monkeypatch.setattr("richkd.data.datasets.SHAPES_TEST", 40)


@pytest.fixture(scope="session")
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def own_home(session_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep richkd's files of the user here."""
    monkeypatch.setenv("RICHKD_HOME", str(session_home))
    return session_home


@pytest.fixture(scope="session")
def make_store(
    tmp_path_factory: pytest.TempPathFactory, clip_dir: Path, shapes_teacher: Path
) -> Callable[..., Path]:
    """Write a small cache of `shapes`; settings as of Precompute, and `block`."""
    from richkd.config.settings import Precompute
    from richkd.precompute import precompute

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
    """A complete cache that no test changes."""
    return make_store()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Run commands and scripts in processes of their own, which start at once."""
    with Forks() as forks:
        yield forks


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command of richkd in this process."""

    from richkd.cli import execute

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = execute([*map(str, arguments)])
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture
def fails(run: Callable[..., Outcome]) -> Callable[..., Refusal]:
    """Run a command that must fail with exit code 2; return the error that it prints."""

    from helpers import refusal

    def fails(*arguments: object) -> Refusal:
        outcome = run(*arguments)
        assert outcome.code == 2, outcome
        assert "Traceback" not in outcome.err
        return refusal(outcome.err)

    return fails


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a generator with a new seed, which pytest shows if the test fails."""
    import numpy as np
    import torch

    seed = int(os.environ.get("RICHKD_TEST_SEED") or np.random.SeedSequence().entropy % 2**32)
    print(f"RICHKD_TEST_SEED={seed}")
    torch.manual_seed(seed)
    return np.random.default_rng(seed)

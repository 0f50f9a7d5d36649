"""What richkd says of bfloat16 on a CPU that has it; the default stays f32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distill import same, train, weights

from richkd.config.settings import Distill
from richkd.models import create_model
from richkd.training import precision
from richkd.training.device import has_bfloat16
from richkd.training.precision import StepTimes, advice, is_open, time_precisions

CPU = torch.device("cpu")


def test_timing_leaves_the_network_and_the_random_numbers() -> None:
    model = create_model("resnet8", 10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    times = time_precisions(model, torch.zeros(4, 3, 32, 32))
    assert times.float32 > 0 and times.bfloat16 > 0
    assert same(before, dict(model.state_dict()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_only_what_saves_is_told() -> None:
    assert advice({}) == advice({"a": StepTimes(1.0, 0.95)}) == ""
    line = advice({"resnet20": StepTimes(0.23, 0.16), "vgg8": StepTimes(0.5, 0.6)})
    assert "resnet20 0.16 s per step instead of 0.23 s (--precision bfloat16)" in line
    assert "vgg8" not in line


@pytest.mark.parametrize("there", [False, True])
def test_where_the_choice_is_open(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda _: there)
    settings = Distill(cache="none")
    assert is_open(settings, CPU, 10_000) is there
    assert not is_open(settings, CPU, 10)
    assert not is_open(settings, torch.device("cuda"), 10_000)
    for chosen in ("float32", "bfloat16"):
        assert not is_open(Distill(cache="none", precision=chosen), CPU, 10_000)


def test_the_units_are_those_that_the_processor_names() -> None:
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.is_file() else set()
    if "avx2" not in flags:
        pytest.skip("this system does not tell what an x86-64 processor has")
    assert has_bfloat16(CPU) == bool(flags & {"avx512_bf16", "amx_bf16"})


def test_distill_sweep_and_doctor_tell(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]
) -> None:
    plain = train(store, tmp_path / "plain", method="kd")
    for module in ("richkd.training.precision", "richkd.training.device"):
        monkeypatch.setattr(f"{module}.has_bfloat16", lambda device: device.type == "cpu")
    for module in ("training.student", "sweep.cost"):
        monkeypatch.setattr(f"richkd.{module}.is_open", partial(is_open, long=1))
        monkeypatch.setattr(f"richkd.{module}.time_precisions", lambda *_: StepTimes(0.4, 0.1))
    monkeypatch.setattr("richkd.training.precision.time_precisions", lambda *_: StepTimes(0.4, 0.1))
    common = ["--cache", store, "--epochs", 2, "--batch-size", 16, "--lr", 0.02, "--device", "cpu"]
    told = "resnet8 0.1 s per step instead of 0.4 s (--precision bfloat16)"
    done = run(
        "distill", *common, "--student", "resnet8", "--method", "kd", "--out", tmp_path / "a"
    )
    assert done.code == 0 and told in done.err
    assert same(weights(tmp_path / "a"), weights(tmp_path / "plain")), plain
    done = run(
        "sweep",
        *common,
        "--students",
        "resnet8",
        "--methods",
        "kd",
        "--seeds",
        2,
        "--out",
        tmp_path / "runs",
        "--dry-run",
    )
    assert done.code == 0 and done.err.count(told) == 1
    done = run("doctor", "--json")
    assert "resnet20 takes 0.25 of" in done.out

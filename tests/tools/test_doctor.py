"""`richkd doctor` names what a machine lacks, and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import refuses

from richkd.core.progress import Report
from richkd.tools import doctor

Run = Callable[..., Any]


@pytest.mark.slow
def test_a_machine_that_has_everything(run: Run, tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    done = run("doctor", "--data-root", tmp_path, "--json")
    assert done.code == 0, done.err
    found = {row["what"]: row for rows in done.json.values() for row in rows}
    assert found["cifar100"]["found"] == f"in {tmp_path / 'cifar-100-python'}"
    assert "cifar-10-python.tar.gz" in found["cifar10"]["remedy"]
    for name in ("torch", "zarr", "open-clip-torch", "richkd export"):
        assert found[name]["remedy"] == "", found[name]
    assert "cores" in found["cpu"]["found"] and "free" in found["students: runs/"]["found"]


def test_what_is_missing_or_too_old_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = ["torch>=2.6", "zarr>=99", "no-such-package>=1", "onnx>=1; extra == 'onnx'"]
    findings = {
        "packages": list(doctor.packages(wanted)),
        "for some commands": list(doctor.extras({"onnx": ("richkd export", "no_such_module")})),
    }
    with refuses("doctor-missing", "zarr", ">=99", "pip install 'zarr>=99'"):
        doctor.raise_missing(findings)
    monkeypatch.setenv("COLUMNS", "80")
    doctor.show(findings, Report())
    out = capfd.readouterr().out
    for name in ("zarr>=99", "no-such-package>=1", "richkd[onnx]"):
        assert f"pip install '{name}'" in " ".join(out.split())
    assert "onnx>=1" not in out
    assert max(map(len, out.splitlines())) <= 80
    rows = doctor.as_json(findings)["packages"]
    assert [row["found"] for row in rows if row["what"] == "no-such-package"] == ["not installed"]


def test_a_home_with_a_long_path_is_shown_whole(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("RICHKD_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "on a share of the institute" / "people" / "someone"))
    done = run("doctor", "--data-root", tmp_path / ("somewhere-" * 6))
    assert "…" not in done.out and max(map(len, done.out.splitlines())) <= 80
    assert "caches: cache/ " in " ".join(done.out.split()) and "someone/.cache/" in done.out
    assert "somewhere-" * 6 in "".join(done.out.split())

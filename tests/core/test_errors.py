"""Errors: a line for people and a code for programs."""

from __future__ import annotations

import ast
import pickle
import re
from pathlib import Path

from richkd.core.errors import RichKDError, unknown
from richkd.core.validation import CHOICE, RANGE, TYPE

KEBAB = r"[a-z]+(-[a-z]+)*"
# where one raise serves several kinds of settings or folders, each with a code of its own
CODES_FROM_TABLES = {"validation.py", "run_folder.py", "pretrained.py", "matching.py"}
SOURCES = sorted((Path(__file__).parents[2] / "richkd").rglob("*.py"))


def test_an_error_survives_another_process() -> None:
    error = pickle.loads(pickle.dumps(RichKDError("no  cache\nat x", code="cache-missing")))
    assert (str(error), error.code) == ("no cache at x", "cache-missing")


def test_every_error_has_a_code_that_is_written_out() -> None:
    calls = [
        (path, node)
        for path in SOURCES
        if path.name != "validation.py"  # its codes are the constants below
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "RichKDError"
    ]
    assert len(calls) > 200
    for path, call in calls:
        if path.name in CODES_FROM_TABLES:
            continue
        code = next((word.value for word in call.keywords if word.arg == "code"), None)
        assert isinstance(code, ast.Constant), f"{path}:{call.lineno}"
        assert re.fullmatch(KEBAB, code.value), code.value
    assert all(re.fullmatch(KEBAB, code) for code in (TYPE, RANGE, CHOICE))


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    error = unknown("method", "kkd", ["kd", "crd", "dkd"])
    assert error.code == "unknown-name" and "kkd" in str(error) and "dkd" in str(error)

"""`richkd bench`, small: what it times is the same computation, and what it prints is complete."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import richkd.tools.bench
from richkd.core.progress import Report
from richkd.losses import CRDLoss
from richkd.tools.bench import Sizes, VectorCRD, paired, ratio

Run = Callable[..., Any]
SMALL = Sizes(
    student="resnet8",
    teacher="resnet14",
    batch_size=16,
    num_samples=300,
    num_classes=5,
    negatives=64,
    rounds=2,
    steps=1,
    stage_one=24,
    streamed=96,
)
RATIOS = {
    "logits_step_over_vanilla",
    "full_step_over_vanilla",
    "full_step_over_published",
    "logits_step_over_in_loop",
    "crd_scores_over_vectors",
    "crd_shared_over_vectors",
    "crd_bank_over_vectors",
    "precompute_over_forward",
    "streamed_over_memory",
    "slab_wait_share",
    "store_over_raw",
    "fast_step_over_vanilla",
    "fast_full_step_over_published",
    "together_over_apart",
}


def test_vectors_and_scores_give_the_same_numbers(rng: np.random.Generator) -> None:
    labels = torch.from_numpy(rng.integers(0, 4, 50))
    torch.manual_seed(0)
    scores = CRDLoss(50, 16, 20, labels=labels)
    torch.manual_seed(0)
    vectors = VectorCRD(50, 16, 20, labels=labels)
    for _ in range(3):
        index = torch.from_numpy(rng.permutation(50)[:8])
        negatives = scores.draw_negatives(index)
        inputs = [torch.nn.functional.normalize(torch.randn(8, 16), dim=1) for _ in range(2)]
        results = []
        for loss in (scores, vectors):
            sides = [x.clone().requires_grad_() for x in inputs]
            value = loss(*sides, index, negatives)
            value.backward()
            loss.update()
            results.append((value.detach(), *(side.grad for side in sides), loss.student_bank))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_published_draws_are_of_other_classes_and_never_twice(monkeypatch: Any) -> None:
    labels = torch.arange(40) % 4
    loss = VectorCRD(40, 8, 25, labels=labels)
    loss.numpy_draws = [np.flatnonzero(labels.numpy() != k) for k in range(4)]
    index, seen = torch.arange(6), []
    stack = np.stack
    monkeypatch.setattr(np, "stack", lambda rows: seen.append(stack(rows)) or seen[-1])
    x = torch.nn.functional.normalize(torch.randn(6, 8), dim=1)
    assert torch.isfinite(loss(x, x, index))
    for sample, row in zip(index.tolist(), seen[0], strict=True):
        assert len(set(row)) == 25 and (labels[row] != labels[sample]).all()


def test_measures_alternate_and_ratios_are_of_rounds() -> None:
    calls: list[str] = []
    times = paired(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        3,
        torch.device("cpu"),
        Report(quiet=True),
    )
    assert "".join(calls) == "abababab"  # a round to warm up, then three
    paired({"c": lambda: calls.append("c")}, 2, torch.device("cpu"), Report(quiet=True), warm=True)
    assert calls[8:] == ["c", "c"]
    assert len(times["a"]) == len(times["b"]) == 3
    assert ratio({"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 1.0]}, "a", "b") == 2.0


@pytest.mark.slow
def test_the_command(
    run: Run, monkeypatch: pytest.MonkeyPatch, store: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(richkd.tools.bench, "QUICK", SMALL)
    result = run("bench", "--quick", "--cache", store, "--json")
    assert result.code == 0, result.err
    content = json.loads(result.out)
    assert content["ratios"].keys() == RATIOS
    assert all(math.isfinite(value) and value >= 0 for value in content["ratios"].values())
    assert content["versions"]["torch"] and content["hardware"] and content["threads"] >= 1
    for entry in content["seconds"].values():
        assert len(entry["rounds"]) >= 2 and entry["median"] > 0
    table = content["bytes"]
    assert table["raw f16"]["over_raw"] == pytest.approx(1, abs=0.2)
    errors = [table[f"zstd 3, bit shuffle, {bits} bits"]["kl"] for bits in (9, 8, 7, 6, 5)]
    assert errors == sorted(errors) and table["zstd 3"]["kl"] == 0
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("COLUMNS", "80")
    printed = run("bench", "--quick", "--cache", store)
    assert "full_step_over_vanilla" in printed.out
    assert max(map(len, printed.out.splitlines())) <= 80

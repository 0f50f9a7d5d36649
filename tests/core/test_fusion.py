"""The blend against a float64 reading of the method."""

import numpy as np
import pytest
import torch
from helpers import refuses

from richkd.core import fusion


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


@pytest.mark.parametrize("prompts", [None, [2], [0, 3, 1]])
def test_class_embeddings(rng: np.random.Generator, prompts: list[int] | None) -> None:
    embeddings = unit(rng.normal(size=(7, 4, 16)))
    chosen = embeddings if prompts is None else embeddings[:, prompts]
    expected = unit(chosen.sum(1) / chosen.shape[1])
    got = fusion.class_embeddings(torch.from_numpy(embeddings).float(), prompts)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("prompts", [[], [4], [-1], [1, 1]])
def test_class_embeddings_of_wrong_prompts(prompts: list[int]) -> None:
    with refuses("prompts-out-of-range", 3):
        fusion.class_embeddings(torch.randn(2, 4, 8), prompts)


@pytest.mark.parametrize(("scale", "number"), [("native", 87.5), ("raw", 1.0), (12.25, 12.25)])
def test_fused_logits(rng: np.random.Generator, scale: str | float, number: float) -> None:
    teacher = rng.normal(size=(9, 5)) * 10
    images, classes = unit(rng.normal(size=(9, 16))), unit(rng.normal(size=(5, 16)))
    expected = 0.3 * teacher + 0.7 * number * (images @ classes.T)
    similarity = fusion.clip_similarity(torch.from_numpy(images), torch.from_numpy(classes))
    got = fusion.fuse_logits(
        torch.from_numpy(teacher), similarity, 0.3, fusion.resolve_scale(scale, 87.5)
    )
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scale", "bias"), [("native", -12.5), ("raw", 0.0), (87.5, 0.0)])
def test_the_bias_of_siglip_goes_with_its_own_scale(
    rng: np.random.Generator, scale: str | float, bias: float
) -> None:
    teacher, cosines = rng.normal(size=(9, 5)) * 10, rng.uniform(-0.1, 0.3, (9, 5))
    rows = torch.from_numpy(teacher), torch.from_numpy(cosines)
    number = fusion.resolve_scale(scale, 112.0)
    assert fusion.resolve_bias(scale, -12.5) == bias and fusion.resolve_bias(scale, None) == 0
    own = number * cosines + bias
    np.testing.assert_allclose(fusion.clip_logits(rows[1], number, bias).numpy(), own, atol=1e-4)
    got, expected = fusion.fuse_logits(*rows, 0.3, number, bias), 0.3 * teacher + 0.7 * own
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-4)


def test_fused_features(rng: np.random.Generator) -> None:
    teacher, clip = unit(rng.normal(size=(6, 8))), unit(rng.normal(size=(6, 8)))
    got = fusion.fuse_features(torch.from_numpy(teacher), torch.from_numpy(clip), 0.7)
    np.testing.assert_allclose(got.numpy(), unit(0.7 * teacher + 0.3 * clip), atol=1e-12)
    only = fusion.fuse_features(torch.from_numpy(teacher), torch.from_numpy(clip), 1.0)
    np.testing.assert_allclose(only.numpy(), teacher, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), "big"])
def test_bad_scale(scale: float | str) -> None:
    with refuses("unknown-name" if scale == "big" else "value-out-of-range", "scale", scale):
        fusion.resolve_scale(scale, 100.0)

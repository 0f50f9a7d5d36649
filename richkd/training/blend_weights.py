"""Choose the weights of several teachers in a blend by their likelihood on held-out samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from richkd.core.errors import RichKDError

MOST = 8.0  # a coefficient; it would grow without bound where a teacher makes no mistake
TOLERANCE = 1e-9  # nats per unit of a coefficient


def likeliest(logits: Sequence[Tensor], labels: Tensor) -> tuple[tuple[float, ...], float, float]:
    """Return weights and scale of the blend of the highest likelihood, and its NLL in nats.

    The coefficients c_k in [0, 8] minimise the cross-entropy of Σ_k c_k·z_k with the labels, which
    is convex in them: there is one minimum, and the result does not depend on a start or a grid.
    The weights are c_k / Σ c, and the scale of the whole blend is Σ c: one over the temperature
    that calibrates it. All arithmetic is in float64.

    Args:
        logits: of each teacher, [N,C], balanced (see `fusion.balance`).
        labels: [N], of samples on which no teacher was trained.

    Raises:
        RichKDError: no blend of the teachers predicts the labels better than chance.
    """
    from scipy.optimize import minimize

    teachers = torch.stack([own.double() for own in logits])  # [K,N,C]
    true = teachers.gather(2, labels.expand(len(teachers), -1)[:, :, None])[:, :, 0].mean(1)

    def nll(coefficients: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Return the cross-entropy, and its gradient by coefficient."""
        c = torch.from_numpy(coefficients)
        blend = torch.tensordot(c, teachers, dims=1)  # [N,C]
        expected = (teachers * blend.softmax(1)).sum(2).mean(1)
        value = blend.logsumexp(1).mean() - c @ true
        return value.item(), (expected - true).numpy()

    found = minimize(
        nll,
        np.full(len(teachers), 1 / len(teachers)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, MOST)] * len(teachers),
        options={"ftol": 0, "gtol": TOLERANCE, "maxiter": 1000},
    )
    scale = float(found.x.sum())
    if not scale > 0:
        raise RichKDError(
            f"no blend of the {len(teachers)} teachers predicts the labels of the {len(labels)} "
            f"held-out samples better than chance, so that weights 'auto' has nothing to choose "
            f"by; give the weights as numbers",
            code="weights-auto-without-information",
        )
    return tuple((found.x / scale).tolist()), scale, float(found.fun)

"""The share of a Gram matrix's own diagonal that stands for rows that were not seen, held against its formula."""

from __future__ import annotations

import pytest
import torch

from fxprune.calibration.solvers.problem import shrinkage


def test_shrinkage_is_its_formula() -> None:
    """Two inputs correlate by r, whose variance is (1 + r^2) / rows; two do not vary, and do not count."""
    r, rows = 0.8, 200
    gram = torch.diag(torch.tensor([4.0, 25.0, 0.0, 0.0], dtype=torch.float64))
    gram[0, 1] = gram[1, 0] = r * 2 * 5
    assert float(shrinkage(gram[None], rows)) == pytest.approx((1 + r**2) / (rows * r**2))

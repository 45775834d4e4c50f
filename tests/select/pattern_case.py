"""What the tests of sparsity patterns share: seeded weights, and that an error has its four parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxprune.errors import FxPruneError


def refused(kind: type[FxPruneError], make: Callable[[], object], *words: str) -> None:
    with pytest.raises(kind) as error:
        make()
    assert error.value.what and error.value.where and error.value.why and error.value.do
    for word in words:
        assert word in str(error.value), str(error.value)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

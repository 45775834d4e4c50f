"""moments: what is kept of the inputs and outputs of a weight, summed over all batches."""

from __future__ import annotations

import torch
from torch import Tensor

# Above this many inputs a Gram matrix is kept in float32, for its size.
_WIDE = 8192


class Inputs:
    """Rows of inputs x [g, rows, n], of which many batches are summed: their number, mean and Gram matrix.

    Products are of float32 and are summed in float64. They are taken about the first batch's mean where `centred`, for
    a mean that is large beside the spread takes all digits otherwise.
    """

    def __init__(self, *, centred: bool) -> None:
        self.centred = centred
        self.count = 0
        self.reference: Tensor | None = None
        self.total: Tensor | None = None
        self.gram: Tensor | None = None

    def add(self, x: Tensor) -> Tensor:
        """Sums one batch up, x [g, rows, n]; answers its rows about the reference."""
        x = x if x.dtype is torch.float64 else x.float()
        # A first batch without rows says nothing about the mean.
        if self.reference is None or (not self.count and x.shape[1]):
            wide = x.dtype if x.shape[-1] > _WIDE else torch.float64
            groups, rows, columns = x.shape
            mean = x.double().mean(1) if self.centred and rows else x.new_zeros(groups, columns, dtype=torch.float64)
            self.reference = mean.to(x.dtype)
            self.total = torch.zeros_like(mean)
            self.gram = x.new_zeros(groups, columns, columns, dtype=wide)
        assert self.total is not None and self.gram is not None
        x = x - self.reference.unsqueeze(1) if self.centred else x
        self.count += x.shape[1]
        self.total += x.sum(1, dtype=torch.float64)
        self.gram += x.mT @ x
        return x

    @property
    def mean(self) -> Tensor:
        """The mean of each input [g, n], float64."""
        assert self.total is not None and self.reference is not None
        return self.reference.double() + self.total / max(1, self.count)

    def centred_gram(self) -> Tensor:
        """The Gram matrix [g, n, n] about the mean where `centred`, about zero otherwise."""
        assert self.total is not None and self.gram is not None
        if not self.centred:
            return self.gram
        off = self.total / max(1, self.count)
        return self.gram - (self.count * off.unsqueeze(-1) * off.unsqueeze(-2)).to(self.gram.dtype)


class Outputs:
    """Rows of wanted outputs y [g, rows, r] beside the rows of inputs: mean, products with the inputs, and variance."""

    def __init__(self) -> None:
        self.rows = 0
        self.reference: Tensor | None = None
        self.total: Tensor | None = None
        self.cross: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, y: Tensor, x: Tensor, inputs: Inputs) -> None:
        """Sums one batch up: y [g, rows, r], and x as `inputs.add` answered it."""
        y = y.to(x.dtype)
        if self.reference is None or (not self.rows and y.shape[1]):
            groups, rows, outputs = y.shape
            mean = y.double().mean(1) if inputs.centred and rows else y.new_zeros(groups, outputs, dtype=torch.float64)
            self.reference = mean.to(y.dtype)
            self.total, self.squares = torch.zeros_like(mean), torch.zeros_like(mean)
            assert inputs.gram is not None
            self.cross = y.new_zeros(groups, outputs, x.shape[-1], dtype=inputs.gram.dtype)
        assert self.total is not None and self.cross is not None and self.squares is not None
        y = y - self.reference.unsqueeze(1)
        self.rows += y.shape[1]
        self.total += y.sum(1, dtype=torch.float64)
        self.squares += y.square().sum(1, dtype=torch.float64)
        self.cross += y.mT @ x

    def mean(self, inputs: Inputs) -> Tensor:
        """The mean of each output [g, r], float64."""
        assert self.total is not None and self.reference is not None
        return self.reference.double() + self.total / max(1, inputs.count)

    def centred_cross(self, inputs: Inputs) -> Tensor:
        """Products of outputs and inputs [g, r, n], about the means where the inputs are centred."""
        assert self.total is not None and self.cross is not None and inputs.total is not None
        if not inputs.centred:
            return self.cross
        off = self.total.unsqueeze(-1) * (inputs.total / max(1, inputs.count)).unsqueeze(-2)
        return self.cross - off.to(self.cross.dtype)

    def centred_squares(self, inputs: Inputs) -> Tensor:
        """Sums of squares [g, r], about the mean where the inputs are centred, float64."""
        assert self.total is not None and self.squares is not None
        if not inputs.centred:
            return self.squares
        return self.squares - self.total.square() / max(1, inputs.count)

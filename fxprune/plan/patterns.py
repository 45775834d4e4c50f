"""Sparsity patterns: what leaves a weight, and how much of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxprune.errors import PlanError

from .channels import Channels
from .matrix import matrix_shape
from .scores import SCORE_NAMES, Scores, score_name
from .values import check_score, read_amount, read_norm, read_switch, read_whole

# The largest group of an N:M pattern: what kernels and their 4-bit indices hold.
_LARGEST_GROUP = 16


@dataclass(frozen=True)
class Unstructured:
    """Mask the elements with the smallest scores.

    `amount` is a fraction of the whole weight (float, 0.0 to 1.0) or a number of elements (int): 1.0 is
    everything, 1 is one element. Elements that are masked already are the first to count towards it. `score` is

    "l1", "l2"  the magnitude, in which zeros count first; one number's L2 norm is its L1 norm, so the two are one
    "random"    drawn anew for each selection from torch's generator: torch.manual_seed decides
    "lamp"      the square over the sum of those not smaller, for scope="global"
    a function  from the weight to finite non-negative scores of the same shape
    Scores      computed beforehand, such as those of `fxprune.gradient_score`: taylor, snip, fisher

    `fxprune.select.score` has the formulas and papers. All but "l1" and "l2" hold the scores of all pooled weights at
    once.

    With `per_row` every output (row of the weight's matrix, `fxprune.plan.matrix`) loses equally many of its inputs.
    The amount is still of the whole weight; where it does not divide, the first rows lose one more.
    """

    amount: int | float
    score: str | Callable[[Tensor], Tensor] | Scores = "l1"
    per_row: bool = False

    kind: ClassVar[str] = "unstructured"

    def __post_init__(self) -> None:
        object.__setattr__(self, "amount", read_amount(self.amount, "Unstructured", "to 1.0", "elements"))
        check_score(self.score, "Unstructured", SCORE_NAMES)
        read_switch(self.per_row, "Unstructured(per_row=...)", "per_row")

    def count(self, size: int) -> int:
        """How many of `size` elements to mask: fractions round half to even, as in torch.nn.utils.prune."""
        return self.amount if isinstance(self.amount, int) else round(self.amount * size)

    def misfit(self, shape: Sequence[int], inputs: int = 1) -> str:
        """Why a weight of `shape` cannot take this pattern: never."""
        return ""

    def describe(self) -> str:
        """The amount and score in words."""
        amount = f"{self.amount} elements" if isinstance(self.amount, int) else f"{100 * self.amount:g}%"
        return f"{amount} by {score_name(self.score)}" + (", every row alike" if self.per_row else "")


@dataclass(frozen=True)
class SemiStructured:
    """Keep `n` of every `m` neighbouring inputs of each output, those with the highest scores: N:M sparsity.

    1 <= n < m <= 16; 2:4 is what GPUs have instructions for. The groups lie in the rows of the weight's matrix
    (`fxprune.plan.matrix`): a convolution's along its input channels, at every position of the kernel. `score` is as in
    `Unstructured`.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021.
    """

    n: int = 2
    m: int = 4
    score: str | Callable[[Tensor], Tensor] | Scores = "l1"

    kind: ClassVar[str] = "semistructured"

    def __post_init__(self) -> None:
        object.__setattr__(self, "m", read_whole(self.m, "SemiStructured(m=...)", "m", 2, _LARGEST_GROUP))
        object.__setattr__(self, "n", read_whole(self.n, "SemiStructured(n=...)", "n", 1))
        if self.n >= self.m:
            raise PlanError(
                f"cannot use n {self.n}",
                where=f"SemiStructured(n=..., m={self.m})",
                why=f"{self.n} of every {self.m} is everything",
                do=f"Give n from 1 to {self.m - 1}: so many of every {self.m} stay.",
            )
        check_score(self.score, "SemiStructured", SCORE_NAMES)

    def misfit(self, shape: Sequence[int], inputs: int = 1) -> str:
        """Why a weight of `shape`, summed over in dimension `inputs`, cannot take this pattern; "" if it can."""
        return _no_multiple(shape[inputs], "inputs", self.m)

    def describe(self) -> str:
        """The pattern and score in words."""
        return f"{self.n}:{self.m} by {score_name(self.score)}"


@dataclass(frozen=True)
class Blocks:
    """Mask whole tiles [r, c] of the weight's matrix (`fxprune.plan.matrix`), those with the smallest norms of scores.

    amount  fraction of the tiles (float, 0.0 to 1.0), or their number (int)
    shape   (r, c), outputs and inputs of a tile. 32x32 fits most weights, and feeds matrix instructions; 64x64 runs
            faster, 16x16 hurts less
    norm    p of the Lp norm of the scores in a tile: positive, or inf
    score   of the elements, as in `Unstructured`

    The tiles of a convolution lie in its output and input channels, at every position of the kernel.

    Source: Narang et al., "Block-Sparse Recurrent Neural Networks", 2017; Gray et al., "GPU Kernels for Block-Sparse
    Weights", 2017.
    """

    amount: int | float
    shape: tuple[int, int] = (32, 32)
    norm: float = 2.0
    score: str | Callable[[Tensor], Tensor] | Scores = "l1"

    kind: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        object.__setattr__(self, "amount", read_amount(self.amount, "Blocks", "to 1.0", "tiles"))
        shape: object = self.shape
        if not isinstance(shape, (tuple, list)) or len(shape) != 2:
            raise PlanError(
                f"cannot use shape {self.shape!r}",
                where="Blocks(shape=...)",
                why="a tile has two sides, outputs and inputs",
                do="Give two whole numbers, such as (32, 32).",
            )
        sides = [read_whole(side, "Blocks(shape=...)", "side", 1) for side in shape]
        object.__setattr__(self, "shape", tuple(sides))
        object.__setattr__(self, "norm", read_norm(self.norm, "Blocks"))
        check_score(self.score, "Blocks", SCORE_NAMES)

    def count(self, size: int) -> int:
        """How many of `size` tiles to mask: fractions round half to even."""
        return self.amount if isinstance(self.amount, int) else round(self.amount * size)

    def tiles(self, shape: Sequence[int], inputs: int = 1) -> int:
        """How many tiles a weight of `shape` has that is no misfit."""
        return math.prod(matrix_shape(shape, inputs)) // math.prod(self.shape)

    def misfit(self, shape: Sequence[int], inputs: int = 1) -> str:
        """Why a weight of `shape`, summed over in dimension `inputs`, cannot take this pattern; "" if it can."""
        rows, columns = self.shape
        wrong = _no_multiple(matrix_shape(shape, inputs)[0], "outputs", rows)
        return wrong or _no_multiple(shape[inputs], "inputs", columns)

    def describe(self) -> str:
        """The amount, tile and score in words."""
        tile = f"{self.shape[0]}x{self.shape[1]} tiles"
        amount = f"{self.amount} {tile}" if isinstance(self.amount, int) else f"{100 * self.amount:g}% of {tile}"
        score = score_name(self.score)
        return f"{amount} by L{self.norm:g} norm" + ("" if score in ("l1", "l2") else f" of {score}")


@dataclass(frozen=True)
class Existing:
    """Keep the mask that a weight already has, or, where it has none, its exact zeros as the mask."""

    kind: ClassVar[str] = "existing"

    def describe(self) -> str:
        """What is kept, in words."""
        return "the masks or zeros already there"


Sparsity = Unstructured | SemiStructured | Blocks | Existing | Channels
SPARSITIES: dict[str, type[Sparsity]] = {
    kind.kind: kind for kind in (Unstructured, SemiStructured, Blocks, Existing, Channels)
}


def _no_multiple(size: int, noun: str, of: int) -> str:
    return f"its {size} {noun} are no multiple of {of}" if size % of else ""


__all__ = ["SPARSITIES", "Blocks", "Channels", "Existing", "SemiStructured", "Sparsity", "Unstructured"]

"""The decision: what leaves, what is masked, which values are new, and how calibration came to it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxprune.errors import InputError
from fxprune.graph.note import Note

from .mask import PackedMask


@dataclass(frozen=True)
class Fit:
    """What became of one weight in calibration.

    method  the solver, or "magnitude" where none could be used
    error   the squared difference of its outputs from what they should be, over their variance; NaN where unknown
    rows    how many rows of inputs (tokens, places of an image) it was fitted on
    note    what went otherwise than asked, in words
    """

    method: str
    error: float = float("nan")
    rows: int = 0
    note: str = ""


@dataclass(frozen=True)
class Recovery:
    """What `recover` did: steps taken, seconds spent, and the loss on data it did not train on, before and after.

    `note` is what went otherwise than asked, in words.
    """

    steps: int
    seconds: float
    before: float
    after: float
    note: str = ""

    def __str__(self) -> str:
        did = f"{self.steps} steps in {self.seconds:.0f} s, loss {self.before:.4g} before and {self.after:.4g} after"
        return f"{did}; {self.note}" if self.note else did


@dataclass
class Selection:
    """The decision, by parameter name: it can be saved, sent and replayed on the same model.

    keep    group -> indices that stay, where some leave (structured pruning)
    mask    weight -> one bit for each element, 1 = kept
    values  parameter -> the tensor that takes its place, where calibration changed it
    asked   weight or group -> fraction its rule asked for; None where no amount was asked
    drop    module paths of the residual blocks, and of branches of residual sums, that leave
    dead    group -> indices that stay, where masks left others without any effect; found anew at every transform
    fits    weight -> how calibration fitted it
    recovery    what `recover` did; None where it did not run
    notes   what calibration met in the plan and could not use, in words
    """

    keep: dict[str, Tensor] = field(default_factory=dict)
    mask: dict[str, PackedMask] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    asked: dict[str, float | None] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    dead: dict[str, Tensor] = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)
    recovery: Recovery | None = None
    notes: tuple[Note, ...] = ()

    @property
    def staying(self) -> dict[str, Tensor]:
        """Group -> indices that stay, whether others were asked to leave or were dead."""
        return {**self.keep, **self.dead}

    def reached(self, name: str) -> float:
        """The fraction of weight `name` that is masked: 0.0 without a mask or without elements."""
        mask = self.mask.get(name)
        if mask is None or mask.numel() == 0:
            return 0.0
        return 1.0 - mask.kept() / mask.numel()

    def words(self) -> list[str]:
        """One line for each group and weight that loses something."""
        lines = [f"{name}: {len(kept)} indices stay" for name, kept in self.staying.items()]
        return lines + [f"{name}: {self.reached(name):.1%} zeros" for name in self.mask]

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """weight (any shape) -> the same with its new values, and +0.0 where masked, whatever stood there."""
        value = self.values.get(name, weight)
        mask = self.mask.get(name)
        if mask is None:
            return value
        if not mask.shape == weight.shape == value.shape:
            raise InputError(
                "cannot apply a selection",
                where=f'"{name}" {list(weight.shape)}',
                why=f"its mask has shape {list(mask.shape)}",
                do="Apply it to the model that it was made for.",
            )
        return torch.where(mask.unpack().to(value.device), value, value.new_zeros(()))


# So that torch.load reads a saved selection as it reads tensors, without pickle's dangers.
torch.serialization.add_safe_globals([Selection, PackedMask, Fit, Recovery, Note])

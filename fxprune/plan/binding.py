"""What a plan is bound to: parameters as candidates, and which rule each one got."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .patterns import Blocks, SemiStructured, Sparsity, Unstructured


@dataclass(frozen=True)
class Candidate:
    """What binding must know of a parameter; `reason` says in words why it is not `prunable`.

    `inputs` is the dimension that products with it sum over, and `role` what it does: "product", "lookup" (the table of
    an embedding, which nothing sums over) or "unknown", before there is a graph. `is_table` says that an embedding
    looks rows up in it, whatever else reads it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    prunable: bool
    reason: str = ""
    inputs: int = 1
    role: str = "product"
    is_table: bool = False

    def passed_over(self, sparsity: Sparsity) -> str:
        """Why a wildcard does not bind this parameter, in words; "" if it does. Its full name always binds it."""
        if self.is_table and isinstance(sparsity, (Unstructured, SemiStructured, Blocks)):
            return "the table of an embedding, which zeros make no faster; a rule with its full name prunes it"
        return ""

    def unusable(self, sparsity: Sparsity) -> str:
        """Why `sparsity` cannot have this parameter, in words; "" if it can, or if only the graph will tell."""
        if not self.prunable:
            return self.reason
        if not isinstance(sparsity, (Unstructured, SemiStructured, Blocks)) or self.role == "unknown":
            return ""
        # Such groups and tiles are made for the sums of a product. A lookup has none, so they would cost accuracy only.
        if self.role == "lookup" and not isinstance(sparsity, Unstructured):
            return f"only looked up as an embedding, and {type(sparsity).__name__} is for weights that multiply"
        return sparsity.misfit(self.shape, self.inputs)


@dataclass(frozen=True)
class Binding:
    """Which rule each weight got, and what the rules' wildcards met besides.

    assigned    name -> index of the rule that won
    overridden  (name, earlier rule, later rule that took its place)
    skipped     (rule, name, why the name matched but cannot be used)
    excluded    (rule, name, the exclude pattern that took it away)
    """

    assigned: dict[str, int]
    overridden: tuple[tuple[str, int, int], ...] = ()
    skipped: tuple[tuple[int, str, str], ...] = ()
    excluded: tuple[tuple[int, str, str], ...] = ()

    def names(self, rule: int) -> list[str]:
        """The weights that rule number `rule` got, in the order of the parameters."""
        return [name for name, index in self.assigned.items() if index == rule]

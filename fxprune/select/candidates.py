"""What a rule may bind: every parameter, whether a plan may prune it, and what its dimensions are."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn
from torch._ops import HigherOrderOperator

from fxprune.couple.coupling import Coupling
from fxprune.graph.program import Program, names_of_parameters
from fxprune.graph.weights import read_by_products, uses
from fxprune.plan.plan import Candidate


def candidates(program: Program, coupling: Coupling | None = None) -> dict[str, Candidate]:
    """Every parameter of a program under its first name, whether a plan may prune it, and what its dimensions are.

    A weight may be scaled, joined or cut before a product reads it. With a coupling, weights that the graph computes
    with otherwise (standardised ones, say) count as well: their channels may leave.
    """
    found, read = uses(program), read_by_products(program)
    result = {}
    for name in dict.fromkeys(names_of_parameters(program).values()):
        tensor = program.get_parameter(name)
        used = [u for u in found.get(name, []) if u.kind]
        kinds = {u.kind for u in used}
        role = "lookup" if kinds == {"embedding"} else "product"
        if name in read or (coupling is not None and coupling.outputs(name)):
            kinds.add("weight")
        regions = {str(u.node.target) for u in found.get(name, []) if isinstance(u.node.target, HigherOrderOperator)}
        usable = _prunable(tensor, name in found, kinds, regions)
        inputs = next((u.inputs for u in used if u.kind in ("linear", "conv")), 1)
        result[name] = Candidate(tuple(tensor.shape), tensor.dtype, *usable, inputs, role, "embedding" in kinds)
    return result


def candidates_without_graph(model: nn.Module) -> dict[str, Candidate]:
    """The same from the parameters alone, before there is a graph: only shape and dtype are known."""
    result = {}
    for name, tensor in model.named_parameters():
        plain = name.removesuffix("_orig")
        result[plain] = Candidate(
            tuple(tensor.shape), tensor.dtype, *_prunable(tensor, True, {"linear"}), role="unknown"
        )
    return result


def _prunable(tensor: Tensor, is_read: bool, kinds: set[str], regions: Collection[str] = ()) -> tuple[bool, str]:
    if not tensor.is_floating_point():
        return False, f"{str(tensor.dtype).removeprefix('torch.')} is not floating point"
    if tensor.dim() < 2:
        return False, f"{tensor.dim()}-D"
    if not is_read:
        return False, "the captured graph does not read it"
    if not kinds and regions:
        asked = "a region of forward that torch.export keeps as one op, such as torch.autocast: take it out of forward"
        return False, f"only read inside {', '.join(sorted(regions))}, {asked}"
    if not kinds:
        return False, "no product reads it as a weight, and no embedding"
    return True, ""

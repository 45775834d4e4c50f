"""Site, Verdict and Packed: what a layout is asked about, what it answers, and what it makes."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from torch import Tensor
from torch.fx import Graph, Node

# With fewer zeros than this no sparse kernel can win: it saves fewer multiply-adds than its indices cost.
LEAST_ZEROS = 0.2


@dataclasses.dataclass(frozen=True)
class Site:
    """One weight where it is used.

    `weight` [o, i] has +0.0 wherever the mask removed an element, so "nonzero" means that some bit is set. `tokens` are
    the numbers of rows M of the activations that the layout is tuned for. `activation` is the function that follows the
    op ("", "relu", "gelu", "gelu_tanh" or "silu") and can be computed with it.
    """

    name: str
    node: str
    weight: Tensor
    bias: Tensor | None
    tokens: tuple[int, ...]
    activation: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a layout can hold a site's weight; if not, why in words."""

    ok: bool
    why: str = ""


@dataclasses.dataclass
class Packed:
    """A weight [o, i] in a layout: plain tensors whose names are the save format.

    `narrow` says that a float32 weight's values are stored in 16 bits, without loss.
    """

    layout: str
    shape: tuple[int, int]
    tensors: dict[str, Tensor]
    narrow: bool = False

    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class Layout(Protocol):
    """How a masked weight is stored and multiplied.

    `unpack(pack(site))` equals the site's weight bit for bit. `call` computes act(x @ weight.T + bias) for x [..., i].
    `bytes_of` foretells the bytes of a packed weight, by which sites are alike.
    `lower` adds the same as one call to a graph, given a get_attr node for each packed tensor, and returns one node for
    each of `out_features`: the weight's rows dealt out in order, each result contiguous [..., out_features[j]].
    """

    name: str

    def fits(self, site: Site) -> Verdict: ...

    def predict(self, site: Site, tokens: int) -> float: ...

    def bytes_of(self, weight: Tensor) -> float: ...

    def pack(self, site: Site) -> Packed: ...

    def unpack(self, packed: Packed) -> Tensor: ...

    def call(self, x: Tensor, packed: Packed, bias: Tensor | None, activation: str) -> Tensor: ...

    def lower(
        self,
        graph: Graph,
        packed: Packed,
        tensors: dict[str, Node],
        x: Node,
        bias: Node | None,
        activation: str,
        out_features: tuple[int, ...],
    ) -> list[Node]: ...


@dataclasses.dataclass(frozen=True)
class Timing:
    """Predicted and measured seconds of one layout at one number of tokens."""

    layout: str
    tokens: int
    predicted: float
    measured: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was taken for a site, what was refused and why, and the figures behind it.

    `steady` says whether these are worth keeping: whether nobody else wanted the cores meanwhile.
    """

    layout: str
    why: str
    refused: dict[str, str]
    timings: tuple[Timing, ...]
    reused: bool = False
    steady: bool = True

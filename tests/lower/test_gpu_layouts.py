"""Layouts whose kernels run on CUDA: what they refuse, how they store, the op that multiplies, and whole models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Blocks, Plan, Rule, SemiStructured, Unstructured
from fxprune.errors import InputError
from fxprune.lower.layouts import LAYOUTS, Nonzeros, Nonzeros8, choose, cusparselt, gpu
from fxprune.lower.layouts.bitmap import Bitmap, CudaBitmap
from fxprune.lower.layouts.choose import Chooser
from fxprune.lower.layouts.gpu import GpuLayout
from fxprune.lower.layouts.remember import Choices
from fxprune.lower.layouts.site import Site, Verdict
from fxprune.measure.timing import Samples
from tests.kernels.kernel_case import same_bits, sparse
from triton_kernels import activation, prune24

NAMES = ["semi24", "blocks", "nonzeros8", "bitmap"]
PLANS = {
    "semi24": SemiStructured(2, 4),
    "cusparselt": SemiStructured(2, 4),
    "blocks": Blocks(0.5, (16, 16)),
    "nonzeros8": Unstructured(0.9),
    "bitmap": Unstructured(0.5),
}


def layout_of(name: str) -> GpuLayout:
    layout = LAYOUTS[name]
    layout = layout.cuda if isinstance(layout, Bitmap) else layout
    assert isinstance(layout, GpuLayout)
    return layout


def weight_for(name: str, o: int = 32, i: int = 320, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = sparse(o, i, 0.4, dtype, "cpu")
    if name == "semi24":
        return torch.where(prune24.reference_select(weight, 2, 4), weight, 0.0)
    if name == "blocks":
        keep = torch.rand(o // 16, i // 16) < 0.3
        return torch.where(keep.repeat_interleave(16, 0).repeat_interleave(16, 1), weight, 0.0)
    return weight


def site_of(weight: Tensor, tokens: tuple[int, ...] = (1,)) -> Site:
    return Site("w", "linear", weight, None, tokens)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layouts fit on this machine as well, where their op unpacks and multiplies."""
    monkeypatch.setattr(gpu, "cannot_run", lambda weight: "")
    monkeypatch.setattr(Bitmap, "on", lambda self, device: self.cuda)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_packing_keeps_every_bit_and_bytes_are_foretold(name: str, dtype: torch.dtype) -> None:
    layout, weight = layout_of(name), weight_for(name, 64, 1024, dtype)
    packed = layout.pack(site_of(weight))
    assert tuple(packed.tensors) == layout.tensors and packed.shape == (64, 1024)
    assert same_bits(layout.unpack(packed), weight)
    assert packed.bytes() == pytest.approx(layout.bytes_of(weight), rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_the_op(name: str) -> None:
    layout, weight = layout_of(name), weight_for(name)
    packed, bias = layout.pack(site_of(weight)), torch.randn(32)
    for x in (torch.randn(320), torch.randn(2, 3, 320), torch.randn(0, 320), torch.randn(320, 4).T):
        for act in activation.NAMES:
            wanted = activation.reference(nn.functional.linear(x, weight, bias), act)
            torch.testing.assert_close(layout.call(x, packed, bias, act), wanted)
    given = (torch.randn(3, 320), list(packed.tensors.values()), bias, name, [32, 320], "gelu")
    torch.library.opcheck(gpu.op, given)
    with pytest.raises(InputError, match="x is \\[3, 319\\], i is 320"):
        gpu.op(torch.randn(3, 319), *given[1:])
    with pytest.raises(InputError, match="unknown layout 'none'"):
        gpu.op(*given[:3], "none", *given[4:])
    with pytest.raises(InputError, match="unknown activation 'tanh'"):
        gpu.op(*given[:5], "tanh")


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_on_the_cpu_is_refused_in_words(name: str) -> None:
    fit = layout_of(name).fits(site_of(weight_for(name)))
    assert not fit.ok and fit.why == "the kernel runs on CUDA, not on cpu"


@pytest.mark.parametrize(
    ("name", "weight", "tokens", "why"),
    [
        ("semi24", torch.ones(4, 6), (1,), "i=6 is not a multiple of 4"),
        ("semi24", torch.ones(4, 8), (1,), "8 of 8 fours have more than two nonzeros"),
        ("semi24", torch.tensor([[1.0, -0.0, 0.0, 1.0]]), (1,), "it holds -0.0"),
        ("semi24", torch.zeros(4, 8), (1, 65), ""),
        ("semi24", torch.zeros(4, 8), (128, 65), "up to 64 tokens"),
        ("blocks", torch.zeros(24, 32), (1,), "no tile of 64 or 32 or 16 squared divides [24, 32]"),
        ("blocks", torch.ones(32, 32), (1,), "0% of its tiles are zero, 20% is the least"),
        ("blocks", torch.zeros(32, 32), (4096,), ""),
        ("nonzeros8", torch.zeros(1, 65537), (1,), "65537 columns are more than 65536"),
        ("bitmap", torch.ones(1, 65536), (1,), "a row of 65536 nonzeros is too long"),
    ],
)
@pytest.mark.usefixtures("anywhere")
def test_what_a_layout_cannot_take(name: str, weight: Tensor, tokens: tuple[int, ...], why: str) -> None:
    fit = layout_of(name).fits(site_of(weight, tokens))
    assert fit.ok is not bool(why) and why in fit.why


@pytest.mark.usefixtures("anywhere")
def test_the_largest_tile_that_leaves_enough_out() -> None:
    weight = torch.ones(128, 128)
    for side, zeros in ((64, (slice(0, 64), slice(0, 64))), (32, (slice(0, 64), slice(0, 32)))):
        given = weight.clone()
        given[zeros] = 0.0
        packed = layout_of("blocks").pack(site_of(given))
        if side == 32:
            # Two of sixteen tiles of 32 squared are too few as well, and so are those of 16.
            assert not layout_of("blocks").fits(site_of(given)).ok
            given[:, 64:96] = 0.0
            packed = layout_of("blocks").pack(site_of(given))
        assert packed.tensors["values"].shape[1:] == (side, side)


@pytest.mark.usefixtures("anywhere")
def test_what_cannot_be_packed_or_timed_is_told_and_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    weight = weight_for("bitmap")
    monkeypatch.setattr(Nonzeros, "fits", lambda self, site: Verdict(False, "left out"))
    with monkeypatch.context() as patch:
        patch.setattr(CudaBitmap, "split", no_memory)
        patch.setattr(Nonzeros8, "split", no_memory)
        choice, packed = Chooser().choose(site_of(weight))
    assert packed is None and choice.layout == "dense"
    assert {choice.refused[n] for n in ("bitmap", "nonzeros8")} == {
        "there is not enough memory on the device to pack it"
    }
    assert not Chooser().choose(site_of(weight))[0].reused
    monkeypatch.setattr(choose, "interleave_graphs", no_memory)
    told = choose._times([lambda: weight], torch.device("cuda"), 0.1, False)
    assert told == "it could not be timed (OutOfMemoryError: CUDA out of memory.)"


@pytest.mark.usefixtures("anywhere")
def test_a_choice_is_not_reused_for_a_weight_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([[3.0, 1.0, 2.0, 2.0], [3.0, 2.0, 1.0]])
    monkeypatch.setattr(Nonzeros, "fits", lambda self, site: Verdict(False, "left out"))
    monkeypatch.setattr(choose, "best_dense", lambda site, x: [lambda: x])
    monkeypatch.setattr(choose, "_times", lambda *_: (next(taken), True))
    chooser, two = Chooser(), weight_for("semi24", 33, 320)
    first, _ = chooser.choose(site_of(two))
    kept = int((two != 0).sum())
    other = torch.zeros(two.numel())
    other[:kept] = 1.0
    other = other[torch.randperm(other.numel())].view_as(two)
    second, packed = chooser.choose(site_of(other))
    assert (first.layout, second.layout, second.reused) == ("semi24", "bitmap", False)
    assert first.why.endswith("a call with more than 64 tokens unpacks it first")
    assert packed is not None and same_bits(layout_of("bitmap").unpack(packed), other)


@pytest.mark.usefixtures("anywhere")
def test_choices_outlive_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken = iter([[3.0, 1.0, 2.0, 2.0], [3.0, 4.0, 4.0, 4.0]])
    monkeypatch.setattr(Nonzeros, "fits", lambda self, site: Verdict(False, "left out"))
    monkeypatch.setattr(choose, "best_dense", lambda site, x: [lambda: x])
    monkeypatch.setattr(choose, "_times", lambda *_: (next(taken), True))
    file = tmp_path / "deep" / "choices.json"
    monkeypatch.setattr(choose, "_memory", lambda weight: Choices(file))
    weight = weight_for("semi24", 33, 320)
    first, _ = Chooser().choose(site_of(weight))
    again, packed = Chooser().choose(site_of(weight))
    assert first.layout == again.layout == "semi24" and (first.reused, again.reused) == (False, True)
    assert again.timings == first.timings and again.refused == first.refused and packed is not None
    # What cannot be read is measured anew, and what cannot be written is not kept.
    half = json.dumps({key: {"layout": "semi24"} for key in json.loads(file.read_text())})
    for broken in ("{", "[]", "{}", half):
        file.write_text(broken)
        taken = iter([[3.0, 4.0, 4.0, 4.0]])
        choice, packed = Chooser().choose(site_of(weight))
        assert choice.layout == "dense" and not choice.reused and packed is None
        assert Chooser().choose(site_of(weight))[0].reused
    monkeypatch.setattr(choose, "_memory", lambda weight: Choices(file / "below"))
    taken = iter([[3.0, 1.0, 2.0, 2.0]])
    assert Chooser().choose(site_of(weight))[0].layout == "semi24"
    assert [f.name for f in file.parent.iterdir()] == ["choices.json"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.down(nn.functional.gelu(self.up(x)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("anywhere")
def test_a_model_in_each_layout(name: str) -> None:
    model, x = Attention().eval(), torch.randn(2, 5, 64)
    plan = Plan([Rule("*.weight", PLANS[name])])
    options: dict[str, Any] = {"layout": name, "measure": False}
    fast = fxprune.transform(model, plan, (x,), options=options, progress=False)
    assert {row.layout for row in fast.report.weights} == {name}
    # q, k and v read the same activations, so that they are stored together.
    calls = [node for node in fast.graph.nodes if node.target is gpu.op]
    assert len(calls) == 3
    plain = fxprune.transform(model, plan, (x,), options={"compile": False, "layout": "dense"}, progress=False)
    other = torch.randn(3, 5, 64)
    torch.testing.assert_close(fast(other), plain(other), rtol=1e-4, atol=1e-5)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """cuSPARSELt as torch documents its operators, on this machine; tokens and algorithm of each product are listed.

    It has three algorithms; the second takes no operands of these sizes, and the third is the fastest.
    """
    seen: list[tuple[int, int]] = []

    def product(a: Tensor, b: Tensor, bias: Tensor | None = None, *, transpose_result: bool, alg_id: int) -> Tensor:
        seen.append((b.shape[1], alg_id))
        assert b.shape[1] % 8 == 0 and b.T.is_contiguous()
        if alg_id == 1:
            raise RuntimeError("operation not supported")
        y = a @ b if bias is None else a @ b + bias.unsqueeze(1)
        return y.T.contiguous() if transpose_result else y

    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "get_max_alg_id", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cusparselt, "_compress", lambda weight: weight.clone())
    monkeypatch.setattr(cusparselt, "_multiply", product)
    monkeypatch.setattr(
        cusparselt, "interleave", lambda calls, *_, **__: [Samples([2.0], []), Samples([1.0], [])][: len(calls)]
    )
    monkeypatch.setattr(cusparselt, "_algorithms", {})
    return seen


@pytest.mark.usefixtures("anywhere")
def test_the_librarys_format(library: list[tuple[int, int]]) -> None:
    layout, weight = layout_of("cusparselt"), weight_for("semi24", 32, 64)
    assert layout.fits(site_of(weight, (1, 4096))).ok
    packed, bias = layout.pack(site_of(weight)), torch.randn(32)
    given = [packed.tensors["compressed"]]
    for x in (torch.randn(m, 64) for m in (0, 1, 7, 8, 100, 120)):
        wanted = activation.reference(x @ weight.T + bias, "silu")
        torch.testing.assert_close(layout.launch(x, given, bias, (32, 64), "silu"), wanted)
    # Each power of two of tokens is searched once: all algorithms, then the fastest that there is.
    assert library == [(8, 0), (8, 1), (8, 2), *[(8, 2)] * 3, (104, 0), (104, 1), (104, 2), (104, 2), (120, 2)]
    wide = torch.randn(16, 80)[:, 3:67]
    torch.testing.assert_close(layout.launch(wide, given, None, (32, 64), ""), wide @ weight.T)
    with pytest.raises(InputError, match="only the library on a GPU knows its format"):
        layout.unpack(packed)


@pytest.mark.usefixtures("anywhere", "library")
def test_what_the_librarys_format_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, weight = layout_of("cusparselt"), weight_for("semi24", 32, 64)
    infinite = weight.clone()
    infinite[weight != 0] = torch.inf
    for given, why in (
        (weight_for("semi24", 33, 64), r"\[33, 64\] are not both multiples of 16"),
        (torch.randn(32, 64), "have more than two nonzeros"),
        (infinite, "not finite"),
    ):
        assert re.search(why, layout.fits(site_of(given)).why)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "without cuSPARSELt" in layout.fits(site_of(weight)).why


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*NAMES, "cusparselt"])
def test_a_model_in_each_layout_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    model, x = Attention().eval().to("cuda", dtype), torch.randn(1, 5, 64, device="cuda", dtype=dtype)
    plan = Plan([Rule("*.weight", PLANS[name])])
    options: dict[str, Any] = {"layout": name, "measure": False}
    fast = fxprune.transform(model, plan, (x,), options=options, progress=False)
    assert {row.layout for row in fast.report.weights} == {name}
    plain = fxprune.transform(model, plan, (x,), options={"compile": False, "layout": "dense"}, progress=False)
    for many in (torch.randn(1, 5, 64), torch.randn(40, 5, 64)):
        given = many.to(x)
        torch.testing.assert_close(fast(given), plain(given), rtol=3e-2, atol=3e-2)

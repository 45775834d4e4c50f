"""lower_attention: which attentions of few queries read the cache where it lies, and that they stay right."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.capture.capture import capture
from fxprune.graph.program import Program
from fxprune.kernels import native
from fxprune.kernels.native.attention import attention as op
from fxprune.lower import attention
from fxprune.lower.attention import lower_attention

pytestmark = pytest.mark.skipif(not native.status().available, reason="needs a C++ compiler")
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_gain", lambda found: 2.0)


class Step(nn.Module):
    """One attention of a decoder's step, as `attend` has it."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, *given: Tensor) -> Any:
        return self.attend(*given)


def lowered(attend: Callable[..., Any], *given: Tensor, dynamic: Any = None) -> tuple[Program, list[float]]:
    """What capture makes of `attend`, lowered, and held against it."""
    model = Step(attend).eval()
    program = capture(model, given, {}, dynamic).program
    gains = lower_attention(program)
    with torch.no_grad():
        torch.testing.assert_close(_leaves(program(*given)), _leaves(model(*given)), rtol=1e-5, atol=1e-5)
    return program, gains


def _leaves(result: Any) -> tuple[Tensor, ...]:
    return tuple(torch.utils._pytree.tree_leaves(result))


def calls(program: Program) -> list[torch.fx.Node]:
    return list(program.graph.find_nodes(op="call_function", target=op))


def parts_of(program: Program) -> list[int]:
    """How many tensors each call reads the keys from."""
    return [len(call.args[1]) for call in calls(program)]  # pyright: ignore[reportArgumentType]


def made(
    heads: int = 4, kv_heads: int = 4, queries: int = 1, past: int = 9, n: int = 2, size: int = 16
) -> list[Tensor]:
    """A query, a key and a value of its own tokens, and the keys and values before."""
    g = torch.Generator().manual_seed(0)
    query = torch.randn(n, heads, queries, size, generator=g)
    own = [torch.randn(n, kv_heads, queries, size, generator=g) for _ in range(2)]
    return [query, *own, *(torch.randn(n, kv_heads, past, size, generator=g) for _ in range(2))]


def decode(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, *more: Tensor) -> Tensor:
    k, v = torch.cat([keys, key], 2), torch.cat([values, value], -2)
    return F.scaled_dot_product_attention(query, k, v, *more)


def repeated(x: Tensor, times: int) -> Tensor:
    n, heads, tokens, size = x.shape
    return x[:, :, None].expand(n, heads, times, tokens, size).reshape(n, heads * times, tokens, size)


def test_reads_the_cache_where_it_lies() -> None:
    program, gains = lowered(decode, *made())
    assert gains == [2.0] and parts_of(program) == [2]
    assert not program.graph.find_nodes(op="call_function", target=aten.cat.default)


@pytest.mark.parametrize("queries", [1, 3])
def test_views_that_follow_find_what_they_found(queries: int) -> None:
    def attend(*given: Tensor) -> Tensor:
        return decode(*given).transpose(1, 2).flatten(2) * 2

    assert parts_of(lowered(attend, *made(queries=queries))[0]) == [2]


def test_a_cache_that_is_returned_is_still_joined_and_read_so() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Any:
        k, v = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return F.scaled_dot_product_attention(query, k, v), k, v

    assert parts_of(lowered(attend, *made())[0]) == [1]


def test_keys_alone_returned() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Any:
        k, v = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return F.scaled_dot_product_attention(query, k, v), k

    assert parts_of(lowered(attend, *made())[0]) == [1]


@pytest.mark.parametrize("returned", [False, True])
def test_heads_that_share_keys_are_not_copied(returned: bool) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Any:
        k, v = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        y = F.scaled_dot_product_attention(query, repeated(k, 3), repeated(v, 3))
        return (y, k, v) if returned else y

    program, _ = lowered(attend, *made(heads=6, kv_heads=2))
    assert parts_of(program) == [1 if returned else 2]
    assert not program.graph.find_nodes(op="call_function", target=aten.expand.default)


def test_heads_that_alternate_are_not_taken_for_heads_that_share() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        k, v = (x[:, None].expand(-1, 3, -1, -1, -1).flatten(1, 2) for x in (keys, values))
        return F.scaled_dot_product_attention(query, k, v)

    program, _ = lowered(attend, *made(heads=6, kv_heads=2))
    assert parts_of(program) == [1]
    assert program.graph.find_nodes(op="call_function", target=aten.expand.default)


def test_enable_gqa() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        k, v = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return F.scaled_dot_product_attention(query, k, v, enable_gqa=True, scale=0.5)

    assert parts_of(lowered(attend, *made(heads=6, kv_heads=2))[0]) == [2]


@pytest.mark.parametrize("shape", [(1, 1, 1, 10), (2, 4, 1, 10), (4, 1, 10), (1, 10)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(shape, generator=g) < 0.6 if dtype == torch.bool else torch.randn(shape, generator=g)
    assert parts_of(lowered(decode, *made(), mask)[0]) == [2]


def test_a_cache_of_any_length() -> None:
    tokens = torch.export.Dim("tokens", min=1, max=512)
    dynamic = ((None, None, None, {2: tokens}, {2: tokens}),)
    program, _ = lowered(decode, *made(), dynamic=dynamic)
    assert parts_of(program) == [2]
    for past in (1, 40, 301):
        given = made(past=past)
        torch.testing.assert_close(program(*given), decode(*given), rtol=1e-5, atol=1e-5)


def _causal(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, is_causal=True)


@pytest.mark.parametrize(
    ("attend", "given"),
    [
        (_causal, made()),
        (decode, made(queries=attention.MOST_QUERIES + 1)),
        (decode, [x.double() for x in made()]),
        (lambda q, k, v, ks, vs: F.scaled_dot_product_attention(q, ks[:1], vs[:1]), made()),
        (lambda q, k, v, ks, vs: F.scaled_dot_product_attention(q[0], ks[0], vs[0]), made()),
    ],
    ids=["causal", "many queries", "float64", "one cache for all images", "three dimensions"],
)
def test_left_to_torch(attend: Callable[..., Any], given: list[Tensor]) -> None:
    program, gains = lowered(attend, *given)
    assert gains == [] and calls(program) == []


def test_what_is_written_to_after_it_was_joined_is_read_as_it_was() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys = keys + 0
        k, v = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        keys.mul_(3)
        return F.scaled_dot_product_attention(query, k, v) + keys.mean()

    program, _ = lowered(attend, *made())
    assert program.graph.find_nodes(op="call_function", target=aten.mul_.Tensor) and parts_of(program) == [1]


def test_heads_that_were_copied_before_a_write_are_read_as_they_were() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = keys + 0, values + 0
        k, v = repeated(keys, 3), repeated(values, 3)
        keys.mul_(3)
        return F.scaled_dot_product_attention(query, k, v) + keys.mean()

    program, _ = lowered(attend, *made(heads=6, kv_heads=2))
    assert program.graph.find_nodes(op="call_function", target=aten.mul_.Tensor)


def test_no_faster_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_gain", lambda found: attention.MARGIN - 0.01)
    program, gains = lowered(decode, *made())
    assert gains == [] and calls(program) == []


class Decoder(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = decode(query, key, value, keys, values)
        return self.out(seen.transpose(1, 2).flatten(2)), key, value


@pytest.mark.parametrize("compiled", [False, True])
def test_transform_tells_of_it(compiled: bool) -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    for layer in (model.qkv, model.out):
        torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.9)
    given = torch.randn(1, 1, 64), torch.randn(1, 4, 30, 16), torch.randn(1, 4, 30, 16)
    options = {"compile": compiled, "measure": False, "layout": "bitmap"}
    fast = fxprune.transform(model, example_inputs=given, options=options)
    assert any("1 attention reads" in note and "2.00x" in note for note in fast.report.notes)
    with torch.no_grad():
        torch.testing.assert_close(fast(*given), model(*given), rtol=1e-4, atol=1e-5)


def test_the_backend_reads_the_cache_where_it_lies(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    for layer in (model.qkv, model.out):
        torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.9)
        torch.nn.utils.prune.remove(layer, "weight")
    given = torch.randn(1, 1, 64), torch.randn(1, 4, 30, 16), torch.randn(1, 4, 30, 16)
    compiled = torch.compile(model, backend="fxprune", options={"compile": False, "layout": "bitmap"})
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="fxprune"):
        torch.testing.assert_close(compiled(*given), model(*given), rtol=1e-4, atol=1e-5)
    assert any("where they lie (2.00x" in record.getMessage() for record in caplog.records)

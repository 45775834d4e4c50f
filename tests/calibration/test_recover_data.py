"""What recovery is trained on: the order and the sizes of batches, and the nodes and numbers that are compared."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxprune import Plan, Rule, Unstructured
from fxprune.calibration.batches import capture_for, read_calls
from fxprune.calibration.recover.feed import Feed
from fxprune.calibration.recover.matching import nodes_to_match, relative_error
from fxprune.calibration.recover.recover import recover
from fxprune.errors import InputError
from tests.calibration.recover_models import ConvNet, Decoder, PostNorm, by_magnitude, conv_net, images, texts, vectors


def numbered(count: int) -> list[Tensor]:
    return [torch.full((2, 1), float(n)) for n in range(count)]


def numbers(feed: Feed, count: int) -> list[int]:
    return [int(feed.next().args[0][0, 0]) for _ in range(count)]


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (29, 1), (31, 2), (100, 5), (1000, 8)])
def test_a_list_is_gone_through_again_and_again(count: int, held_out: int) -> None:
    feed = Feed(numbered(count), seed=0)
    assert [int(call.args[0][0, 0]) for call in feed.held_out] == list(range(held_out))
    rounds = [numbers(feed, count - held_out) for _ in range(2)]
    assert [sorted(r) for r in rounds] == [list(range(held_out, count))] * 2
    assert count < 10 or rounds[0] != rounds[1] != sorted(rounds[1])
    again = Feed(numbered(count), seed=0)
    assert numbers(again, count - held_out) == rounds[0]
    assert count < 10 or numbers(Feed(numbered(count), seed=1), count - held_out) != rounds[0]


def test_a_generator_is_read_as_it_is_needed() -> None:
    read = []

    def endless() -> Iterator[Tensor]:
        for n in range(10**9):
            read.append(n)
            yield torch.full((2, 1), float(n))

    feed = Feed(endless(), seed=0)
    assert len(feed.held_out) == 4 and len(read) <= 8
    assert numbers(feed, 20) == list(range(4, 24))
    assert len(read) == 24


@pytest.mark.parametrize(("count", "held_out"), [(3, 1), (8, 4), (12, 4)])
def test_what_a_generator_gave_is_gone_through_again(count: int, held_out: int) -> None:
    feed = Feed((x for x in numbered(count)), seed=0)
    rest = count - held_out
    assert numbers(feed, rest) == list(range(held_out, count))
    assert sorted(numbers(feed, rest)) == list(range(held_out, count))


def test_only_the_last_of_a_stream_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(sys.modules[Feed.__module__], "_KEPT_BYTES", 3 * 8)
    feed = Feed((x for x in numbered(12)), seed=0)
    assert numbers(feed, 8) == list(range(4, 12))
    assert sorted(numbers(feed, 3)) == [9, 10, 11]


def test_a_loader_that_shuffles_holds_out_what_it_never_trains_on() -> None:
    loader = DataLoader(TensorDataset(torch.arange(80.0).reshape(40, 2)), batch_size=2, shuffle=True)
    state = torch.get_rng_state()
    feeds = [Feed(loader, seed=3) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    first, second = ([feed.next().args[0] for _ in range(60)] for feed in feeds)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (held,) = feeds[0].held_out
    rows = {tuple(row) for x in first for row in x.tolist()}
    assert len(rows) == 38 and not rows & {tuple(row) for row in held.args[0].tolist()}


def test_a_skipped_batch_is_not_met_again() -> None:
    for make in (lambda: numbered(30), lambda: (x for x in numbered(10))):
        one, other = Feed(make(), seed=0), Feed(make(), seed=0)
        numbers(one, 17)
        other.skip(17)
        assert numbers(one, 9) == numbers(other, 9)


def test_sizes_that_vary() -> None:
    model = Decoder().eval()
    data = texts(lengths=(6, 9, 4))
    selection = by_magnitude(model, Plan([Rule("up.*.weight", Unstructured(0.8))]), data)
    found = recover(model, selection, (batch for batch in data), steps=25, learning_rate=3e-3, progress=False)
    assert found.recovery is not None and found.recovery.after < found.recovery.before


def test_the_sizes_of_a_whole_list_are_looked_at() -> None:
    model = Decoder().eval()
    data = [*texts(lengths=(6,)) * 30, *texts(lengths=(9,))]
    selection = by_magnitude(model, Plan([Rule("up.*.weight", Unstructured(0.8))]), data)
    assert len(data) > 75
    assert recover(model, selection, data, steps=3, progress=False).recovery is not None
    feed = Feed(data, seed=0)
    assert len(feed.head) == len(data)


def test_a_later_batch_of_another_form() -> None:
    model, data = PostNorm().eval(), vectors(12)
    selection = by_magnitude(model, Plan([Rule("a.*.weight", Unstructured(0.5))]), data)
    stream = iter([*data, torch.randn(16, 7)])
    with pytest.raises(InputError, match=r"cannot use this batch at batches\[12\].*\[16, 7\]"):
        recover(model, selection, stream, steps=20, progress=False)
    with pytest.raises(InputError, match=r"empty batch at batches\[12\]"):
        recover(model, selection, iter([*data, torch.randn(0, 8)]), steps=20, progress=False)


def test_batches_that_are_not_finite_are_skipped() -> None:
    model, data = PostNorm().eval(), vectors(20)
    data[7] = torch.full((16, 8), torch.nan)
    selection = by_magnitude(model, Plan([Rule("a.*.weight", Unstructured(0.8))]), data)
    found = recover(model, selection, data, steps=57, learning_rate=3e-3, progress=False)
    assert found.recovery is not None and found.recovery.after < found.recovery.before
    assert all(value.isfinite().all() for value in found.values.values())


def matched(model: nn.Module, data: list[Any], pruned: list[str]) -> list[str]:
    program = capture_for(model.eval(), read_calls(data)).program
    nodes = {node.name: node for node in program.graph.nodes}
    return [f"{nodes[n].target}" for n in nodes_to_match(program, pruned)]


def test_sums_are_matched_or_the_norms_behind_them() -> None:
    assert matched(PostNorm(), vectors(2), []) == ["aten.layer_norm.default"] * 2
    assert matched(Decoder(layers=2), texts(2), []) == ["aten.add.Tensor"] * 4
    assert matched(conv_net(), images(2), []) == ["aten.add_.Tensor"]


def test_without_sums_the_pruned_weights_are_matched() -> None:
    plain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(40)))
    names = [f"{n}.weight" for n in range(40)]
    assert matched(plain, vectors(2), ["3.weight"]) == ["aten.linear.default"]
    program = capture_for(plain.eval(), read_calls(vectors(2))).program
    found = nodes_to_match(program, names)
    order = [node.name for node in program.graph.nodes if "linear" in str(node.target)]
    assert len(found) == 24 == len(set(found)) and (found[0], found[-1]) == (order[0], order[-1])
    gaps = {b - a for a, b in zip(*(map(order.index, part) for part in (found[:-1], found[1:])), strict=True)}
    assert gaps == {1, 2}


def test_relative_error() -> None:
    found, wanted = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    valid = torch.rand(3, 4) < 0.5
    assert 0 < int(valid.sum()) < 12
    a, b = found.double()[valid], wanted.double()[valid]
    expected = ((a - b) ** 2).mean() / ((b - b.mean()) ** 2).mean()
    assert float(relative_error(found, wanted, valid)) == pytest.approx(float(expected), rel=1e-5)
    # Neither what stands at a position that does not count, nor its gradient, matters.
    spoiled = found.clone()
    spoiled[~valid] = torch.nan
    spoiled.requires_grad_()
    error = relative_error(spoiled, wanted, valid)
    assert float(error.detach()) == pytest.approx(float(expected), rel=1e-5)
    error.backward()
    assert torch.equal(spoiled.grad[~valid], torch.zeros_like(spoiled.grad[~valid]))
    assert spoiled.grad[valid].isfinite().all() and spoiled.grad[valid].ne(0).all()
    flat = relative_error(found.flatten(0, 1), wanted.flatten(0, 1), valid.flatten())
    assert float(flat) == pytest.approx(float(expected), rel=1e-5)


def test_relative_error_of_numbers_that_are_none() -> None:
    wanted = torch.tensor([1.0, -torch.inf, 3.0])
    found = torch.tensor([2.0, -torch.inf, 3.0])
    assert float(relative_error(found, wanted, None)) == pytest.approx(0.5 / 1.0)
    assert relative_error(found, torch.tensor([1.0, torch.nan, 3.0]), None).isnan()
    assert float(relative_error(torch.tensor([3.0, 3.0]), torch.tensor([2.0, 2.0]), None)) == 1.0
    assert float(relative_error(found, torch.full((3,), torch.inf), None)) == 0.0


def test_convolutions_are_matched_where_blocks_do_not_add() -> None:
    class Plain(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(torch.relu(self.stem(x)))))

    assert matched(Plain(), images(2), ["one.weight", "stem.weight"]) == ["aten.conv2d.default"] * 2

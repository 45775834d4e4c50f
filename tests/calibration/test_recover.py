"""recover: what is trained, on which loss, and what comes back, held against plain training loops."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Channels, Drop, Plan, Rule, Unstructured
from fxprune.calibration.calibrate import calibrate
from fxprune.calibration.recover.feed import Feed
from fxprune.calibration.recover.recover import recover
from fxprune.select.mask import PackedMask
from fxprune.select.selection import Selection
from tests.calibration.recover_models import (
    ConvNet,
    Decoder,
    PostNorm,
    by_magnitude,
    conv_net,
    images,
    is_plus_zero,
    same,
    set_clock,
    texts,
    vectors,
)

QUICK = {"learning_rate": 3e-3, "progress": False}
HALF_GONE = Plan([Rule("*.weight", Unstructured(0.5))], exclude=["norm*"])


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def relative(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).mean() / b.var(correction=0)


def by_hand(
    dense: PostNorm, selection: Selection, data: list[Tensor], steps: int, rate: float
) -> tuple[dict[str, Tensor], list[float]]:
    """The same training written out in eager PyTorch: the values after the last step, and the loss of each step."""
    student = copy.deepcopy(dense)
    masks = {name: mask.unpack() for name, mask in selection.mask.items()}
    parameters = dict(student.named_parameters())
    for name, keep in masks.items():
        parameters[name].data *= keep
    trained = [p for name, p in parameters.items() if name in masks or p.dim() == 1]
    optimiser = torch.optim.Adam(trained, betas=(0.9, 0.98))
    feed, losses = Feed(data, seed=0), []
    for step in range(steps):
        (x,) = feed.next().args
        ours, theirs = student.hidden(x), [h.detach() for h in dense.hidden(x)]
        loss = (relative(ours[0], theirs[0]) + relative(ours[1], theirs[1])) / 2
        loss = loss + relative(student.leave(ours[1]), dense.leave(theirs[1]).detach())
        optimiser.zero_grad()
        loss.backward()
        for name, keep in masks.items():
            parameters[name].grad *= keep
        norm = torch.sqrt(sum((p.grad**2).sum() for p in trained))
        for p in trained:
            p.grad *= min(1.0, 1.0 / (float(norm) + 1e-6))
        optimiser.param_groups[0]["lr"] = rate * min(1, (step + 1) / 10) * max(0.02, 1 - step / steps)
        optimiser.step()
        losses.append(float(loss.detach()))
    return {name: parameters[name].detach() for name in parameters}, losses


def test_it_is_the_training_loop_that_it_says_it_is() -> None:
    model, data = PostNorm().eval(), vectors()
    selection = by_magnitude(model, HALF_GONE, data)
    found = recover(model, selection, data, steps=30, **QUICK)
    wanted, _ = by_hand(model, selection, data, 30, 3e-3)
    assert found.recovery is not None and found.recovery.steps == 30
    assert found.values.keys() == wanted.keys()
    # Adam divides by the root of small squares, which magnifies rounding; a wrong rate or loss is off by 1e-3.
    for name, value in found.values.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=2e-5)


def test_the_loss_before_is_that_of_the_batches_held_out() -> None:
    model, data = PostNorm().eval(), vectors(40)
    selection = by_magnitude(model, HALF_GONE, data)
    found = recover(model, selection, data, steps=1, **QUICK)
    pruned = copy.deepcopy(model)
    for name, mask in selection.mask.items():
        pruned.get_parameter(name).data *= mask.unpack()
    losses = []
    with torch.no_grad():
        for x in data[:2]:  # 5% of 40
            inside = [relative(a, b) for a, b in zip(pruned.hidden(x), model.hidden(x), strict=True)]
            losses.append(sum(inside) / 2 + relative(pruned(x), model(x)))
    assert found.recovery is not None
    assert found.recovery.before == pytest.approx(float(sum(losses)) / 2, rel=1e-5)


@pytest.mark.parametrize("make", [PostNorm, Decoder, conv_net])
def test_masks_hold_and_nothing_else_is_touched(make: Any) -> None:
    model = make().eval()
    data = {PostNorm: vectors(), Decoder: texts(), ConvNet: images()}[type(model)]
    pattern = {PostNorm: "?.*.weight", Decoder: "[qoud]*.*.weight", ConvNet: "[ot]*.weight"}[type(model)]
    plan = Plan([Rule(pattern, Unstructured(0.7))])
    given = calibrate(model, plan, data, progress=False)
    before, values = snapshot(model), {name: value.clone() for name, value in given.values.items()}
    found = recover(model, given, data, steps=200, **QUICK)
    assert found.recovery is not None and found.recovery.after < 0.95 * found.recovery.before
    for name, mask in given.mask.items():
        assert is_plus_zero(found.values[name][~mask.unpack()])
        assert found.mask[name] is mask
        # Some of those that a mask keeps moved.
        assert not torch.equal(found.values[name], given.apply(name, before[name]))
    assert found.fits == given.fits and given.recovery is None
    assert all(torch.equal(values[name], value) for name, value in given.values.items())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in model.parameters())


def test_what_is_trained() -> None:
    model = Decoder().eval()
    data = texts()
    selection = by_magnitude(model, Plan([Rule("up.*.weight", Unstructured(0.5))]), data)
    found = recover(model, selection, data, steps=5, **QUICK)
    vectors_ = {name for name, p in model.named_parameters() if p.dim() == 1}
    assert found.values.keys() == {"up.0.weight"} | vectors_

    net, pictures = conv_net(), images()
    given = calibrate(net, Plan([Rule("one.weight", Unstructured(0.5))]), pictures, progress=False)
    assert "one_norm.running_mean" in given.values
    found = recover(net, given, pictures, steps=5, **QUICK)
    assert torch.equal(found.values["one_norm.running_mean"], given.values["one_norm.running_mean"])
    assert "stem.weight" not in found.values and "stem_norm.running_mean" not in found.values


def test_a_tied_embedding_that_is_pruned_stays_one() -> None:
    model, data = Decoder().eval(), texts()
    selection = by_magnitude(model, Plan([Rule("embed.weight", Unstructured(0.5))]), data)
    # A new value may come under any of its names.
    selection.values["head.weight"] = model.embed.weight.detach() * 1.01
    found = recover(model, selection, data, steps=40, **QUICK)
    assert "embed.weight" in found.values and "head.weight" not in found.values
    assert is_plus_zero(found.values["embed.weight"][~selection.mask["embed.weight"].unpack()])
    assert found.recovery is not None and found.recovery.after < found.recovery.before
    assert_transforms(model, found, data[0])


CASES = {
    "neurons": (Decoder, Plan([Rule("up.*.weight", Channels(0.5))])),
    "heads": (Decoder, Plan([Rule("qkv.*.weight", Channels(0.5, unit="outer"))])),
    "channels": (conv_net, Plan([Rule("one.weight", Channels(0.5))])),
    "width": (PostNorm, Plan([Rule("enter.weight", Channels(0.5, unit="mixed"))])),
}


@pytest.mark.parametrize("case", CASES)
def test_slices_go_back_to_their_places(case: str) -> None:
    make, plan = CASES[case]
    model = make().eval()
    data = {PostNorm: vectors(), Decoder: texts(), ConvNet: images()}[type(model)]
    given = by_magnitude(model, plan, data)
    assert given.keep
    found = recover(model, given, data, steps=40, **QUICK)
    assert found.recovery is not None and found.recovery.after < 0.9 * found.recovery.before
    before = model.state_dict()
    cut = [name for name in found.values if "weight" in name and before[name].dim() > 1]
    assert cut
    for name in cut:
        value = found.values[name]
        assert value.shape == before[name].shape
        still = value == before[name]
        # Half the channels left; their slices are whole rows or columns that did not change.
        whole = [still.all(dim=tuple(d for d in range(still.dim()) if d != dim)) for dim in range(still.dim())]
        assert any(int(rows.sum()) >= rows.numel() // 2 for rows in whole[:2]) and not still.all()
    # The whole program with these values, zeroed and shrunk, computes what the student did: its loss is the one told.
    assert_transforms(model, found, data[0])
    again = recover(model, dataclasses.replace(found, recovery=None), data, steps=1, **QUICK)
    assert again.recovery is not None
    assert again.recovery.before == pytest.approx(found.recovery.after, rel=1e-5)


def test_masks_hold_on_what_is_cut() -> None:
    model, data = PostNorm().eval(), vectors()
    cut = by_magnitude(model, Plan([Rule("a.*.weight", Channels(0.5))]), data)
    keeps = {name: torch.rand(model.get_parameter(name).shape) < 0.5 for name in ("a.0.weight", "b.0.weight")}
    masks = {name: PackedMask.pack(keep) for name, keep in keeps.items()}
    found = recover(model, dataclasses.replace(cut, mask=masks), data, steps=20, **QUICK)
    (kept,) = [indices for name, indices in cut.keep.items() if "a.0." in name]
    for name, dim in (("a.0.weight", 0), ("b.0.weight", 1)):
        value, keep = (t.index_select(dim, kept) for t in (found.values[name], keeps[name]))
        assert is_plus_zero(value[~keep]) and bool(value[keep].ne(0).all())
        assert not torch.equal(value[keep], model.get_parameter(name).index_select(dim, kept)[keep])
    assert_transforms(model, found, data[0])


def assert_transforms(model: nn.Module, selection: Selection, batch: Any) -> None:
    """The result that users get is proved equal to the model with these values by transform itself."""
    call = {"kwargs": batch} if isinstance(batch, dict) else {"example_inputs": (batch,)}
    options = {"compile": False, "measure": False}
    result = fxprune.transform(model, selection=selection, options=options, progress=False, **call)
    rows = result.report.checks
    assert rows and all(row.ok for row in rows)
    for name in selection.keep:
        assert name in result.selection.keep


def test_shrunk_training_is_zeroed_training() -> None:
    """Channels cut off train as channels whose slices are held at zero do."""
    model, data = PostNorm().eval(), vectors()
    cut = by_magnitude(model, Plan([Rule("a.*.weight", Channels(0.5))]), data)
    masks = {}
    for layer in range(2):
        (kept,) = [indices for name, indices in cut.keep.items() if f"a.{layer}." in name]
        for name, dim in ((f"a.{layer}.weight", 0), (f"b.{layer}.weight", 1)):
            keep = torch.zeros_like(model.get_parameter(name), dtype=torch.bool)
            keep.index_fill_(dim, kept, True)
            masks[name] = keep
    packed = {name: PackedMask.pack(keep) for name, keep in masks.items()}
    biases = {f"a.{layer}.bias": masks[f"a.{layer}.weight"].any(1) for layer in range(2)}
    packed |= {name: PackedMask.pack(keep) for name, keep in biases.items()}
    small = recover(model, cut, data, steps=20, **QUICK)
    zeroed = recover(model, Selection(mask=packed), data, steps=20, **QUICK)
    assert small.recovery is not None and zeroed.recovery is not None
    assert small.recovery.before == pytest.approx(zeroed.recovery.before, rel=1e-5)
    for name, keep in (masks | biases).items():
        torch.testing.assert_close(small.values[name][keep], zeroed.values[name][keep], rtol=1e-3, atol=1e-4)


def test_dropped_blocks_leave_the_student_alone() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(8, 16)
            self.blocks = nn.ModuleList(Residual() for _ in range(3))
            self.leave = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            for block in self.blocks:
                x = block(x)
            return self.leave(x)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(torch.relu(self.a(x)))

    model, data = Deep().eval(), vectors()
    given = calibrate(model, Plan([Drop("blocks.1"), Rule("blocks.*.weight", Unstructured(0.3))]), data, progress=False)
    assert given.drop == ("blocks.1",)
    found = recover(model, given, data, steps=40, **QUICK)
    assert found.drop == given.drop and not any(name.startswith("blocks.1") for name in found.values)
    assert found.recovery is not None and found.recovery.after < found.recovery.before
    assert_transforms(model, found, data[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, data = PostNorm().eval().to(dtype), [x.to(dtype) for x in vectors()]
    selection = by_magnitude(model, HALF_GONE, data)
    found = recover(model, selection, data, steps=40, **QUICK)
    assert found.recovery is not None and found.recovery.after < 0.7 * found.recovery.before
    assert all(value.dtype is dtype for value in found.values.values())
    # What was measured is what the rounded values give, not what was trained in float32.
    again = recover(model, found, data, steps=1, **QUICK)
    assert again.recovery is not None
    assert again.recovery.before == pytest.approx(found.recovery.after, rel=1e-5)


def test_the_best_values_come_back() -> None:
    model, data = PostNorm().eval(), vectors()
    given = calibrate(model, HALF_GONE, data, progress=False)
    found = recover(model, given, data, steps=20, learning_rate=10.0, progress=False)
    assert found.recovery is not None and found.recovery.after == found.recovery.before
    for name, value in found.values.items():
        assert torch.equal(value, given.apply(name, model.get_parameter(name).detach()))


def test_a_run_is_the_same_under_a_seed() -> None:
    model, data = PostNorm().eval(), vectors()
    selection = by_magnitude(model, HALF_GONE, data)
    runs = [recover(model, selection, data, steps=30, seed=seed, **QUICK) for seed in (0, 0, 1)]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_gradients_may_be_off_around_it() -> None:
    model, data = PostNorm().eval(), vectors()
    selection = by_magnitude(model, HALF_GONE, data)
    plain = recover(model, selection, data, steps=8, **QUICK)
    with torch.no_grad():
        assert same(recover(model, selection, data, steps=8, **QUICK), plain)
    with torch.inference_mode():
        assert same(recover(model, selection, [x.clone() for x in data], steps=8, **QUICK), plain)


def test_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = PostNorm().eval(), vectors()
    selection = by_magnitude(model, HALF_GONE, data)
    set_clock(monkeypatch, seconds=0.01)
    found = recover(model, selection, data, minutes=0.01, **QUICK)
    assert found.recovery is not None and 40 < found.recovery.steps < 60
    assert found.recovery.after < found.recovery.before
    shortest = recover(model, selection, data, minutes=1e-9, **QUICK)
    assert shortest.recovery is not None and shortest.recovery.steps == 1


def test_a_loss_of_ones_own() -> None:
    model, data = Decoder().eval(), texts()
    selection = by_magnitude(model, Plan([Rule("up.*.weight", Unstructured(0.8))]), data)
    seen = []

    def divergence(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        seen.append((set(student), teacher["logits"].requires_grad, student["logits"].requires_grad))
        wanted = teacher["logits"].softmax(-1)
        return -(wanted * student["logits"].log_softmax(-1)).sum(-1).mean()

    found = recover(model, selection, data, steps=20, loss=divergence, **QUICK)
    assert found.recovery is not None and found.recovery.after < found.recovery.before
    assert seen[1] == ({"logits", "argmax"}, False, True)


def test_what_a_mask_leaves_out_does_not_count() -> None:
    """Other tokens at the padding give the same training."""
    model = Decoder().eval()
    data, others = texts(), texts()
    for batch in others:
        batch["ids"][1, -2:] = 7
    assert any(not torch.equal(a["ids"], b["ids"]) for a, b in zip(data, others, strict=True))
    selection = by_magnitude(model, Plan([Rule("up.*.weight", Unstructured(0.8))]), data)
    one, other = (recover(model, selection, d, steps=15, **QUICK) for d in (data, others))
    assert one.recovery is not None and other.recovery is not None
    assert one.recovery.before == pytest.approx(other.recovery.before, rel=1e-6)
    for name, value in one.values.items():
        torch.testing.assert_close(value, other.values[name], rtol=1e-3, atol=1e-5)


class Rows(nn.Module):
    """Words, each in a row of its own, and their mean over a sample, padding and all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.embed(ids).flatten(0, 1)
        rows = rows + self.down(torch.relu(self.up(rows)))
        return rows.sigmoid(), rows.unflatten(0, ids.shape).mean(1) + attention_mask.sum()


def test_padding_among_rows_does_not_count_and_where_it_must_is_told() -> None:
    model = Rows().eval()
    data, others = texts(), texts()
    for batch in others:
        batch["ids"][1, -2:] = 7
    selection = by_magnitude(model, Plan([Rule("up.weight", Unstructured(0.8))]), data)
    found, other = (recover(model, selection, each, steps=3, **QUICK) for each in (data, others))
    assert found.recovery is not None and other.recovery is not None
    program = fxprune.capture.capture.capture(model, (), data[0]).program
    _, mean = (node.name for node in program.graph.output_node().args[0])
    told = f"padding could not be told from text in {mean}, so it counts there as well"
    assert found.recovery.note == told and str(found.recovery).endswith(f"after; {told}")
    assert found.recovery.before != other.recovery.before

    def rows_alone(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
        return student[0].sum() * 0.0

    found, other = (recover(model, selection, each, steps=3, loss=rows_alone, **QUICK) for each in (data, others))
    assert found.recovery is not None and other.recovery is not None
    assert found.recovery.note == "" and found.recovery.before > 0
    assert found.recovery.before == pytest.approx(other.recovery.before, rel=1e-6)


def test_a_model_that_lost_nothing_is_not_trained() -> None:
    model, data = PostNorm().eval(), vectors()
    model.a[0].weight.data[:, :8] = 0
    keep = model.a[0].weight != 0
    selection = Selection(mask={"a.0.weight": PackedMask.pack(keep)})
    found = recover(model, selection, data, steps=20, **QUICK)
    assert found.recovery is not None and (found.recovery.steps, found.recovery.before) == (0, 0.0)


def test_a_group_norm_over_an_image_in_channels_last_ends_nothing() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
    data = [torch.randn(3, 4, 8, 8).to(memory_format=torch.channels_last) for _ in range(4)]
    selection = by_magnitude(model, Plan([Rule("1.weight", Unstructured(0.5))]), data)
    found = recover(model, selection, data, steps=4, **QUICK)
    assert not same(found, selection)

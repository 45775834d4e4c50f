"""Padding: which rows count, whatever order they come in, and what is said where nobody can know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import Plan, Rule, Unstructured
from fxprune.calibration.batches import batch_of, capture_for, read_calls
from fxprune.calibration.calibrate import calibrate
from fxprune.calibration.padding import Padding, counting, find_padding, hides_padding, positions
from fxprune.calibration.recover.matching import Distance
from fxprune.check.compare import outputs
from fxprune.graph.weights import uses
from fxprune.select.selection import Selection

HALF = Plan([Rule("*.weight", Unstructured(0.5))], exclude=("table.weight",))


class Text(nn.Module):
    """`compute` with these parts, called as transformers models are."""

    def __init__(self, compute: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor | None = None) -> Any:
        more = () if decoder_input_ids is None else (decoder_input_ids,)
        return self.compute(self, input_ids, attention_mask, *more)


def net(compute: Callable[..., Any], **parts: nn.Module) -> nn.Module:
    return Text(compute, **parts).eval()


def quietly(model: nn.Module, data: Any, plan: Plan = HALF, **more: Any) -> Selection:
    return calibrate(model, plan, data, progress=False, **more)


def lines(rows: int = 12, length: int = 9, padding: int = 0) -> dict[str, Tensor]:
    """Texts of 3 to `length` tokens, of which the mask hides what follows."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 40, (rows, length), generator=generator)
    sizes = torch.randint(3, length, (rows, 1), generator=generator)
    mask = (torch.arange(length) < sizes).long()
    return {"input_ids": torch.where(mask.bool(), ids, padding), "attention_mask": mask}


def text(batch: dict[str, Tensor]) -> int:
    return int(batch["attention_mask"].sum())


def _torch_attention(m: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    x = m.table(input_ids)
    # The rows of its output product come position by position, as one matrix.
    y, _ = m.attention(x, x, x, key_padding_mask=attention_mask == 0, need_weights=False)
    return m.head(x + y)


def torch_attention() -> Any:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    return net(_torch_attention, table=nn.Embedding(40, 16), attention=attention, head=nn.Linear(16, 4))


def test_rows_that_come_position_by_position() -> None:
    dense, batch = torch_attention(), lines()
    plan = Plan([Rule("attention.out_proj.weight", Unstructured(0.5)), Rule("head.weight", Unstructured(0.5))])
    found = quietly(dense, [batch], plan)
    assert {fit.rows for fit in found.fits.values()} == {text(batch)}
    other = quietly(dense, [lines(padding=7)], plan)
    for name, value in found.values.items():
        torch.testing.assert_close(value, other.values[name], rtol=1e-4, atol=1e-5)


def _translate(m: Any, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
    x = m.encode(m.table(input_ids))
    y = m.decode(m.table(decoder_input_ids))
    seen = (y @ x.mT / 4).masked_fill(attention_mask[:, None] == 0, -torch.inf)
    return m.head(y + seen.softmax(-1) @ x)


def test_the_rows_of_a_decoder_are_not_the_encoders() -> None:
    torch.manual_seed(0)
    parts = dict(encode=nn.Linear(16, 16), decode=nn.Linear(16, 16), head=nn.Linear(16, 4))
    dense = net(_translate, table=nn.Embedding(40, 16), **parts)
    batch = {**lines(), "decoder_input_ids": torch.randint(1, 40, (12, 9))}
    found = quietly(dense, [batch])
    rows = {name: fit.rows for name, fit in found.fits.items()}
    assert rows == {"encode.weight": text(batch), "decode.weight": 12 * 9, "head.weight": 12 * 9}
    assert not any("padding" in fit.note for fit in found.fits.values())


def _windows(m: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    x = m.table(input_ids) * attention_mask.unsqueeze(-1)
    return m.head(m.conv(x.mT).mT.relu())


def test_a_convolution_along_the_text_counts_all_and_says_so() -> None:
    torch.manual_seed(0)
    parts = dict(table=nn.Embedding(40, 16), conv=nn.Conv1d(16, 16, 3, padding=1), head=nn.Linear(16, 4))
    found = quietly(net(_windows, **parts), [lines()])
    # What the mask multiplies by zero is the same whatever stands there, so nothing of it is padding that counts.
    assert found.fits["conv.weight"].rows == 12 * 9
    assert "padding" not in found.fits["conv.weight"].note
    unmasked = net(lambda m, input_ids, attention_mask: m.head(m.conv(m.table(input_ids).mT).mT.relu()), **parts)
    found = quietly(unmasked, [lines()])
    assert "padding could not be told" in found.fits["conv.weight"].note


def _reversed(m: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    x = m.table(input_ids).flip(1)
    return m.q(x) + m.k(x)


def test_padding_in_another_order_is_told_of_every_weight() -> None:
    torch.manual_seed(0)
    dense = net(_reversed, table=nn.Embedding(40, 16), q=nn.Linear(16, 8), k=nn.Linear(16, 8))
    found = quietly(dense, [lines()])
    assert all("padding could not be told" in fit.note and fit.rows == 12 * 9 for fit in found.fits.values())


@pytest.mark.parametrize("hidden", [-torch.inf, -1e4])
def test_masks_that_are_added(hidden: float) -> None:
    """Also one of only zeros, which hides nothing."""

    def forward(m: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = m.table(input_ids)
        return m.head(x + (x @ x.mT / 4 + attention_mask[:, None]).softmax(-1) @ m.v(x))

    torch.manual_seed(0)
    dense = net(forward, table=nn.Embedding(40, 16), v=nn.Linear(16, 16), head=nn.Linear(16, 4))
    some = lines()
    added = torch.zeros(12, 9).masked_fill(some["attention_mask"] == 0, hidden)
    whole = {"input_ids": torch.randint(1, 40, (12, 8)), "attention_mask": torch.zeros(12, 8)}
    found = quietly(dense, [whole, {**some, "attention_mask": added}])
    assert {fit.rows for fit in found.fits.values()} == {12 * 8 + text(some)}


def test_a_mask_without_text_beside_it() -> None:
    dense = net(lambda m, x, mask: m.a(x) * mask.sum(), a=nn.Linear(16, 8), table=nn.Embedding(2, 2))
    found = quietly(dense, [(torch.randn(108, 16), lines()["attention_mask"])])
    assert found.fits["a.weight"].rows == 108


def test_layouts_of_every_kind() -> None:
    model = net(
        lambda m, input_ids, attention_mask: (
            m.same(m.table(input_ids)),
            m.turned(m.table(input_ids).transpose(0, 1).reshape(-1, 8)),
            m.pooled((m.table(input_ids) * attention_mask.unsqueeze(-1)).sum(1)),
            m.mixed(m.table(input_ids).flip(1)),
        ),
        table=nn.Embedding(40, 8),
        **{name: nn.Linear(8, 4) for name in ("same", "turned", "pooled", "mixed")},
    )
    calls = read_calls([lines()])
    captured = capture_for(model, calls)
    batch = batch_of(captured, calls[0])
    places = {name: found[0].x for name, found in uses(captured.program).items() if found[0].kind == "linear"}
    found = find_padding(captured.program, [batch], places.values())
    kinds = {name: found[node.name] for name, node in places.items()}
    assert kinds == {
        "same.weight": Padding.SAMPLES,
        "turned.weight": Padding.TURNED,
        "pooled.weight": Padding.WITHOUT,
        "mixed.weight": Padding.UNKNOWN,
    }
    whole = {"input_ids": torch.ones(3, 4, dtype=torch.int64), "attention_mask": torch.ones(3, 4)}
    assert find_padding(captured.program, [batch_of(captured, read_calls([whole])[0])], places.values()) == {}


def test_positions() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    first = torch.stack([x[0, 0], x[0, 1], x[1, 0]]).unsqueeze(0)
    assert torch.equal(positions(x, valid, Padding.SAMPLES), first)
    assert torch.equal(positions(x.reshape(6, 4), valid, Padding.SAMPLES), first)
    assert torch.equal(positions(x.transpose(0, 1), valid, Padding.TURNED), first[:, [0, 2, 1]])
    assert torch.equal(positions(x.transpose(0, 1).reshape(6, 4), valid, Padding.TURNED), first[:, [0, 2, 1]])
    for padding in (Padding.WITHOUT, Padding.UNKNOWN):
        assert torch.equal(positions(x, valid, padding), x.reshape(1, 6, 4))
    assert torch.equal(positions(x, None, Padding.SAMPLES), x.reshape(1, 6, 4))
    assert positions(torch.ones(4), None, Padding.WITHOUT).shape == (1, 1, 4)
    assert counting((5,), valid, Padding.SAMPLES) is None
    told = [hides_padding(x, valid, padding) for padding in Padding]
    assert told == [False, True, False, True]  # [2, 3, 4] is not [3, 2, 4]


def test_recovery_measures_a_decoders_positions_all() -> None:
    torch.manual_seed(0)
    parts = dict(encode=nn.Linear(16, 16), decode=nn.Linear(16, 16), head=nn.Linear(16, 4))
    dense = net(_translate, table=nn.Embedding(40, 16), **parts)
    calls = read_calls([{**lines(), "decoder_input_ids": torch.randint(1, 40, (12, 9))}])
    captured = capture_for(dense, calls)
    batch = batch_of(captured, calls[0])
    wanted = outputs(captured.program, calls[0])
    found = [wanted[0].clone()]
    hidden = batch.valid is not None and ~batch.valid
    found[0][hidden] += 1.0  # only where the encoder's text has ended
    loss = Distance(captured.program, [], None)(({}, found), ({}, wanted), batch)
    expected = F.mse_loss(found[0], wanted[0]) / wanted[0].var(correction=0)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)

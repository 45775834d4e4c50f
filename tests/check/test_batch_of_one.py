"""Captured with any number of samples, a result takes any other that the model takes, one among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fxprune
from fxprune.errors import InputError
from tests.oracle import assert_close
from tests.structured_oracle import Net

QUICK = {"options": {"compile": False}, "progress": False}
SIZES = (1, 2, 3, 5)


def write_part(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x).clone()
    y[:, 4:] = y[:, 4:].tanh()
    return y


def strided_write(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x).clone()
    y[:, ::2] = 0.5
    return y


SEQUENCE, VECTOR, IMAGE, SIGNAL = (5, 16), (8,), (4, 6, 6), (4, 12)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (
        lambda: Net(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(16, 2, batch_first=True)), SEQUENCE
    ),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), SEQUENCE),
    "encoder of two": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2), SEQUENCE
    ),
    "GRU": (lambda: Net(lambda m, x: m.g(x)[0], g=nn.GRU(16, 8, batch_first=True)), SEQUENCE),
    "LSTM": (lambda: Net(lambda m, x: m.g(x)[0], g=nn.LSTM(16, 8, batch_first=True, bidirectional=True)), SEQUENCE),
    "circular": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), SIGNAL),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), IMAGE),
    "einsum": (
        lambda: Net(
            lambda m, x: torch.einsum("...hi,hio->...ho", m.l(x).unflatten(-1, (2, 4)), m.l.weight.view(2, 4, 8)),
            l=nn.Linear(8, 8),
        ),
        VECTOR,
    ),
    "a part written": (lambda: Net(write_part, linear=nn.Linear(8, 8)), VECTOR),
    "a strided write": (lambda: Net(strided_write, linear=nn.Linear(8, 8)), VECTOR),
    "sdpa": (
        lambda: Net(lambda m, x: F.scaled_dot_product_attention(*m.l(x)[:, None].chunk(3, -1)), l=nn.Linear(16, 24)),
        SEQUENCE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("batch", SIZES[:3])
@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_samples_is_taken(name: str, batch: int, check: bool) -> None:
    make, shape = MODELS[name]
    model = make().eval()
    result = fxprune.transform(model, None, (torch.randn(batch, *shape),), check=check, **QUICK)
    for size in SIZES:
        x = torch.randn(size, *shape)
        assert_close(result(x).detach(), model(x).detach())


@pytest.mark.parametrize("batch", [1, 2])
def test_images_in_channels_last(batch: int) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, stride=2)).eval()
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x = torch.randn(batch, *IMAGE).to(memory_format=torch.channels_last)
    result = fxprune.transform(model, None, (x,), **QUICK)
    for size in SIZES:
        for layout in (torch.channels_last, torch.contiguous_format):
            x = torch.randn(size, *IMAGE).to(memory_format=layout)
            assert_close(result(x).detach(), model(x).detach())


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_what_is_another_model_at_one_sample_is_refused_there(batch: int, check: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.linear(x) * (2 if x.shape[0] == 1 else 1)

    model = Net(forward, linear=nn.Linear(8, 8)).eval()
    result = fxprune.transform(model, None, (torch.randn(batch, 8),), check=check, **QUICK)
    for size in SIZES:
        x = torch.randn(size, 8)
        if (size == 1) == (batch == 1):
            assert_close(result(x).detach(), model(x).detach())
        else:
            with pytest.raises(InputError):
                result(x)


@pytest.mark.parametrize("check", [True, False])
def test_a_model_of_one_sample_alone(check: bool) -> None:
    model = Net(lambda m, x: m.linear(torch.flatten(x)), linear=nn.Linear(8, 8)).eval()
    result = fxprune.transform(model, None, (torch.randn(1, 8),), check=check, **QUICK)
    x = torch.randn(1, 8)
    assert_close(result(x).detach(), model(x).detach())
    with pytest.raises(InputError):
        result(torch.randn(2, 8))
    assert not any("two samples" in note for note in result.report.notes)


def test_a_model_of_one_sample_alone_shrinks(capfd: pytest.CaptureFixture[str]) -> None:
    """With dim 0 dynamic its sizes would not agree, and no channel could leave."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(torch.flatten(m.conv(x).relu()))

    model = Net(forward, conv=nn.Conv2d(4, 16, 3), last=nn.Linear(16 * 16, 4)).eval()
    plan, x = fxprune.Plan([fxprune.Rule("*", fxprune.Channels(0.5, align=1))]), torch.randn(1, *IMAGE)
    result = fxprune.transform(model, plan, (x,), **QUICK)
    assert result.get_parameter("conv.weight").shape == (8, 4, 3, 3)
    assert any("every size is fixed" in note and note.level == "fallback" for note in result.report.notes)
    # torch logs what it tries in vain.
    assert "failed while attempting" not in capfd.readouterr().err


def test_one_input_may_have_another_size_though_another_has_not() -> None:
    def forward(m: Any, x: Tensor, scale: Tensor) -> Tensor:
        return m.linear(x) * scale

    model = Net(forward, linear=nn.Linear(8, 8)).eval()
    result = fxprune.transform(model, None, (torch.randn(4, 8), torch.randn(8)), **QUICK)
    for size in SIZES:
        x, scale = torch.randn(size, 8), torch.randn(8)
        assert_close(result(x, scale).detach(), model(x, scale).detach())


@pytest.mark.parametrize("batch", [1, 2])
def test_what_trains_takes_any_number_too(batch: int) -> None:
    make, shape = MODELS["attention"]
    model = make().eval()
    result = fxprune.transform(model, None, (torch.randn(batch, *shape),), trainable=True, **QUICK)
    for size in SIZES:
        x = torch.randn(size, *shape)
        assert_close(result.eval()(x).detach(), model(x).detach())
        result.train()(x).sum().backward()


def test_the_least_size_that_a_user_names_stays() -> None:
    model = nn.Linear(8, 8).eval()
    shapes = ({0: Dim("batch", min=3)},)
    result = fxprune.transform(model, None, (torch.randn(4, 8),), dynamic_shapes=shapes, **QUICK)
    result(torch.randn(3, 8))
    for size in (1, 2):
        with pytest.raises(InputError, match=">= 3"):
            result(torch.randn(size, 8))


def test_layouts_are_chosen_for_the_sample_that_was_given() -> None:
    from fxprune.lower.layouts.choose import Chooser

    model = nn.Linear(64, 64).eval()
    plan = fxprune.Plan([fxprune.Rule("*", fxprune.Unstructured(0.9))])
    seen: list[Any] = []
    choose = Chooser.choose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chooser, "choose", lambda self, site: (seen.append(site.tokens), choose(self, site))[1])
        fxprune.transform(model, plan, (torch.randn(1, 64),), **QUICK)
    assert seen == [(1,)]

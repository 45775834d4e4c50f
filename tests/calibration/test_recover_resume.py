"""Recovery that is interrupted and goes on, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune import Channels, Plan, Rule, Unstructured
from fxprune.calibration.recover.recover import recover
from fxprune.errors import FxPruneError, InputError
from fxprune.select.mask import PackedMask
from fxprune.select.selection import Selection
from tests.calibration.recover_models import Decoder, PostNorm, by_magnitude, same, set_clock, texts, vectors

PLAN = Plan([Rule("?.*.weight", Unstructured(0.5))])
QUICK: dict[str, Any] = {"learning_rate": 3e-3, "progress": False}


class Stops(list[Tensor]):
    """A list that a user interrupts once `left` items were taken."""

    left = 10**9

    def __getitem__(self, index: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def model() -> PostNorm:
    torch.manual_seed(0)
    return PostNorm().eval()


@pytest.fixture(scope="module")
def selection(model: PostNorm) -> Selection:
    return by_magnitude(model, PLAN, vectors())


@pytest.mark.parametrize(("taken", "written"), [(24, 0), (47, 25), (55, 35)])
def test_an_interrupted_run_goes_on_to_the_same_end(
    model: PostNorm, selection: Selection, tmp_path: Path, taken: int, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.pt"
    data = Stops(vectors())
    whole = recover(model, selection, data, steps=40, **QUICK)
    data.left = taken
    with pytest.raises(KeyboardInterrupt):
        recover(model, selection, data, steps=40, checkpoint=file, **QUICK)
    assert file.exists() and [f.name for f in tmp_path.iterdir()] == ["run.pt"]
    data.left = 20 + 40 - written  # the look at the data, and the steps since the file was written
    resumed = recover(model, selection, data, steps=40, checkpoint=file, **QUICK)
    assert data.left == 0
    data.left = 10**9
    assert same(whole, resumed)
    assert whole.recovery is not None and resumed.recovery is not None
    told = [dataclasses.replace(s.recovery, seconds=0.0) for s in (whole, resumed) if s.recovery is not None]
    assert told[0] == told[1]

    def never(*_: Any) -> None:
        raise AssertionError("a finished run must not run the model")

    monkeypatch.setattr(PostNorm, "forward", never)
    again = recover(model, selection, data, steps=40, checkpoint=file, **QUICK)
    assert same(whole, again) and again.recovery == resumed.recovery


def test_a_generator_goes_on_where_it_was(model: PostNorm, selection: Selection, tmp_path: Path) -> None:
    def stream(stop: int) -> Iterator[Tensor]:
        for index, x in enumerate(vectors(80)):
            if index == stop:
                raise KeyboardInterrupt
            yield x

    file = tmp_path / "run.pt"
    whole = recover(model, selection, stream(-1), steps=60, **QUICK)
    with pytest.raises(KeyboardInterrupt):
        recover(model, selection, stream(50), steps=60, checkpoint=file, **QUICK)
    assert same(whole, recover(model, selection, stream(-1), steps=60, checkpoint=str(file), **QUICK))


def test_slices_come_back_from_a_file(tmp_path: Path) -> None:
    net, data, file = PostNorm().eval(), Stops(vectors()), tmp_path / "run.pt"
    cut = by_magnitude(net, Plan([Rule("a.*.weight", Channels(0.5))]), data)
    whole = recover(net, cut, data, steps=20, **QUICK)
    data.left = 35
    with pytest.raises(KeyboardInterrupt):
        recover(net, cut, data, steps=20, checkpoint=file, **QUICK)
    data.left = 10**9
    for _ in range(2):
        assert same(whole, recover(net, cut, data, steps=20, checkpoint=file, **QUICK))


def test_minutes_go_on_from_what_was_spent(
    model: PostNorm, selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, seconds=1.0)
    data, file = Stops(vectors()), tmp_path / "run.pt"
    whole = recover(model, selection, data, minutes=1.0, **QUICK)
    assert whole.recovery is not None and 40 < whole.recovery.steps < 60 and whole.recovery.seconds == 60
    data.left = 50
    with pytest.raises(KeyboardInterrupt):
        recover(model, selection, data, minutes=1.0, checkpoint=file, **QUICK)
    data.left = 10**9
    resumed = recover(model, selection, data, minutes=1.0, checkpoint=file, **QUICK)
    assert resumed.recovery is not None and resumed.recovery.steps == whole.recovery.steps
    assert same(whole, resumed)


def test_a_file_of_another_run(model: PostNorm, selection: Selection, tmp_path: Path) -> None:
    file, data = tmp_path / "run.pt", vectors()
    recover(model, selection, data, steps=2, checkpoint=file, **QUICK)
    other_model = PostNorm().eval()
    other_model.load_state_dict(model.state_dict())
    other_model.leave.bias.data[0] += 1
    other_mask = Selection(mask={**selection.mask, "a.0.weight": PackedMask.pack(torch.rand(32, 16) < 0.5)})
    other_value = dataclasses.replace(selection, values={"leave.bias": torch.zeros(5)})
    for changed in (
        {"model": other_model},
        {"selection": other_mask},
        {"selection": other_value},
        {"batches": vectors(seed=2)},
        {"steps": 3},
        {"steps": None, "minutes": 0.1},
        {"seed": 1},
        {"learning_rate": 1e-3},
        {"loss": nn.functional.mse_loss},
    ):
        arguments = {"model": model, "selection": selection, "batches": data, "steps": 2, **QUICK, **changed}
        with pytest.raises(InputError, match=r"checkpoint at checkpoint='.*run.pt': it is of another model"):
            recover(checkpoint=file, **arguments)


def test_files_that_are_none(model: PostNorm, selection: Selection, tmp_path: Path) -> None:
    damaged, foreign = tmp_path / "damaged.pt", tmp_path / "foreign.pt"
    damaged.write_bytes(b"no checkpoint")
    torch.save({"state": torch.zeros(1)}, foreign)
    for file, words in (
        (damaged, "it cannot be read"),
        (foreign, "it holds no recovery"),
        (tmp_path, "it is a folder"),
        (tmp_path / "none" / "run.pt", "its folder does not exist"),
    ):
        with pytest.raises(InputError, match=f"cannot use a checkpoint at checkpoint='.*': {words}"):
            recover(model, selection, vectors(), steps=2, checkpoint=file, **QUICK)


def bad(**changed: Any) -> dict[str, Any]:
    return {"batches": vectors(4), "steps": 2, "progress": False, **changed}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (bad(batches=[]), "cannot train without data at batches="),
        (bad(batches=iter([])), "cannot train without data at batches="),
        (bad(batches=vectors(1)), "cannot train on one batch at batches="),
        (bad(batches=vectors(1)[0]), "cannot read batches from a Tensor at batches="),
        (bad(batches=7), "cannot read batches from a int at batches="),
        (bad(batches=[1, 2, 3]), r"cannot use a int as a batch at batches\[0\]"),
        (bad(batches=[(x, torch.zeros(16)) for x in vectors(3)]), r"cannot run the model on a batch at batches\[0\]"),
        (bad(steps=0), "steps=0"),
        (bad(steps=2.5), r"steps=2\.5"),
        (bad(steps=None, minutes=0), "minutes=0"),
        (bad(minutes=-1.0), r"minutes=-1\.0"),
        (bad(minutes=float("nan")), "minutes=nan"),
        (bad(minutes="5"), "minutes='5'"),
        (bad(minutes=float("inf")), "minutes=inf"),
        (bad(learning_rate=0.0), r"learning_rate=0\.0"),
        (bad(seed=0.5), r"seed=0\.5"),
        (bad(loss="mse"), "cannot train with a str as loss at loss="),
        (bad(loss=lambda a, b: (a - b) ** 2), r"loss at loss=: it returned a tensor \[16, 5\]"),
        (bad(loss=lambda a, b: 0.5), "loss at loss=: it returned a float"),
        (bad(selection=PLAN), "cannot use a Plan as a selection at selection="),
        (bad(selection=Selection()), "cannot recover a model that is not pruned at selection="),
        (
            bad(selection=Selection(mask={"a.0.weight": PackedMask.pack(torch.ones(32, 16, dtype=torch.bool))})),
            "cannot recover a model that is not pruned at selection=",
        ),
        (
            bad(selection=Selection(mask={"c.weight": PackedMask.pack(torch.zeros(2, 2, dtype=torch.bool))})),
            'cannot replay the selection at "c.weight"',
        ),
        (
            bad(selection=Selection(mask={"a.0.weight": PackedMask.pack(torch.zeros(2, 2, dtype=torch.bool))})),
            r'cannot replay the selection at "a.0.weight" \[32, 16\]: its mask has shape \[2, 2\]',
        ),
        (bad(selection=Selection(keep={"c": torch.arange(2)})), 'cannot replay the selection at group "c"'),
        (bad(model=nn.Linear(8, 5)), "cannot transform a model in training mode"),
        (bad(model=nn.Linear(8, 5, device="meta").eval()), "cannot transform a model on the meta device"),
        (bad(model=torch.relu), "cannot transform a builtin_function_or_method"),
    ],
)
def test_what_is_refused(model: PostNorm, selection: Selection, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(FxPruneError, match=words):
        recover(**{"model": model, "selection": selection, **changed})


def test_values_that_do_not_fit(model: PostNorm, selection: Selection) -> None:
    wrong = dataclasses.replace(selection, values={"leave.bias": torch.zeros(6)})
    with pytest.raises(InputError, match=r'"leave.bias" \[5\]: its new value has shape \[6\]'):
        recover(model, wrong, vectors(4), steps=2, progress=False)


def test_numbers_that_are_not_finite(model: PostNorm, selection: Selection) -> None:
    data = vectors(20)
    data[0][:] = torch.inf
    with pytest.raises(InputError, match=r"cannot measure how far .* at batches\[0\]: one of them gives NaN there"):
        recover(model, selection, data, steps=20, progress=False)
    data = [vectors(1)[0], *(torch.full((16, 8), torch.nan) for _ in range(19))]
    with pytest.raises(InputError, match=r"cannot go on training at batches\[\d+\]: .* in 10 steps"):
        recover(model, selection, data, steps=20, progress=False)


def test_a_model_without_real_numbers_to_compare() -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Parameter(torch.randn(50, 8))

        def forward(self, ids: Tensor) -> Tensor:
            return torch.einsum("bsd,wd->bsw", self.embed(ids), self.head).argmax(-1)

    net, data = Choice().eval(), [batch["ids"] for batch in texts(4)]
    chosen = by_magnitude(net, Plan([Rule("head", Unstructured(0.5))]), data)
    with pytest.raises(InputError, match="neither an output nor a residual sum holds real numbers"):
        recover(net, chosen, data, steps=2, progress=False)


def test_a_loss_that_loses_its_gradients() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Parameter(torch.randn(50, 8))

        def forward(self, ids: Tensor) -> Tensor:
            return torch.einsum("bsd,wd->bsw", self.embed(ids), self.head)

    net, data = Plain().eval(), [batch["ids"] for batch in texts(4)]
    chosen = by_magnitude(net, Plan([Rule("head", Unstructured(0.5))]), data)
    with pytest.raises(InputError, match="the loss does not depend on any parameter"):
        recover(net, chosen, data, steps=2, loss=lambda a, b: (a.detach() - b).square().mean(), progress=False)


def test_data_on_another_device() -> None:
    net, data = Decoder().eval(), texts(4)
    chosen = by_magnitude(net, Plan([Rule("up.*.weight", Unstructured(0.5))]), data)
    elsewhere = [{name: x.to("meta") for name, x in batch.items()} for batch in data]
    with pytest.raises(InputError, match="another device"):
        recover(net, chosen, elsewhere, steps=2, progress=False)

"""What calibration reads and remembers: forms of data, padding, samples, and interrupted calibrations that go on."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxprune import Channels, Plan, Rule, Unstructured
from fxprune.calibration.batches import capture_for, read_calls
from fxprune.calibration.calibrate import calibrate
from fxprune.calibration.rebatch import cut
from fxprune.errors import InputError
from fxprune.select.selection import Selection
from tests.calibration.calibrate_case import HALF, differ, model, tensors_of
from tests.structured_oracle import net

calibrate_file = importlib.import_module("fxprune.calibration.calibrate")


def quietly(model: nn.Module, plan: Plan | None, data: Any, method: str = "refit", **more: Any) -> Selection:
    return calibrate(model, plan, data, method, progress=False, **more)


class Text(nn.Module):
    """Tokens of several lengths: what padding holds reaches no other position."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(40, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.q, self.k, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids)
        seen = (self.q(x) @ self.k(x).transpose(1, 2) / 4).masked_fill(attention_mask[:, None] == 0, -torch.inf)
        x = x + seen.softmax(-1) @ x
        x = x + self.b(self.a(x).relu())
        return self.head(x)


PLAN = Plan([Rule("[abqk].weight", Unstructured(0.5)), Rule("head.weight", Unstructured(0.5))])


def texts(padding: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """The same texts of 5 and of 9 tokens: of one length with `padding` at the end, and without."""
    short, long = torch.randint(1, 40, (20, 5)), torch.randint(1, 40, (20, 9))
    plain = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in (short, long)]
    ids, mask = torch.full((40, 9), padding), torch.zeros(40, 9, dtype=torch.int64)
    ids[:20, :5], ids[20:], mask[:20, :5], mask[20:] = short, long, 1, 1
    return plain, [{"input_ids": ids, "attention_mask": mask}]


def test_padding_does_not_count() -> None:
    torch.manual_seed(1)
    dense = Text().eval()
    plain, padded = texts(0)
    for method in ("refit", "magnitude"):
        one, other = quietly(dense, PLAN, plain, method), quietly(dense, PLAN, padded, method)
        assert differ(one, other) < 1e-5
        assert {n: f.rows for n, f in one.fits.items()} == {n: f.rows for n, f in other.fits.items()}
        assert one.fits["a.weight"].rows == 20 * 14
    without = [{**padded[0], "attention_mask": torch.ones_like(padded[0]["attention_mask"])}]
    with pytest.raises(AssertionError):
        assert differ(quietly(dense, PLAN, plain), quietly(dense, PLAN, without)) < 1e-3


def test_nan_in_padding_does_not_count() -> None:
    dense = Text().eval()
    _, padded = texts(0)
    expected = quietly(dense, PLAN, padded)
    with torch.no_grad():
        dense.table.weight[0] = 3e38
        assert not bool(dense(**padded[0]).isfinite().all())
    assert differ(expected, quietly(dense, PLAN, padded)) < 1e-5


def test_every_form_of_a_batch() -> None:
    def forward(m: Any, x: Tensor, scale: Tensor) -> Tensor:
        return m.b(m.a(x).relu() * scale)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return forward(self, x, scale)

    dense, x, scale = Two().eval(), torch.randn(12, 8), torch.rand(12, 1)
    expected = quietly(dense, HALF, [(x, scale)])
    forms: list[Any] = [
        [[x, scale]],
        [{"x": x, "scale": scale}],
        [((x,), {"scale": scale})],
        ((x[i : i + 4], scale[i : i + 4]) for i in (0, 4, 8)),
        DataLoader(TensorDataset(x, scale), batch_size=5),
        [(x[:3], scale[:3]), {"x": x[3:], "scale": scale[3:]}],
    ]
    for form in forms[:-1]:
        assert differ(expected, quietly(dense, HALF, form)) == 0
    assert differ(expected, quietly(dense, HALF, forms[-1])) < 1e-4
    single = net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(8, 8), b=nn.Linear(8, 4))
    assert differ(quietly(single, HALF, [x]), quietly(single, HALF, x.split(5))) == 0


def test_samples_are_the_first_so_many() -> None:
    dense, x = model("linear")
    expected = quietly(dense, HALF, [x[:10]])
    assert differ(expected, quietly(dense, HALF, x.split(4), samples=10)) == 0
    taken: list[int] = []

    def endless() -> Any:
        while True:
            taken.append(1)
            yield x[:4]

    assert quietly(dense, HALF, endless(), samples=9).fits["a.weight"].rows == 9
    assert len(taken) == 3


def test_batches_of_many_sizes() -> None:
    dense, x = model("tokens")
    data = [x[:4, :7], x[4:9, :3], x[9:10], x[10:]]
    found = quietly(dense, HALF, data)
    assert found.fits["a.weight"].rows == 4 * 7 + 5 * 3 + 10 + 14 * 10
    assert differ(found, quietly(dense, HALF, [x[:4, :7], x[4:9, :3], x[9:]])) == 0


def test_samples_that_see_each_other_stay_together() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b((m.a(x) - m.a(x).mean(0)).relu())

    dense, x = net(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 4)), torch.randn(30, 8)
    one, other = quietly(dense, HALF, [x]), quietly(dense, HALF, x.split(10))
    assert float((one.values["b.weight"] - other.values["b.weight"]).abs().max()) > 1e-4


def test_statistics_of_the_batch_keep_samples_together() -> None:
    """Also where every batch has one sample, and where the first two are the same, which tell nothing."""
    parts = dict(a=nn.Conv1d(4, 8, 3), norm=nn.BatchNorm1d(8, track_running_stats=False), b=nn.Conv1d(8, 4, 1))
    dense = net(lambda m, x: m.b(m.norm(m.a(x)).relu()), **parts)
    x = torch.randn(6, 4, 9)
    for data in (list(x.split(1)), [torch.cat([x[:1], x[:1]]), x]):
        calls = read_calls(data)
        batches = cut(capture_for(dense, calls), calls)
        assert [batch.flat[0].shape[0] for batch in batches] == [len(part) for part in data]


def test_single_numbers_are_no_samples() -> None:
    dense = net(lambda m, x, t: m.a(x * t), a=nn.Linear(8, 4))
    data = [(torch.randn(32, 8), torch.tensor(2.0)) for _ in range(2)]
    assert quietly(dense, HALF, data, samples=40).fits["a.weight"].rows == 40
    whole = quietly(dense, HALF, data)
    assert differ(whole, quietly(dense, HALF, [(part, t) for x, t in data for part in x.split(5)])) == 0
    data[1] = (data[1][0], torch.tensor(3.0))
    assert differ(whole, quietly(dense, HALF, [(data[0][0], data[0][1]), (data[1][0] * 1.5, torch.tensor(2.0))])) > 0
    assert quietly(dense, HALF, data).fits["a.weight"].rows == 64


def test_what_surrounds_the_call_changes_nothing() -> None:
    dense, x = model("tokens")
    expected = quietly(dense, HALF, [x])
    with torch.autocast("cpu", torch.bfloat16):
        assert differ(expected, quietly(dense, HALF, [x])) == 0
    with torch.inference_mode():
        assert differ(expected, quietly(dense, HALF, [x])) == 0
        assert differ(expected, quietly(dense, HALF, [x.clone()])) == 0


def test_a_selection_is_saved_as_tensors_are(tmp_path: Path) -> None:
    dense, x = model("attention")
    plan = Plan([Rule("*", Unstructured(0.5)), Rule("v.weight", Channels(0.5, align=1))])
    found = quietly(dense, plan, [x])
    torch.save(found, tmp_path / "selection.pt")
    again = torch.load(tmp_path / "selection.pt", weights_only=True)
    assert differ(found, again) == 0 and again.fits == found.fits and again.asked == found.asked


# --- checkpoints -------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_after(count: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets `count` weights be fitted, and raises at the next."""
    real, done = calibrate_file.fit_weight, []

    def fit(entry: Any, *rest: Any) -> Any:
        if len(done) == count:
            raise error
        done.append(entry.layer.name)
        return real(entry, *rest)

    monkeypatch.setattr(calibrate_file, "fit_weight", fit)
    return done


CASES = {
    "tokens": HALF,
    "attention": Plan([Rule("*", Unstructured(0.5)), Rule("v.weight", Channels(0.5, align=1))]),
    "conv and norm": HALF,
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_interrupted_calibration_goes_on(kind: str, error: Any, tmp_path: Path, monkeypatch: Any) -> None:
    dense, x = model(kind)
    before, plan, file = tensors_of(dense), CASES[kind], tmp_path / "calibration.pt"
    expected = quietly(dense, plan, [x])
    fitted = len([f for f in expected.fits.values() if f.rows])
    for count in (0, 1, fitted - 1):
        file.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            stop_after(count, error, patch)
            with pytest.raises(error):
                quietly(dense, plan, [x], checkpoint=file)
        with monkeypatch.context() as patch:
            done = stop_after(-1, error, patch)
            found = quietly(dense, plan, x.split(7), checkpoint=str(file))
            assert differ(expected, found) == 0 and found.fits == expected.fits
            assert quietly(dense, plan, [x], checkpoint=file).fits == expected.fits
            # What a segment had not finished is fitted anew; what was finished is not, and nothing is the third time.
            assert len(done) == fitted if count == 0 else len(done) <= fitted
            assert len(done) < fitted or count < fitted - 1
    assert tensors_of(dense) == before and [path.name for path in tmp_path.iterdir()] == ["calibration.pt"]


def test_weights_of_several_places_go_on_too(tmp_path: Path, monkeypatch: Any) -> None:
    dense = net(lambda m, x: m.b(m.a(m.a(x).relu())), a=nn.Linear(8, 8), b=nn.Linear(8, 4))
    x, file = torch.randn(30, 8), tmp_path / "c.pt"
    expected = quietly(dense, HALF, [x], checkpoint=file)
    monkeypatch.setattr(calibrate_file, "fit_shared", None)
    monkeypatch.setattr(calibrate_file, "fit_weight", None)
    found = quietly(dense, HALF, [x], checkpoint=file)
    assert differ(expected, found) == 0 and found.fits == expected.fits


def test_a_checkpoint_is_of_one_calibration(tmp_path: Path) -> None:
    dense, x = model("linear")
    file = tmp_path / "c.pt"
    quietly(dense, HALF, [x], checkpoint=file)
    held = file.read_bytes()
    other, _ = model("linear")
    with torch.no_grad():
        other.load_state_dict(dense.state_dict())
        other.c.bias[0] += 1e-3
    same_tensors = net(
        lambda m, x: m.c(m.b(m.a(x).tanh()).relu()), a=nn.Linear(16, 32), b=nn.Linear(32, 16), c=nn.Linear(16, 8)
    )
    same_tensors.load_state_dict(dense.state_dict())
    changed = x.clone()
    changed[3, 2] += 1e-3
    tries: list[tuple[Any, ...]] = [
        (other, HALF, [x], "refit"),
        (same_tensors, HALF, [x], "refit"),
        (dense, Plan([Rule("*", Unstructured(0.51))]), [x], "refit"),
        (dense, Plan([Rule("*", Unstructured(0.5, per_row=True))]), [x], "refit"),
        (dense, Plan([Rule("a.weight", Unstructured(0.5))]), [x], "refit"),
        (dense, HALF, [changed], "refit"),
        (dense, HALF, [x.flip(0)], "refit"),
        (dense, HALF, [x[:-1]], "refit"),
        (dense, HALF, [x], "admm"),
    ]
    for case in tries:
        with pytest.raises(InputError) as caught:
            quietly(*case, checkpoint=file)
        assert caught.value.what == "cannot use a checkpoint" and repr(str(file)) in caught.value.where
        assert "another model" in caught.value.why and "delete this one" in caught.value.do
    assert file.read_bytes() == held
    assert quietly(dense, HALF, x.split(6), checkpoint=file).fits


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "cut", "other"])
def test_a_damaged_checkpoint(content: Any, tmp_path: Path) -> None:
    dense, x = model("linear")
    file = tmp_path / "c.pt"
    quietly(dense, HALF, [x], checkpoint=file)
    if content == "other":
        torch.save({"weights": torch.ones(3)}, file)
    else:
        file.write_bytes(file.read_bytes()[:-400] if content == "cut" else content)
    with pytest.raises(InputError) as caught:
        quietly(dense, HALF, [x], checkpoint=file)
    assert caught.value.what == "cannot use a checkpoint" and "c.pt" in caught.value.where
    assert ("it holds no calibration" in caught.value.why) == (content == "other")


def test_places_where_no_checkpoint_can_be(tmp_path: Path) -> None:
    dense, x = model("linear")
    with pytest.raises(InputError, match="folder does not exist") as caught:
        quietly(dense, HALF, [x], checkpoint=tmp_path / "nowhere" / "c.pt")
    assert "nowhere" in caught.value.where
    with pytest.raises(InputError, match="it is a folder"):
        quietly(dense, HALF, [x], checkpoint=tmp_path)
    with pytest.raises(InputError, match="cannot use a int as a checkpoint"):
        quietly(dense, HALF, [x], checkpoint=3)


def test_a_folder_that_fills_up_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    dense, x = model("linear")
    file = tmp_path / "c.pt"
    expected = quietly(dense, HALF, [x])
    real, saves = torch.save, []

    def save(value: Any, target: Any) -> None:
        saves.append(target)
        if len(saves) == 2:
            Path(target).write_bytes(b"half a file")
            raise OSError("no space left on device")
        real(value, target)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(OSError):
            quietly(dense, HALF, [x], checkpoint=file)
    found = quietly(dense, HALF, [x], checkpoint=file)
    assert differ(expected, found) == 0


class Timed(nn.Module):
    """Inputs beside which a number stands for each sample: a label, a time step, a length."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.a, self.b = nn.Embedding(10, 32), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return self.b((self.a(x) + self.steps(step)).relu())


@pytest.mark.parametrize("method", ["refit", "magnitude", "wanda"])
def test_a_number_for_each_sample(method: str) -> None:
    torch.manual_seed(0)
    dense = Timed().eval()
    data = [(torch.randn(6, 16), torch.randint(10, (6,))) for _ in range(8)]
    found = quietly(dense, HALF_OF_ALL, data, method)
    assert set(found.mask) == {"a.weight", "b.weight"}
    joined = [tuple(torch.cat(column) for column in zip(*data, strict=True))]
    assert differ(found, quietly(dense, HALF_OF_ALL, joined, method)) < 1e-5


@pytest.mark.parametrize("method", ["refit", "magnitude"])
def test_samples_without_a_batch(method: str) -> None:
    torch.manual_seed(0)
    dense, together = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), torch.randn(60, 16)
    found = quietly(dense, HALF_OF_ALL, list(together), method)
    assert differ(found, quietly(dense, HALF_OF_ALL, [together], method)) < 1e-4


HALF_OF_ALL = Plan([Rule("*.weight", Unstructured(0.5))])

"""The choice of a layout by what was measured. Times here are made up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxprune.capture.capture import capture
from fxprune.kernels import native
from fxprune.kernels.native import build
from fxprune.lower.layouts import LAYOUTS, choose, remember
from fxprune.lower.layouts.choose import MARGIN, Chooser
from fxprune.lower.layouts.remember import Choices, choices_of
from fxprune.lower.layouts.site import Choice, Site, Timing
from fxprune.lower.lower import lower
from fxprune.lower.nets import known
from fxprune.measure.timing import Samples

WEIGHT = torch.randn(64, 64) * (torch.rand(64, 64) < 0.1)


def site(*tokens: int) -> Site:
    return Site("weight", "node", WEIGHT, None, tokens, "")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Choice]:
    """What is chosen by these seconds for each number of tokens: of two dense forms, and packed."""
    monkeypatch.setattr(choose, "LAYOUTS", {"nonzeros": LAYOUTS["nonzeros"]})
    monkeypatch.setattr(choose, "best_dense", lambda site, x: [lambda: x, lambda: x])

    def choice(*seconds: Sequence[float]) -> Choice:
        taken = iter(seconds)
        monkeypatch.setattr(choose, "_times", lambda *_: (list(next(taken)), True))
        return Chooser().choose(site(*range(1, 1 + len(seconds))))[0]

    return choice


def test_a_layout_that_clearly_wins_is_taken(chosen: Callable[..., Choice]) -> None:
    choice = chosen((3.0, 3.0, 1.0), (3.0, 3.0, 2.0))
    assert choice.layout == "nonzeros" and "2.12x dense at 1/2 tokens" in choice.why


def test_a_layout_that_hardly_wins_is_refused(chosen: Callable[..., Choice]) -> None:
    assert MARGIN > 1.0 and chosen((1.0, 1.0, 1.0)).layout == "dense"
    choice = chosen((1.02, 1.02, 1.0))
    assert choice.layout == "dense" and "1.02x dense" in choice.refused["nonzeros"]


def test_a_layout_that_loses_at_one_size_is_refused(chosen: Callable[..., Choice]) -> None:
    """However much it wins at the others."""
    assert chosen((9.0, 9.0, 1.0), (1.0, 1.0, 1.1)).layout == "dense"
    assert chosen((1.0, 1.0, 1.1), (9.0, 9.0, 1.0)).layout == "dense"


def test_the_faster_dense_form_is_what_a_layout_must_beat(chosen: Callable[..., Choice]) -> None:
    for dense in ((4.0, 1.0), (1.0, 4.0)):
        assert chosen((*dense, 2.0)).layout == "dense"
        assert chosen((*dense, 0.5)).layout == "nonzeros"


@pytest.mark.parametrize(("model_bytes", "thrifty"), [(1, False), (1 << 40, True)])
@pytest.mark.parametrize("worse", [1.14, 1.16])
def test_of_layouts_alike_in_speed_the_smallest_is_taken_where_weights_come_from_memory(
    monkeypatch: pytest.MonkeyPatch, model_bytes: int, thrifty: bool, worse: float
) -> None:
    small, large = "bitmap", "nonzeros"
    monkeypatch.setattr(choose, "LAYOUTS", {name: LAYOUTS[name] for name in (large, small)})
    packed = {name: LAYOUTS[name].pack(site(1)).bytes() for name in (small, large)}
    assert packed[small] < packed[large]
    seconds = {large: 1.0, small: worse}
    monkeypatch.setattr(choose, "best_dense", lambda site, x: [lambda: x])
    monkeypatch.setattr(choose, "_times", lambda *_: ([3.0, *seconds.values()], True))
    choice, _ = Chooser(model_bytes=model_bytes).choose(site(1))
    assert choice.layout == (small if thrifty and worse < 1 / 0.87 else large)
    assert (choice.layout == small) == ("smaller than nonzeros, which is 3.00x" in choice.why)
    # None that is too slow by itself.
    monkeypatch.setattr(choose, "_times", lambda *_: ([1.06, 1.0, 1.02], True))
    assert Chooser(model_bytes=model_bytes).choose(site(1))[0].layout == large


def test_one_that_wins_at_every_size_is_taken_where_the_fastest_loses_at_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "LAYOUTS", {name: LAYOUTS[name] for name in ("nonzeros", "bitmap")})
    monkeypatch.setattr(choose, "best_dense", lambda site, x: [lambda: x])
    taken = iter([[1.0, 0.1, 0.5], [1.0, 1.5, 0.9]])
    monkeypatch.setattr(choose, "_times", lambda *_: (next(taken), True))
    assert Chooser().choose(site(1, 2))[0].layout == "bitmap"


def test_what_was_measured_at_other_sizes_is_not_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "LAYOUTS", {"nonzeros": LAYOUTS["nonzeros"]})
    monkeypatch.setattr(choose, "_times", lambda functions, *_: ([2.0] * (len(functions) - 1) + [1.0], True))
    chooser = Chooser()
    assert [chooser.choose(site(*tokens))[0].reused for tokens in ((1,), (8,), (1, 8), (8,))] == [False] * 3 + [True]


@pytest.mark.parametrize(("model_bytes", "layout"), [(1000, "nonzeros"), (1001, "dense")])
def test_a_layer_is_timed_with_its_weights_in_the_cache_where_the_whole_model_fits(
    model_bytes: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interleave(functions: Sequence[Callable[[], Tensor]], **_: object) -> tuple[list[Samples], bool]:
        dense = [Samples([2.0], [1.0]) for _ in functions[:-1]]
        return [*dense, Samples([1.0], [2.0])], True

    monkeypatch.setattr(choose, "LAYOUTS", {"nonzeros": LAYOUTS["nonzeros"]})
    monkeypatch.setattr(choose, "interleave_steady", interleave)
    monkeypatch.setattr(choose, "cache_bytes", lambda: 1000)
    assert Chooser(model_bytes=model_bytes).choose(site(4))[0].layout == layout


@pytest.fixture
def memory_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("FXPRUNE_REMEMBER", "1")
    monkeypatch.setattr(remember, "cached", lambda name: tmp_path / name)
    remember._choices_of.cache_clear()
    yield
    remember._choices_of.cache_clear()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch, memory_of_its_own: None) -> list[tuple[list[float], bool]]:
    """What is measured next, beside a memory of the test's own."""
    measured: list[tuple[list[float], bool]] = []
    monkeypatch.setattr(choose, "LAYOUTS", {"nonzeros": LAYOUTS["nonzeros"]})
    monkeypatch.setattr(choose, "best_dense", lambda site, x: [lambda: x])
    monkeypatch.setattr(choose, "_times", lambda *_: measured.pop(0))
    return measured


def the_file() -> Path:
    memory = choices_of(torch.device("cpu"))
    assert memory is not None
    return memory.file


@pytest.mark.parametrize(("dense", "layout"), [(3.0, "nonzeros"), (1.0, "dense")])
def test_what_was_measured_on_a_cpu_outlives_the_process(
    taken: list[tuple[list[float], bool]], dense: float, layout: str
) -> None:
    taken.append(([dense, 2.0], True))
    first, _ = Chooser().choose(site(4))
    again, packed = Chooser().choose(site(4))
    assert first.layout == again.layout == layout and (first.reused, again.reused) == (False, True)
    assert again.timings == first.timings and again.refused == first.refused
    assert (packed is not None) == (layout == "nonzeros")


def test_what_a_busy_cpu_measured_is_for_this_process_alone(taken: list[tuple[list[float], bool]]) -> None:
    taken.extend([([3.0, 2.0], False), ([1.0, 2.0], True)])
    chooser = Chooser()
    assert chooser.choose(site(4))[0].layout == chooser.choose(site(4))[0].layout == "nonzeros"
    assert Chooser().choose(site(4))[0].layout == "dense" and not taken
    # One size of several is enough.
    taken.extend([([3.0, 2.0], False), ([3.0, 2.0], True)])
    Chooser().choose(site(1, 8))
    assert len(json.loads(the_file().read_text())) == 1


def test_what_differs_is_measured_by_itself(taken: list[tuple[list[float], bool]]) -> None:
    """By threads, sizes, zeros, and whether the model fits into a core's cache."""
    taken.extend([([3.0, 2.0], True)] * 5)
    Chooser().choose(site(4))
    torch.set_num_threads(2)
    Chooser().choose(site(4))
    torch.set_num_threads(1)
    Chooser().choose(site(5))
    Chooser(model_bytes=0).choose(site(4))
    Chooser().choose(dataclasses.replace(site(4), weight=WEIGHT * (torch.rand(64, 64) < 0.4)))
    assert not taken and Chooser().choose(site(4))[0].reused


def test_another_cpu_or_another_kernel_has_another_file(
    taken: list[tuple[list[float], bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {the_file()}
    status = native.status()
    for where, name, value in (
        (build, "cpu", lambda: "another"),
        (remember, "cores", lambda: 1000),
        (native, "status", lambda: dataclasses.replace(status, object="nonzeros-another.so")),
        (torch, "__version__", "3.0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            remember._choices_of.cache_clear()
            files.add(the_file())
    assert len(files) == 5


FOREIGN = [
    "{",
    "[]",
    '"words"',
    {"layout": "nonzeros"},
    {"layout": "another", "why": "", "refused": {}, "timings": []},
    {"layout": "dense", "why": 3, "refused": {}, "timings": []},
    {"layout": "dense", "why": "", "refused": [], "timings": []},
    {"layout": "dense", "why": "", "refused": {"nonzeros": 1}, "timings": []},
    {
        "layout": "dense",
        "why": "",
        "refused": {},
        "timings": [dataclasses.asdict(Timing("dense", 4, 1.0, 1.0)) | {"measured": "1"}],
    },
    {"layout": "dense", "why": "", "refused": {}, "timings": [[]]},
    {"layout": "dense", "why": "", "refused": {}, "timings": 3},
    {"layout": "dense", "why": "", "refused": {}, "timings": [], "of a later version": 1},
]


@pytest.mark.parametrize("foreign", FOREIGN, ids=map(str, range(len(FOREIGN))))
def test_a_file_of_others_is_ignored_and_written_anew(
    taken: list[tuple[list[float], bool]], foreign: str | dict[str, object]
) -> None:
    taken.extend([([1.0, 2.0], True), ([3.0, 2.0], True)])
    Chooser().choose(site(4))
    file = the_file()
    file.write_text(
        foreign if isinstance(foreign, str) else json.dumps(dict.fromkeys(json.loads(file.read_text()), foreign))
    )
    assert Chooser().choose(site(4))[0].layout == "nonzeros"
    assert Chooser().choose(site(4))[0].reused


def test_memory_can_be_switched_off(
    taken: list[tuple[list[float], bool]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken.extend([([3.0, 2.0], True)] * 2)
    monkeypatch.setenv("FXPRUNE_REMEMBER", "0")
    assert not any(Chooser().choose(site(4))[0].reused for _ in range(2)) and not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "file").write_text("")
    memory = Choices(tmp_path / "file" / "below")
    memory.put("key", {"layout": "dense"})
    assert memory.get("key") is None and [f.name for f in tmp_path.iterdir()] == ["file"]


@torch.no_grad()
def net_of(weight: Tensor, size: int = 9) -> str:
    """Why two convolutions, the first with this weight [8, 3, 3, 3], are a net or are none."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    model[0].weight.copy_(weight)
    model[2].weight.copy_((torch.arange(8 * 8 * 9) % 5 == 0).view(8, 8, 3, 3))
    program = capture(model, (torch.ones(2, 3, size, size),), {}).program
    _, lowered = lower(program, ["0.weight", "2.weight"], Chooser())
    return lowered[0].choice.why


@pytest.mark.usefixtures("memory_of_its_own")
def test_what_a_net_gains_is_measured_once_for_nets_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [(2.0, False), (3.0, True), (4.0, True), (5.0, True), (6.0, True), (7.0, True)]
    monkeypatch.setattr(known, "measure_gain", lambda *_: measured.pop(0))
    few = torch.zeros(8, 3, 3, 3)
    few[:2], few[2, 0, 0, :2] = 1.0, 1.0
    # Alike to 2% of zeros; the second weight begins elsewhere.
    nearly, more = few.clone(), few.clone()
    nearly[2, 0, 0, 2] = 1.0
    more[:4] = 1.0
    assert "2.00x" in net_of(few)  # Measured on a busy machine, and not kept.
    assert ["3.00x" in net_of(weight) for weight in (few, few, nearly)] == [True] * 3
    assert "4.00x" in net_of(more) and "5.00x" in net_of(few, 10)
    torch.set_num_threads(2)
    assert "6.00x" in net_of(few)
    torch.set_num_threads(1)
    for foreign in ("{", "[]", '"2.0"'):
        measured[:] = [(8.0, True)]
        the_file().write_text(foreign)
        assert "8.00x" in net_of(few) and not measured
    for gain in ("8.0", None, float("nan"), [], {}):
        measured[:] = [(9.0, True)]
        the_file().write_text(json.dumps({key: {"gain": gain} for key in json.loads(the_file().read_text())}))
        assert "9.00x" in net_of(few) and not measured
    monkeypatch.setenv("FXPRUNE_REMEMBER", "0")
    measured[:] = [(7.0, True)]
    assert "7.00x" in net_of(few)

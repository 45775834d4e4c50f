"""The benchmark: shape of what it returns, and what it compares. Nothing here asserts a time."""

from __future__ import annotations

import time
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from benchmarks.machine import describe_machine
from fxprune.errors import InputError
from fxprune.measure import race, timing, ways
from fxprune.measure.benchmark import benchmark
from fxprune.measure.device import device_of, has_bfloat16_units
from fxprune.measure.race import duel, fastest
from fxprune.measure.timing import Samples, interleave, interleave_graphs, interleave_steady
from fxprune.measure.ways import Call, Maker, channels_last, compiled, ways_of


def test_interleave_gives_every_function_as_many_rounds() -> None:
    calls: list[str] = []
    a, b = interleave([lambda: calls.append("a"), lambda: calls.append("b")], seconds=0.0, min_rounds=3, max_rounds=3)
    assert len(a.warm) == len(b.warm) == len(a.cold) == len(b.cold) == 3
    assert min(*a.warm, *b.warm, *a.cold, *b.cold) >= 0
    assert "".join(calls).replace("a", "") and "".join(calls).rstrip("b").endswith("a")


def works(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_on_a_busy_machine_the_time_that_a_thread_ran_is_what_counts() -> None:
    """A call that does not run, as one that is interrupted does not, costs nothing; and it is worth keeping nowhere."""
    threads: set[int] = set()

    def waits() -> None:
        threads.add(torch.get_num_threads())
        works(2e-4)
        time.sleep(2e-3)

    torch.set_num_threads(2)
    (a, b), steady = interleave_steady([waits, lambda: works(2e-3)], seconds=0.05)
    assert not steady and threads == {1, 2} and torch.get_num_threads() == 2
    assert a.typical < b.typical and a.alone < b.alone


@pytest.mark.parametrize(("warm", "agree"), [([1.0, 1.2, 1.3], True), ([1.0, 1.4, 1.5], False)])
def test_samples_that_disagree_are_not_worth_keeping(
    warm: list[float], agree: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Samples([1.0], [1.0]), Samples(warm, [1.0])]
    monkeypatch.setattr(timing, "interleave", lambda *_, **__: found)
    monkeypatch.setattr(timing, "_QUIET", 0.0)
    assert interleave_steady([]) == (found, agree)


def test_an_uncompiled_module_is_run_in_the_best_of_its_ways() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    result = benchmark(model, lambda x: x, (torch.randn(2, 8),), rounds=5, progress=False)
    assert result.a.way in ON_CPU
    assert result.b.way == "as given"
    assert len(result.a.samples) == len(result.b.samples) == 5
    assert result.ratio == pytest.approx(result.a.median / result.b.median)
    assert result.ratio_low <= result.ratio <= result.ratio_high
    text = str(result)
    assert "threads" in text and "interval" in text and result.device in text


def test_threads_are_set_and_put_back() -> None:
    before = torch.get_num_threads()
    result = benchmark(lambda: None, lambda: None, threads=before + 1, rounds=3, progress=False)
    assert result.threads == before + 1
    assert torch.get_num_threads() == before


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(InputError, match="training mode"):
        benchmark(nn.Linear(2, 2), nn.Linear(2, 2), (torch.randn(1, 2),), progress=False)


def test_a_bare_tensor_as_inputs_is_refused() -> None:
    with pytest.raises(InputError, match="Pass a tuple"):
        benchmark(nn.Identity(), nn.Identity(), torch.randn(1, 2), progress=False)  # pyright: ignore[reportArgumentType]


ON_CPU = ["eager", "torch.compile", "torch.compile, frozen"]
IMAGES = ["eager, channels_last", "torch.compile, frozen, channels_last"]


def test_a_dense_model_is_run_in_every_way_that_its_user_has() -> None:
    linear, conv = nn.Linear(2, 2).eval(), nn.Conv2d(3, 4, 3).eval()
    x, image = (torch.randn(1, 2),), (torch.randn(1, 3, 8, 8),)
    assert list(ways_of(linear, x, {}, None)) == list(ways_of(linear, x, {}, torch.device("cpu"))) == ON_CPU
    assert list(ways_of(conv, image, {}, None)) == ON_CPU + IMAGES
    graphs = ["torch.compile, reduce-overhead", "torch.compile, max-autotune"]
    assert list(ways_of(linear, x, {}, torch.device("cuda"))) == ON_CPU + graphs
    assert list(ways_of(torch.compile(linear), x, {}, None)) == ["torch.compile"]
    assert list(ways_of(lambda x: x, x, {}, None)) == ["as given"]
    with pytest.raises(InputError, match="training mode"):
        ways_of(nn.Linear(2, 2), x, {}, None)


def test_every_way_computes_what_the_model_computes_and_leaves_it_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        before = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
        for name, make in ways_of(model, (x,), {}, None).items():
            call = make()
            assert torch.allclose(call(), expected, atol=1e-5) and torch.allclose(call(), expected, atol=1e-5), name
    after = model.state_dict()
    assert all(torch.equal(after[n], v) and after[n].stride() == stride for n, (v, stride) in before.items())
    assert model._compiled_call_impl is None


def test_a_frozen_model_is_frozen() -> None:
    """Given to torch.compile as an option, freezing does nothing: the weights stay inputs."""
    model = nn.Linear(8, 8).eval()
    x = torch.randn(4, 8)
    with torch.no_grad():
        frozen, live = compiled(model, freezing=True), compiled(model)
        before = frozen(x)
        live(x)
        model.weight.mul_(2)
        assert torch.equal(frozen(x), before)
        assert torch.allclose(live(x), model(x), atol=1e-6) and not torch.allclose(before, model(x), atol=1e-2)


def test_channels_last_is_of_a_copy_also_where_a_hook_computes_the_weight() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    prune.l1_unstructured(model[0], "weight", 0.5)
    x = torch.randn(1, 3, 8, 8)
    assert torch.allclose(channels_last(model)(x), model(x), atol=1e-6)
    assert model[0].weight.is_contiguous()


def test_each_function_is_timed_as_itself() -> None:
    def slow() -> None:
        time.sleep(2e-3)

    for functions, slower in (([slow, int], 0), ([int, slow, int], 1), ([int, int, slow], 2)):
        samples = interleave(functions, seconds=0.0, min_rounds=5)
        assert max(range(len(samples)), key=lambda i: samples[i].typical) == slower
        assert max(range(len(samples)), key=lambda i: samples[i].alone) == slower


def test_a_cold_call_is_the_first_after_others_and_a_warm_one_follows_itself() -> None:
    """A function that is slow whenever another ran last is slow cold, and only cold."""
    last: list[str] = []

    def sticky() -> None:
        if last[-1:] != ["sticky"]:
            time.sleep(2e-3)
        last.append("sticky")

    samples, _ = interleave([sticky, lambda: last.append("other")], seconds=0.0, min_rounds=5)
    assert samples.alone > samples.typical


def test_one_slow_round_decides_nothing() -> None:
    samples = Samples([1.0, 9.0, 1.0], [2.0, 9.0, 2.0])
    assert (samples.typical, samples.alone) == (1.0, 2.0)


def test_a_fast_function_is_repeated_and_its_time_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], [0, 0]
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def taking(seconds: float, place: int) -> Call:
        def call() -> None:
            now[0] += seconds
            calls[place] += 1

        return call

    for samples, seconds in zip(interleave([taking(1e-6, 0), taking(1.0, 1)], seconds=0.0, min_rounds=3), (1e-6, 1.0)):
        assert samples.warm == pytest.approx([seconds] * 3) and samples.cold == pytest.approx([seconds] * 3)
    # Twice before the rounds, and in each of them once cold and then as often as the clock asks for.
    assert calls[1] == 2 + 3 * 2 and calls[0] > 2 + 3 * 20


def test_a_race_is_won_by_the_fastest_and_tells_who_did_not_run() -> None:
    def late(seconds: float) -> Maker:
        return lambda: lambda: time.sleep(seconds)

    def failing() -> Call:
        raise RuntimeError("no compiler")

    won = fastest({"a": late(4e-3), "fails": failing, "b": late(1e-3), "c": late(8e-3)}, None)
    assert (
        won.name == "b" and set(won.seconds) == {"a", "b", "c"} and won.failed == {"fails": "RuntimeError: no compiler"}
    )
    assert won.seconds["b"] < won.seconds["a"] < won.seconds["c"]


def test_who_beats_another_was_faster_in_three_of_four_rounds() -> None:
    def samples(*warm: float) -> Samples:
        return Samples(list(warm), list(warm))

    other = samples(2.0, 2.0, 2.0, 2.0)
    assert samples(1.0, 1.0, 9.0, 1.0).beats(other) and not samples(1.0, 1.0, 9.0, 2.0).beats(other)
    # Medians alone would say the opposite here.
    assert not samples(1.9, 1.9, 1.0, 9.0, 9.0).beats(samples(2.0, 2.0, 2.0, 8.0, 2.0))
    assert not other.beats(other)


def test_a_duel_that_is_close_is_fought_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    fought: list[float] = []

    def seconds_of(ratio: float) -> Callable[..., list[Samples]]:
        def fake(functions: object, device: object, *, seconds: float, min_rounds: int) -> list[Samples]:
            fought.append(seconds)
            return [Samples([1.0], [1.0]), Samples([ratio], [ratio])]

        return fake

    for ratio, times in ((1.0, 2), (1.2, 2), (0.9, 2), (2.0, 1), (0.4, 1)):
        monkeypatch.setattr(race, "interleave", seconds_of(ratio))
        fought.clear()
        duel(int, int, None)
        assert len(fought) == times, ratio


def test_a_dense_float32_model_is_shown_in_bfloat16_where_the_machine_has_units_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), torch.randn(2, 8)
    for has in (True, False):
        monkeypatch.setattr(ways, "has_bfloat16_units", lambda _, has=has: has)
        result = benchmark(model, lambda x: x, (x,), rounds=3, progress=False)
        assert (result.half is not None) == has and ("a, bfloat16" in str(result)) == has
    monkeypatch.setattr(ways, "has_bfloat16_units", lambda _: True)
    assert benchmark(model.double(), lambda x: x, (x.double(),), rounds=3, progress=False).half is None
    assert has_bfloat16_units(None) == bool({"amx_tile", "avx512_bf16"} & set(describe_machine()["isa"]))


def test_a_way_that_does_not_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> Call:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(ways, "has_bfloat16_units", lambda _: True)
    monkeypatch.setattr(ways, "compiled", failing)
    result = benchmark(nn.Linear(8, 8).eval(), lambda x: x, (torch.randn(2, 8),), rounds=3, progress=False)
    assert set(result.failed) == {"a, torch.compile", "a, torch.compile, frozen", "a, bfloat16"}
    assert "did not run: a, bfloat16: RuntimeError: no compiler" in str(result)


def test_the_device_is_that_of_the_first_tensor_on_one() -> None:
    assert device_of((torch.ones(1), [torch.ones(2)]), {"mask": None}) is None and device_of() is None


@pytest.mark.cuda
def test_what_runs_on_a_gpu_is_timed_between_events() -> None:
    x = torch.randn(64, 64, device="cuda")
    assert device_of(("text", [x])) == x.device
    calls: list[int] = []
    samples = interleave([lambda: calls.append(1), lambda: x @ x], x.device, seconds=0.0, min_rounds=4)
    assert [len(s.warm) for s in samples] == [4, 4] and len(calls) == 5 and min(samples[1].warm) > 0
    graphs = interleave_graphs([lambda: x @ x], x.device, seconds=0.0, min_rounds=4)
    assert len(graphs[0]) == 4 and min(graphs[0]) > 0
    result = benchmark(nn.Linear(64, 64).eval().cuda(), lambda x: x, (x,), rounds=5, progress=False)
    assert result.device == torch.cuda.get_device_name() and len(result.a.samples) == 5

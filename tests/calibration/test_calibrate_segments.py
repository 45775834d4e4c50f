"""The order in which weights are fitted: whatever the graph, both programs can be run segment by segment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.calibration.batches import Batch
from fxprune.calibration.layer import find_layers
from fxprune.calibration.segments import Segment, plan_segments
from fxprune.calibration.stream import Fitted, stream
from fxprune.capture.capture import capture
from fxprune.check.calls import Call
from fxprune.check.compare import outputs
from fxprune.graph.program import Program
from tests.structured_oracle import net


def lin(*sizes: int) -> dict[str, nn.Module]:
    """Linears of one width, named a, b, c, ..."""
    return {"abcdefgh"[i]: nn.Linear(size, size) for i, size in enumerate(sizes)}


def inplace(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu_()
    y += m.b(y)
    y.mul_(0.5).add_(m.c(y))
    return m.d(y)


def written_views(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    left, right = h[:, :4], h[:, 4:]
    left.add_(m.e(x)[:, :4])
    right.relu_()
    return m.b(h) + m.c(left.repeat(1, 2))


def input_written(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    x.add_(y)
    return m.b(x) + m.c(y)


def branches(m: Any, x: Tensor) -> Tensor:
    return m.d(torch.cat([m.a(x).relu(), m.b(x).tanh()], -1)[:, ::2]) + m.c(x)


def residual(m: Any, x: Tensor) -> Tensor:
    x = x + m.b(m.a(x).relu())
    return x + m.d(m.c(F.layer_norm(x, (8,))).relu())


def nested(m: Any, x: Tensor) -> Tensor:
    inner = x + m.a(x)
    deeper = inner + m.c(m.b(inner).relu() + inner).relu()
    return m.d(x + deeper)


def encoder_decoder(m: Any, x: Tensor) -> Tensor:
    memory = m.b(m.a(x).relu())
    state = m.c(x)
    state = state + m.d(memory * state.sigmoid())
    return state + m.f(m.e(state).relu() * memory)


def skipping(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    for layer in (m.b, m.c, m.d):
        y = layer(y).relu()
    return m.e(y + x * 2) + x


def listed(m: Any, x: Tensor) -> Tensor:
    one, two = m.a(x).chunk(2, -1)
    three, _ = torch.topk(m.b(torch.cat([two, one], -1)), 4)
    return m.c(torch.cat([three, one], -1)).view(x.shape[0], 2, 4).flatten(1) + m.d(x)


def tied(m: Any, x: Tensor) -> Tensor:
    return m.c(F.linear(m.b(m.a(x)).relu(), m.a.weight))


def queries(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(m.start) + m.c(x).mean(0))


FORWARDS: list[Callable[..., Any]] = [
    inplace,
    written_views,
    input_written,
    branches,
    residual,
    nested,
    encoder_decoder,
    skipping,
    listed,
    tied,
    queries,
]


def captured(forward: Callable[..., Any]) -> tuple[Any, Program, Tensor]:
    extra = {"start": nn.Parameter(torch.randn(5, 8))} if forward is queries else {}
    model, x = net(forward, **lin(*[8] * 6), **extra), torch.randn(5, 8)
    return model, capture(model, (x.clone(),), {}).program, x


def layers_of(program: Program) -> list[Any]:
    names = [name for name, p in program.named_parameters() if name.endswith(".weight")]
    return list(find_layers(program, names)[0].values())


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("some", [False, True])
def test_dense_weights_give_the_same_on_both_sides(forward: Any, limit: int, some: bool) -> None:
    model, program, x = captured(forward)
    layers = layers_of(program)
    layers = layers[::2] if some else layers
    calls = [x, torch.randn(5, 8), torch.randn(5, 8)]
    seen: dict[str, Fitted] = {}
    inputs = {layer.name: [] for layer in layers}
    wanted = {layer.name: [] for layer in layers}

    def solve(entries: Any) -> dict[str, Tensor]:
        for entry in entries:
            seen[entry.layer.name] = entry
        return {}

    with recorded(model, inputs, wanted):
        for call in calls:
            with torch.no_grad():
                model(call.clone())
    before = [call.clone() for call in calls]
    segments = plan_segments(program, layers)
    stream(program, segments, [Batch((call,)) for call in calls], solve, limit=limit)
    assert all(torch.equal(a, b) for a, b in zip(calls, before, strict=True))
    assert seen.keys() == {layer.name for layer in layers}
    for name, entry in seen.items():
        # Both sides agree, so the wanted output is the layer's own on its own input.
        x_all, y_all = torch.cat(inputs[name]).double(), torch.cat(wanted[name]).double()
        torch.testing.assert_close(entry.inputs.mean[0], x_all.mean(0), rtol=0, atol=1e-5)
        torch.testing.assert_close(entry.outputs.mean(entry.inputs)[0], y_all.mean(0), rtol=0, atol=1e-5)
        x_all, y_all = x_all - x_all.mean(0), y_all - y_all.mean(0)
        torch.testing.assert_close(entry.inputs.centred_gram()[0], x_all.mT @ x_all, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(entry.outputs.centred_cross(entry.inputs)[0], y_all.mT @ x_all, rtol=1e-4, atol=1e-3)


class recorded:
    """Notes what the linears of a model read and answer."""

    def __init__(self, model: Any, inputs: dict[str, list[Tensor]], wanted: dict[str, list[Tensor]]) -> None:
        def hook(name: str) -> Any:
            def note(_: Any, given: Any, answer: Tensor) -> None:
                inputs[name].append(given[0].detach().clone())
                wanted[name].append(answer.detach().clone())

            return note

        modules = {f"{path}.weight": module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._hooks = [modules[name].register_forward_hook(hook(name)) for name in inputs]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_every_site_is_in_one_stage_after_what_it_depends_on(forward: Any) -> None:
    _, program, _ = captured(forward)
    layers = layers_of(program)
    segments = plan_segments(program, layers)
    assert all(segment.layers for segment in segments)
    fitted = [layer.node for segment in segments for layer in segment.layers]
    assert sorted(map(str, fitted)) == sorted(str(layer.node) for layer in layers)
    place = {layer.node: index for index, segment in enumerate(segments) for layer in segment.layers}
    for layer in layers:
        waiting, found = list(layer.node.all_input_nodes), set()
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += node.all_input_nodes
        assert all(place[node] < place[layer.node] for node in found if node in place)


def place_of(segments: list[Segment]) -> dict[str, int]:
    return {layer.name: index for index, segment in enumerate(segments) for layer in segment.layers}


def test_what_does_not_depend_on_each_other_shares_a_stage() -> None:
    _, program, _ = captured(branches)
    assert place_of(plan_segments(program, layers_of(program))) == {
        "a.weight": 0,
        "b.weight": 0,
        "c.weight": 0,
        "d.weight": 1,
    }
    _, program, _ = captured(residual)
    segments = plan_segments(program, layers_of(program))
    assert place_of(segments) == {"a.weight": 0, "b.weight": 1, "c.weight": 2, "d.weight": 3}
    assert [bool(layer.branch) for segment in segments for layer in segment.layers] == [False, True, False, True]


def test_a_sum_whose_other_side_is_not_known_yet_is_no_branch() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(x) + m.d(m.c(m.b(x).relu()).relu())

    model, x = net(forward, **lin(8, 8, 8, 8)), torch.randn(4, 8)
    program = capture(model, (x,), {}).program
    known = {
        layer.name: layer.branch for segment in plan_segments(program, layers_of(program)) for layer in segment.layers
    }
    # The deepest side repairs what the others could not; they do not know it yet.
    assert known["a.weight"] is None and known["d.weight"] is not None
    assert known["b.weight"] is None and known["c.weight"] is None


def test_two_sides_of_one_sum_are_not_both_given_its_error() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y) + m.c(y)

    model, x = net(forward, **lin(8, 8, 8)), torch.randn(4, 8)
    program = capture(model, (x,), {}).program
    segments = plan_segments(program, layers_of(program))
    # Both would add what is missing; the later waits for the first, and makes up for it.
    assert place_of(segments) == {"a.weight": 0, "b.weight": 1, "c.weight": 2}
    found = {layer.name: layer.branch is not None for segment in segments for layer in segment.layers}
    assert found == {"a.weight": False, "b.weight": False, "c.weight": True}


def test_the_last_of_parallel_branches_makes_up_for_the_residual_stream_too() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return x + (m.b(x.relu()) + m.c(x.tanh()))

    model, x = net(forward, **lin(8, 8, 8)), torch.randn(4, 8)
    program = capture(model, (x,), {}).program
    segments = plan_segments(program, layers_of(program))
    assert place_of(segments) == {"a.weight": 0, "b.weight": 1, "c.weight": 2}
    branches = {layer.name: layer.branch for segment in segments for layer in segment.layers}
    assert branches["b.weight"] is None and len(branches["c.weight"].others) == 2


def test_a_side_that_writes_to_what_the_other_reads_is_not_waited_for() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = m.b(y)
        y[:, :4].add_(m.c(z.relu())[:, :4])
        return z + y

    model, x = net(forward, **lin(8, 8, 8)), torch.randn(4, 8)
    program = capture(model, (x,), {}).program
    segments = plan_segments(program, layers_of(program))
    assert place_of(segments) == {"a.weight": 0, "b.weight": 1, "c.weight": 2}


def test_nothing_to_fit_has_no_stages() -> None:
    _, program, _ = captured(residual)
    assert plan_segments(program, []) == []


def test_the_program_of_the_test_is_the_model() -> None:
    for forward in FORWARDS:
        model, program, x = captured(forward)
        call = Call("", (x,), {})
        for a, b in zip(outputs(program, call), outputs(model, call), strict=True):
            torch.testing.assert_close(a, b)

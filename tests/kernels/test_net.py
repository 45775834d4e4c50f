"""net: every step against plain torch, for odd sizes, batches and kernels; and what it refuses."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxprune.errors import InputError
from fxprune.kernels import native
from fxprune.kernels.native import net
from fxprune.kernels.native.net import Finish, Taps

from .net_case import Made, agrees, op, started

needs_kernel = pytest.mark.skipif(not native.status().available, reason="needs a C++ compiler")
FINISHES = [
    Finish(),
    Finish("relu"),
    Finish("relu", -1.0, 0.5),
    *(Finish(name) for name in net.ACTIVATIONS if name not in ("", "relu")),
]
small = st.integers(1, 4)


@st.composite
def any_taps(draw: st.DrawFn, height: int, width: int) -> Taps:
    kernel = draw(small), draw(small)
    dilation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    padding = tuple(draw(st.integers(0, 3)) for _ in range(4))
    reach = [step * (k - 1) + 1 for step, k in zip(dilation, kernel)]
    fits = height + padding[0] + padding[1] >= reach[0] and width + padding[2] + padding[3] >= reach[1]
    if not fits:
        return Taps(stride=(draw(small), draw(small)))
    return Taps(kernel, (draw(small), draw(small)), padding, dilation)  # pyright: ignore[reportArgumentType]


@needs_kernel
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_nets_compute_what_plain_torch_does(data: st.DataObject) -> None:
    draw = data.draw
    tile = st.sampled_from(net.TILES)
    size = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    made = started(draw(small), *size, draw(tile), draw(st.integers(0, 1000)))
    inputs = [made.shapes[0]]
    if draw(st.booleans()):
        # One image for all others.
        made.add(net.Enter(1, draw(tile)), made.shapes[0])
        inputs.append(made.shapes[0])
    kinds = [
        "conv",
        "conv",
        "product",
        "depthwise",
        "pool",
        "add",
        "multiply",
        "activate",
        "concat",
        "mean",
        "repeat",
        "shuffle",
    ]
    for _ in range(draw(st.integers(1, 7))):
        x = draw(st.integers(0, len(made.steps) - 1))
        shape = made.shapes[x]
        alike = [v for v, other in enumerate(made.shapes) if other == shape]
        finish = draw(st.sampled_from(FINISHES))
        match draw(st.sampled_from(kinds)):
            case "conv" | "depthwise" as kind:
                taps = draw(any_taps(*shape[1:]))
                rows = draw(st.integers(1, 9)) if kind == "conv" else shape[0]
                out = (rows, *taps.out(shape[1:]))
                others = [-1, *(v for v, other in enumerate(made.shapes) if other == out)]
                residual, last = draw(st.sampled_from(others)), draw(st.booleans())
                more: dict[str, Any] = {"residual": residual, "tile": draw(tile)}
                more["finish"] = dataclasses.replace(finish, adds_last=last)
                if kind == "conv":
                    blocks = draw(st.integers(1, 9)), draw(st.integers(1, 5))
                    zeros = draw(st.sampled_from([0.0, 0.7, 1.0]))
                    made.conv(x, rows, taps, zeros=zeros, blocks=blocks, bias=draw(st.booleans()), **more)
                else:
                    made.depthwise(x, taps, **more)
            case "product":
                # Of what is computed the kernel and plain torch may round a number to two neighbours.
                x, shape = 0, made.shapes[0]
                rows = draw(st.sampled_from([1, 3, 8, 33, 70]))
                others = [-1, *(v for v, other in enumerate(made.shapes) if other == (rows, *shape[1:]))]
                finish = dataclasses.replace(finish, adds_last=draw(st.booleans()))
                more = {"residual": draw(st.sampled_from(others)), "finish": finish, "bias": draw(st.booleans())}
                made.product(x, rows, zeros=draw(st.sampled_from([0.0, 0.7, 1.0])), **more)
            case "pool":
                kind, taps = draw(st.sampled_from(net.POOLS)), draw(any_taps(*shape[1:]))
                if kind != "max":
                    taps = dataclasses.replace(taps, dilation=(1, 1))
                around = max(taps.padding) < min(taps.kernel)  # else a window may hold no pixel
                if around and min(taps.out(shape[1:])) >= 1:
                    made.add(net.Pool(kind, x, taps, draw(tile)), (shape[0], *taps.out(shape[1:])))
            case "add":
                made.add(net.Add(x, draw(st.sampled_from(alike)), finish), shape)
            case "multiply":
                ones = [v for v, other in enumerate(made.shapes) if other == (shape[0], 1, 1)]
                made.add(net.Multiply(x, draw(st.sampled_from([*alike, *ones])), finish), shape)
            case "activate":
                made.add(net.Activate(x, finish), shape)
            case "concat":
                same = [v for v, other in enumerate(made.shapes) if other[1:] == shape[1:]]
                parts = [x, *draw(st.lists(st.sampled_from(same), max_size=3))]
                made.add(net.Concat(tuple(parts)), (sum(made.shapes[v][0] for v in parts), *shape[1:]))
            case "repeat":
                times = draw(st.integers(1, 3)), draw(st.integers(1, 3))
                if shape[1] * shape[2] < 500:
                    made.add(net.Repeat(x, times, draw(tile)), (shape[0], shape[1] * times[0], shape[2] * times[1]))
            case "shuffle":
                th, tw = (draw(st.integers(1, 3)) for _ in range(2))
                cut = draw(st.integers(0, th - 1)), draw(st.integers(0, tw - 1))
                size = shape[1] * th - cut[0], shape[2] * tw - cut[1]
                if shape[0] % (th * tw) == 0 and min(size) > 0 and size[0] * size[1] < 2000:
                    made.add(net.Shuffle(x, (th, tw), cut, draw(tile)), (shape[0] // (th * tw), *size))
            case _:
                made.add(net.Mean(x), (shape[0], 1, 1))
    last = len(made.steps) - 1
    for x in {last, draw(st.integers(0, last))}:
        made.steps.append(net.Exit(x, draw(st.sampled_from(net.FORMS[:2]))))
    images = draw(st.sampled_from([1, 1, 2, 3, 5, 17]))
    given = [made.random(images if number == 0 else 1, *shape) for number, shape in enumerate(inputs)]
    if draw(st.booleans()):
        given = [x.to(memory_format=torch.channels_last) for x in given]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(draw(st.sampled_from([1, 2, 3])))
        # Of small maps none is large by itself.
        agrees(made, given, large=draw(st.sampled_from([0, 0, 500, -1])), near=draw(st.sampled_from([-1, 8_000])))
    finally:
        torch.set_num_threads(threads)


def long_net(height: int, width: int, tile: int) -> Made:
    """Kernels of all kinds, a stride, a residual over several rows, maps joined, and one that is read at the end.

    One of the joined maps is another one times itself: it reads a row twice and writes beside it.
    """
    made = started(3, height, width, tile)
    around = Taps((3, 3), padding=(1, 1, 1, 1))
    a = made.conv(0, 6, around, tile=tile, finish=Finish("relu"))
    b = made.depthwise(a, around, tile=tile)
    c = made.conv(b, 6, Taps(), tile=tile, residual=a)
    wide = Taps((5, 5), (2, 2), (2, 2, 2, 2))
    d = made.depthwise(c, wide, tile=tile)
    e = made.conv(c, 6, Taps((3, 3), (2, 2), (1, 1, 1, 1)), tile=tile, residual=d)
    f = made.add(net.Pool("max", e, around, tile), made.shapes[e])
    squares = made.add(net.Multiply(e, e, Finish("relu", 0.0, 1.0)), made.shapes[e])
    g = made.add(net.Concat((e, f, squares)), (18, *made.shapes[e][1:]))
    h = made.conv(g, 5, Taps((3, 3), padding=(2, 2, 2, 2), dilation=(2, 2)), tile=tile)
    i = made.add(net.Repeat(h, (2, 2), tile), (5, *(2 * size for size in made.shapes[h][1:])))
    for value in (i, c):
        made.steps.append(net.Exit(value))
    return made


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(40, 50), (97, 16), (9, 33), (64, 64)])
def test_steps_run_depth_first_compute_the_same(size: tuple[int, int], threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for tile in (1, 4, 7):
            made = long_net(*size, tile)
            x = [made.random(2, 3, *size)]
            one_by_one = op(*made.arguments(x, large=2**30))
            # 100,000 bytes hold the rows of some of the steps only.
            for near in (-1, 100_000):
                for _ in range(3):
                    found = op(*made.arguments(x, large=0, near=near))
                    assert all(map(torch.equal, found, one_by_one))
            agrees(made, x, large=0)
    finally:
        torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize(("times", "cut"), [((2, 3), (1, 2)), ((1, 2), (0, 0)), ((3, 1), (0, 0)), ((2, 2), (0, 1))])
@pytest.mark.parametrize("tile", [1, 4, 7])
def test_channels_are_shuffled_into_places(times: tuple[int, int], cut: tuple[int, int], tile: int) -> None:
    made = started(12, 5, 9, tile)
    shape = (12 // (times[0] * times[1]), 5 * times[0] - cut[0], 9 * times[1] - cut[1])
    x = made.add(net.Shuffle(0, times, cut, tile), shape)
    made.steps.append(net.Exit(x))
    for images in (1, 3):
        agrees(made, [made.random(images, 12, 5, 9)], large=0)


@needs_kernel
def test_one_image_stands_for_all_only_beside_others() -> None:
    made = started(2, 3, 4)
    made.add(net.Enter(1), (2, 3, 4))
    made.steps += [net.Add(0, 1), net.Exit(2)]
    agrees(made, [made.random(0, 2, 3, 4), made.random(1, 2, 3, 4)])
    with pytest.raises(RuntimeError, match="same number of images"):
        op(*made.arguments([made.random(3, 2, 3, 4), made.random(2, 2, 3, 4)]))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_packing_is_undone_bit_for_bit(data: st.DataObject) -> None:
    draw = data.draw
    taps = draw(any_taps(9, 9))
    rows, channels, blocks = draw(st.integers(1, 20)), draw(st.integers(1, 9)), (draw(small), draw(small))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(rows, channels, *taps.kernel, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0.0
    weight[0, 0, 0, 0] = -0.0
    tile = draw(st.sampled_from(net.TILES))
    back = net.unpack(net.pack(weight, taps, tile, *blocks), (rows, channels), taps, tile, *blocks)
    assert torch.equal(back.view(torch.int32), weight.view(torch.int32))


def small_net(seed: int = 0) -> Made:
    made = started(3, 11, 13, seed=seed)
    x = made.conv(0, 8, Taps((3, 3), padding=(1, 1, 1, 1)), finish=Finish("relu"))
    made.conv(x, 8, Taps((3, 3), padding=(1, 1, 1, 1)), residual=x)
    made.steps.append(net.Exit(2))
    return made


def test_a_program_is_read_as_it_was_written() -> None:
    made = small_net()
    made.steps += [
        net.Depthwise(
            1, 8, Taps((1, 3), (2, 1), (0, 0, 1, 1), (1, 2)), 2, 5, -1, Finish("hardswish", adds_last=True), 8
        ),
        net.Pool("mean inside", 1, Taps((2, 2), (2, 2)), 1),
        net.Add(1, 2, Finish("relu", -math.inf, 6.0)),
        net.Multiply(1, 2),
        net.Activate(1, Finish("silu")),
        net.Concat((1, 2)),
        net.Mean(1),
        net.Exit(1, "channels last"),
        net.Repeat(1, (2, 3), 4),
        net.Shuffle(1, (2, 2), (1, 0), 4),
    ]
    assert net.decode(net.encode(made.steps)) == made.steps


@needs_kernel
def test_strided_inputs_no_images_and_other_shapes() -> None:
    made = small_net()
    x = made.random(2, 3, 11, 26)[..., ::2]
    assert not x.is_contiguous()
    agrees(made, [x])
    agrees(made, [made.random(0, 3, 11, 13)])
    for size in ((1, 3, 30, 2), (4, 3, 1, 1), (16, 3, 3, 5)):
        agrees(made, [made.random(*size)])


@needs_kernel
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_a_pixel_that_is_no_number_reaches_what_reads_it(special: float) -> None:
    """A pruned weight is not multiplied: 0 * inf is left out, where dense arithmetic has nan."""
    made = started(2, 9, 9)
    made.conv(0, 4, Taps((3, 3), padding=(1, 1, 1, 1)), zeros=0.0)
    made.add(net.Pool("max", 1, Taps((3, 3), (2, 2), (1, 1, 1, 1))), (4, 5, 5))
    made.steps += [net.Exit(1), net.Exit(2)]
    x = made.random(1, 2, 9, 9)
    x[0, 0, 4, 4] = special
    arguments = made.arguments([x])
    for got, wanted in zip(op(*arguments), net.net_reference(*arguments)):
        torch.testing.assert_close(got, wanted, equal_nan=True)
    clean = op(*made.arguments([made.random(1, 2, 9, 9)]))
    assert all(bool(result.isfinite().all()) for result in clean), "what one call left is in the next"


@needs_kernel
def test_two_threads_call_at_once() -> None:
    nets = [small_net(seed) for seed in range(2)]
    inputs = [[made.random(size, 3, 11, 13) for size in (1, 2, 1, 3)] for made in nets]
    failed: list[BaseException] = []

    def work(made: Made, mine: list[Tensor]) -> None:
        try:
            for x in mine * 5:
                agrees(made, [x])
        except BaseException as error:
            failed.append(error)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(nets, inputs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed, failed


@needs_kernel
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: [1, *p[1:]], "another version"),
        (lambda p: [p[0], -2, *p[2:]], "out of range"),
        (lambda p: p[:-1], "ends too early"),
        (lambda p: [*p, 1], "goes on after"),
        (lambda p: [*p[:4], 0, 5, *p[6:]], "no kernel has such tiles"),
        (lambda p: [*p[:8], 77, *p[9:]], "unknown step|out of range"),
        (lambda p: [*p[:11], 3, *p[12:]], "out of range"),
        (lambda p: [*p[:13], 9, *p[14:]], "other channels"),
        (lambda p: [*p[:14], 4, *p[15:]], "other channels"),
        (lambda p: [*p[:15], 2**30, *p[16:]], "out of range"),
        (lambda p: [*p[:26], 40000, *p[27:]], "too large for 16-bit"),
    ],
)
def test_a_program_that_is_wrong_is_refused(change: Any, words: str) -> None:
    made = small_net()
    *operands, program = made.arguments([made.random(1, 3, 11, 13)])
    with pytest.raises(RuntimeError, match=words):
        op(*operands, change(program))


@needs_kernel
def test_operands_that_are_wrong_are_refused() -> None:
    made = small_net()
    x = made.random(1, 3, 11, 13)
    inputs, *packed, program = made.arguments([x])
    for wrong in ([x.double()], [x[0]], []):
        with pytest.raises((RuntimeError, IndexError)):
            op(wrong, *packed, program)
    with pytest.raises(RuntimeError, match="nonzeros are not there"):
        op(inputs, packed[0][:-1], packed[1][:-1], *packed[2:], program)
    with pytest.raises(RuntimeError, match="bias is not there"):
        op(inputs, *packed[:5], packed[5][:-1], *packed[6:], program)
    tiled = started(3, 2, 2)
    tiled.product(0, 5)
    tiled.steps.append(net.Exit(1))
    inputs, *packed, program = tiled.arguments([made.random(1, 3, 2, 2)])
    for at, what in ((4, "panels"), (5, "a bias is"), (6, "bits"), (7, "values")):
        less = [each[:-1] if number == at else each for number, each in enumerate(packed)]
        with pytest.raises(RuntimeError, match=f"{what}.* not there"):
            op(inputs, *less, program)
    with pytest.raises(RuntimeError, match="larger than its input"):
        large = started(3, 2, 2)
        large.conv(0, 2, Taps((3, 3)))
        large.steps.append(net.Exit(1))
        op(*large.arguments([made.random(1, 3, 2, 2)]))


@needs_kernel
def test_a_residual_that_is_an_output_and_a_mean_with_steps_are_refused() -> None:
    made = small_net()
    made.steps[2], made.steps[3] = net.Exit(1), dataclasses.replace(made.steps[2], residual=2)
    with pytest.raises(RuntimeError, match="a residual is not there"):
        op(*made.arguments([made.random(1, 3, 11, 13)]))
    made = small_net()
    made.steps[3:] = [net.Pool("mean", 2, Taps((2, 2), dilation=(2, 2))), net.Exit(3)]
    with pytest.raises(RuntimeError, match="a mean has steps"):
        op(*made.arguments([made.random(1, 3, 11, 13)]))


def test_a_block_of_too_many_columns_is_refused() -> None:
    with pytest.raises(InputError, match="K-block is too large"):
        net.pack(torch.ones(2, 40000, 1, 1), Taps(), 1, 2, 40000)


@needs_kernel
def test_a_map_of_two_names_is_joined_read_and_written_over() -> None:
    """What is joined lies in one place, which an activation may take over only if no part of it is read later."""
    for later in ("part", "residual", "nothing"):
        made = started(3, 9, 9)
        a = made.conv(0, 4, Taps((3, 3), padding=(1, 1, 1, 1)))
        whole = made.add(net.Concat((a, 0)), (7, 9, 9))
        made.add(net.Concat((whole, a)), (11, 9, 9))
        above = made.add(net.Activate(whole, Finish("relu")), (7, 9, 9))
        if later == "part":
            above = made.conv(a, 7, Taps(), residual=above)
        elif later == "residual":
            above = made.conv(a, 7, Taps((3, 3), padding=(1, 1, 1, 1)), residual=whole)
        made.steps += [net.Exit(above), net.Exit(3)]
        agrees(made, [made.random(2, 3, 9, 9)])


def test_the_reference_refuses_what_is_no_program() -> None:
    for program in ([], [2, 0], [1, 1, 99, 1, 0], [1, 1, 0, 1, 3, 0], [1, 1, 0, 1, 1, 0, 5]):
        with pytest.raises(InputError, match="cannot read"):
            net.decode(program)


def test_shapes_are_those_of_the_results() -> None:
    made = small_net()
    made.steps.append(net.Exit(1, "channels last"))
    x = made.random(2, 3, 11, 13)
    arguments = made.arguments([x])
    results = net.net_reference(*arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = op([mode.from_tensor(x)], *arguments[1:])
    assert [(f.shape, f.stride()) for f in fake] == [(r.shape, r.stride()) for r in results]


FORK = """
import os, signal, torch
from fxprune.kernels import native
from fxprune.kernels.native import net

torch.set_num_threads(2)
weight = torch.randn(64, 64, 1, 1)
packed = net.pack(weight, net.Taps(), 8, 16, 64)
steps = [net.Enter(0, 8), net.Conv(0, 64, 64, net.Taps(), 16, 64, values=packed.values.numel(), tile=8), net.Exit(1)]
none = torch.zeros(0), torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.bfloat16)
arguments = [torch.randn(1, 64, 9, 40)], *packed, *none, net.encode(steps)
before = torch.ops.fxprune.net(*arguments)[0]
if child := os.fork():
    print(os.waitpid(child, 0)[1])
else:
    signal.alarm(60)
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(before, torch.ops.fxprune.net(*arguments)[0]) else 1)
"""


@needs_kernel
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_computes_the_same_with_one_thread() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.split() == ["0"], done.stderr

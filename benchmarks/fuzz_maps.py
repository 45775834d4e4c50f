"""Random steps over images and signals: convolutions in all their forms, norms, pooling, resizing, gates, residuals."""

from __future__ import annotations

import math

from benchmarks.fuzz_draft import Draft
from benchmarks.fuzz_sketch import IMAGE, SEQUENCE, SIGNAL, VECTOR, Value


def _rank(x: Value) -> int:
    return len(x.shape) - 1


def convolution(d: Draft, x: Value) -> bool:
    """A convolution of any groups, stride, padding, dilation and mode."""
    c, n, places = x.width, _rank(x), x.shape[1:]
    o, groups = d.width(), 1
    way = d.rng.random()
    if way < 0.2:
        groups, o = c, c * d.rng.choice((1, 1, 2))
    elif way < 0.4:
        groups = d.divisor(c, 4)
        o = groups * d.rng.choice((2, 3, 4))
    kernel, stride, dilation = d.rng.choice((1, 1, 3, 3, 3, 2)), d.rng.choice((1, 1, 1, 2)), d.rng.choice((1, 1, 1, 2))
    padding = d.rng.choice((0, dilation * (kernel - 1) // 2, dilation * (kernel - 1) // 2))
    after = tuple((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for size in places)
    if min(after) < 1:
        return False
    more = [f"padding={padding}"] if padding else []
    if stride == 1 and kernel == 3 and padding == dilation and d.coin(0.2):
        more = ["padding='same'"]
    if padding and padding < min(places) and d.coin(0.2):
        more += [f"padding_mode='{d.rng.choice(('zeros', 'reflect', 'replicate', 'circular'))}'"]
    more += [f"stride={stride}"] if stride > 1 else []
    more += [f"dilation={dilation}"] if dilation > 1 else []
    more += [f"groups={groups}"] if groups > 1 else []
    more += ["bias=False"] if d.coin(0.35) else []
    m = d.member(f"nn.Conv{n}d({', '.join([str(c), str(o), str(kernel), *more])})")
    d.step(
        "depthwise" if groups == c > 1 else "grouped conv" if groups > 1 else "conv",
        f"{m}({x.name})",
        x.kind,
        (o, *after),
    )
    return True


def conv_norm(d: Draft, x: Value) -> None:
    """Convolution, norm, activation."""
    o, n = d.width(), _rank(x)
    act = d.rng.choice(("nn.ReLU()", "nn.SiLU()", "nn.ReLU(inplace=True)", "nn.LeakyReLU(0.1)", "nn.Hardswish()"))
    code = f"nn.Sequential(nn.Conv{n}d({x.width}, {o}, 3, padding=1, bias=False), nn.BatchNorm{n}d({o}), {act})"
    d.step("conv norm", f"{d.member(code)}({x.name})", x.kind, (o, *x.shape[1:]))


def transposed(d: Draft, x: Value) -> bool:
    """A transposed convolution."""
    n, o, places = _rank(x), d.width(), x.shape[1:]
    if max(places) > 8:
        return False
    groups = d.rng.choice((1, 1, 1, d.divisor(x.width, 4)))
    o = o if o % groups == 0 else groups * 2
    m = d.member(f"nn.ConvTranspose{n}d({x.width}, {o}, 2, stride=2, groups={groups}, bias={d.coin()})")
    d.step("transposed conv", f"{m}({x.name})", x.kind, (o, *(2 * size for size in places)))
    return True


def functional(d: Draft, x: Value) -> None:
    """A parameter that F.conv or einsum reads."""
    c, o, n = x.width, d.width(), _rank(x)
    if d.coin(0.7):
        code = f"F.conv{n}d({x.name}, {d.parameter(o, c, *[3] * n)}, {d.parameter(o)}, padding=1)"
    else:
        code = f"torch.einsum('bc...,oc->bo...', {x.name}, {d.parameter(o, c)})"
    d.step("functional conv", code, x.kind, (o, *x.shape[1:]))


def norm(d: Draft, x: Value) -> bool:
    """Batch, group, instance or layer norm of the channels."""
    c, n, g = x.width, _rank(x), d.divisor(x.width)
    codes = [f"nn.BatchNorm{n}d({c})"] * 4 + [f"nn.BatchNorm{n}d({c}, affine=False)", f"nn.GroupNorm(1, {c})"]
    if math.prod(x.shape[1:]) > 1:
        codes += [f"nn.InstanceNorm{n}d({c}, affine={d.coin()})"]
    codes += [f"nn.GroupNorm({g}, {c})"] * 2 + [f"nn.GroupNorm({c}, {c})"] * (math.prod(x.shape[1:]) > 1)
    codes += [f"ChannelNorm({c})"] if x.kind == IMAGE else []
    if math.prod(x.shape[1:]) == 1 and g == c:
        return False
    d.step("map norm", f"{d.member(d.rng.choice(codes))}({x.name})", x.kind, x.shape)
    return True


def resize(d: Draft, x: Value) -> bool:
    """Pooling, interpolation, padding, rolling: places change, channels stay."""
    places, n = x.shape[1:], _rank(x)
    ways: list[tuple[str, tuple[int, ...]]] = []
    if min(places) >= 2:
        half = tuple(size // 2 for size in places)
        ways += [(f"F.max_pool{n}d({{x}}, 2)", half), (f"F.avg_pool{n}d({{x}}, 2)", half)]
        ways += [(f"F.adaptive_avg_pool{n}d({{x}}, 2)", (2,) * n), (f"F.adaptive_max_pool{n}d({{x}}, 1)", (1,) * n)]
        ways += [(f"F.max_pool{n}d({{x}}, 3, 1, 1)", places), (f"F.avg_pool{n}d({{x}}, 3, 1, 1)", places)]
    if max(places) <= 6:
        double = tuple(2 * size for size in places)
        smooth = "bilinear" if n == 2 else "linear"
        ways += [
            ("F.interpolate({x}, scale_factor=2)", double),
            (f"F.interpolate({{x}}, scale_factor=2, mode='{smooth}')", double),
        ]
        ways += [(f"F.interpolate({{x}}, size={(5,) * n}, mode='{smooth}', align_corners=True)", (5,) * n)]
        ways += [(f"F.pad({{x}}, {(1,) * (2 * n)})", tuple(size + 2 for size in places))]
    ways += [("{x}.roll(1, -1)", places), ("{x}.flip(-1)", places), ("{x}[..., :-1]", (*places[:-1], places[-1] - 1))]
    if n == 2:
        ways += [("{x}.transpose(2, 3)", places[::-1])]
    code, after = d.rng.choice(ways)
    if min(after) < 1:
        return False
    d.step("resize", code.format(x=x.name), x.kind, (x.width, *after))
    return True


def pixels(d: Draft, x: Value) -> bool:
    """Channels become places, or places channels."""
    c, places = x.width, x.shape[1:]
    if x.kind != IMAGE:
        return False
    if c % 4 == 0 and max(places) <= 6 and d.coin():
        d.step("pixel_shuffle", f"F.pixel_shuffle({x.name}, 2)", IMAGE, (c // 4, *(2 * size for size in places)))
    elif all(size % 2 == 0 for size in places) and c <= 12:
        h, w = (size // 2 for size in places)
        code = f"F.pixel_unshuffle({x.name}, 2)"
        if d.coin(0.3):
            parts = ", ".join(f"{x.name}[:, :, {i}::2, {j}::2]" for i in (0, 1) for j in (0, 1))
            code = f"torch.cat([{parts}], 1)"
        d.step("pixel_unshuffle", code, IMAGE, (4 * c, h, w))
    else:
        return False
    return True


def blocks(d: Draft, x: Value) -> bool:
    """A block that vision models have: residual, inverted, squeezed."""
    c = x.width
    if x.kind != IMAGE or c > 16:
        return False
    codes = [
        f"ResidualConv({c}, {d.width()}, '{kind}', {d.coin()}, {d.coin(0.3)})"
        for kind in ("batch", "instance", "group")
    ]
    codes += [f"SqueezeExcite({c}, 4, conv={d.coin()}, hard={d.coin()})"] * 2
    codes += [f"InvertedResidual({c}, 2, {d.rng.choice((1, 3))})"] * 2
    d.step("map block", f"{d.member(d.rng.choice(codes))}({x.name})", x.kind, x.shape)
    return True


def gate(d: Draft, x: Value) -> bool:
    """Channels or places of an image are weighed."""
    if x.kind != IMAGE:
        return False
    ways = [
        f"{x.name} * {x.name}.mean((2, 3), keepdim=True).sigmoid()",
        f"{x.name} * {x.name}.mean(1, keepdim=True).tanh()",
    ]
    ways += [f"{x.name} * {d.member(f'nn.Conv2d({x.width}, 1, 1)')}({x.name}).sigmoid()"]
    code = d.rng.choice(ways)
    d.step("gate", code, IMAGE, x.shape)
    return True


def flatten(d: Draft, x: Value) -> bool:
    """Another kind: a vector of means or of all, a sequence of places, windows."""
    c, places = x.width, x.shape[1:]
    size = math.prod(places)
    over = tuple(range(2, 2 + len(places)))
    ways = [
        (f"{{x}}.mean({over})", VECTOR, (c,)),
        (f"{{x}}.amax({over})", VECTOR, (c,)),
        (f"{{x}}.sum({over})", VECTOR, (c,)),
    ]
    ways += [("{x}.flatten(2).transpose(1, 2)", SEQUENCE, (size, c))] * 2
    if c * size <= 160:
        ways += [("{x}.flatten(1)", VECTOR, (c * size,)), ("{x}.reshape({x}.shape[0], -1)", VECTOR, (c * size,))]
        ways += [("torch.flatten({x}, 1)", VECTOR, (c * size,))]
    if x.kind == IMAGE:
        h, w = places
        ways += [("{x}.permute(0, 2, 3, 1).flatten(1, 2)", SEQUENCE, (size, c))]
        ways += [("F.adaptive_avg_pool2d({x}, 1).flatten(1)", VECTOR, (c,))]
        ways += [("{x}.flatten(2).mean(-1)", VECTOR, (c,)), ("{x}.mean(3)", SIGNAL, (c, h))]
        if c * w <= 64:
            ways += [("{x}.transpose(1, 2).flatten(2)", SEQUENCE, (h, c * w))]
    else:
        ways += [("{x}.transpose(1, 2)", SEQUENCE, (size, c)), ("{x}[..., -1]", VECTOR, (c,))]
        ways += [("{x}[:, :, None, :]", IMAGE, (c, 1, size))]
    code, kind, shape = d.rng.choice(ways)
    d.step("flatten", code.format(x=x.name), kind, shape)
    return True


MAPS = (
    *(convolution, convolution, convolution, convolution, conv_norm, conv_norm, transposed, functional, norm, norm),
    *(resize, resize, pixels, blocks, blocks, blocks, gate, flatten),
)

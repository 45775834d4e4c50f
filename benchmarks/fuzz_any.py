"""Random steps that any float tensor can take: activations, sums, products, joins, parts, orders, statistics."""

from __future__ import annotations

from benchmarks.fuzz_draft import Draft, dim, with_width
from benchmarks.fuzz_sketch import IMAGE, MASK, SCALE, SEQUENCE, SIGNAL, VECTOR, Value

ACTIVATIONS = (
    "torch.relu({x})",
    "F.relu({x})",
    "F.gelu({x})",
    'F.gelu({x}, approximate="tanh")',
    "F.silu({x})",
    "torch.tanh({x})",
    "torch.sigmoid({x})",
    "F.leaky_relu({x}, 0.1)",
    "F.elu({x})",
    "F.softplus({x})",
    "F.hardswish({x})",
    "F.hardsigmoid({x})",
    "F.mish({x})",
    "F.selu({x})",
    "F.hardtanh({x})",
    "F.logsigmoid({x})",
    "F.softsign({x})",
    "F.relu6({x})",
    "{x}.clamp(-1.0, 2.0)",
    "{x}.clamp(min=0.1)",
    "{x}.abs()",
    "{x}.square()",
    "{x}.sin()",
    "{x}.cos()",
    "torch.exp(-{x}.abs())",
    "torch.rsqrt({x}.square() + 1.0)",
    "torch.erf({x})",
    "torch.where({x} > 0, {x}, 0.3 * {x})",
    "{x} * torch.sigmoid(1.702 * {x})",
    "{x} * {x}.sigmoid()",
    "torch.log1p({x}.abs())",
    "{x} / (1 + {x}.abs())",
    "F.dropout({x}, 0.5, self.training)",
    "F.threshold({x}, 0.0, 0.0)",
    "torch.celu({x})",
    "{x}.masked_fill({x} < 0, 0.0)",
    "1 - {x}",
    "-{x}",
    "0.5 * {x} + 1.5",
    "{x}.neg().add(2, alpha=2)",
    "{x}.pow(2)",
    "{x}.clone()",
    "{x}.contiguous()",
)
NOT_ZERO = ("{x}.sigmoid()", "{x}.exp().clamp(max=9.0)", "{x}.cos()", "F.softplus({x})", "(1 - {x})", "F.elu({x}) + 1")
MODULES = ("nn.ReLU()", "nn.GELU()", "nn.PReLU()", "nn.PReLU({c})", "nn.SiLU()", "nn.Dropout(0.3)", "nn.Identity()")
IN_PLACE = ("{x}.relu_()", "{x}.add_(1.0)", "{x}.mul_(0.5)", "F.relu({x}, inplace=True)", "{x}.clamp_(min=-1.0)")


def activation(d: Draft, x: Value) -> None:
    """Any function of each element."""
    d.step("activation", d.rng.choice(ACTIVATIONS).format(x=x.name), x.kind, x.shape)


def activation_module(d: Draft, x: Value) -> bool:
    """The same as a module; PReLU has a slope, for each channel of dim 1."""
    code = d.rng.choice(MODULES)
    if "{c}" in code and x.kind == SEQUENCE:
        return False
    d.step("activation module", f"{d.member(code.format(c=x.width))}({x.name})", x.kind, x.shape)
    return True


def in_place(d: Draft, x: Value) -> bool:
    """A write into a value that other steps may read; seldom into an input."""
    if x in d.inputs and not d.coin(0.1):
        return False
    d.step("in place", d.rng.choice(IN_PLACE).format(x=x.name), x.kind, x.shape)
    return True


def write_part(d: Draft, x: Value) -> bool:
    """A write into some channels of a copy."""
    if x.width < 4:
        return False
    part = ":, " * dim(x) + f"{x.width // 2}:"
    code = d.rng.choice(("t[{part}] = 0.5", "t[{part}] *= 2", "t[{part}].add_(1)", "t[{part}] = t[{part}].tanh()"))
    d.step("write part", [f"t = {x.name}.clone()", code.format(part=part), "t"], x.kind, x.shape)
    return True


def residual(d: Draft, x: Value) -> bool:
    """A sum, or another combination of two tensors alike."""
    y = d.alike(x)
    if y is None:
        return False
    ways = ["{x} + {y}"] * 4 + ["{x} - {y}", "torch.add({x}, {y}, alpha=0.5)", "torch.maximum({x}, {y})"]
    ways += ["{x} * torch.sigmoid({y})", "{x} * {y}.tanh()", "torch.lerp({x}, {y}, 0.3)", "({x} + {y}) / 2"]
    ways += ["torch.where({y} > 0, {x}, {y})", "torch.stack([{x}, {y}]).sum(0)", "{x} / (1 + {y}.square())"]
    ways += ["torch.stack([{x}, {y}], 1).mean(1)", "torch.addcmul({x}, {x}.tanh(), {y}.tanh())"]
    d.step("two alike", d.rng.choice(ways).format(x=x.name, y=y.name), x.kind, x.shape)
    return True


def join(d: Draft, x: Value) -> bool:
    """Channels of several tensors side by side."""
    y = d.beside(x)
    if y is None or x.width + y.width > 48:
        return False
    names = [x.name, y.name]
    d.rng.shuffle(names)
    width = x.width + y.width
    if d.coin(0.2) and width + x.width < 48:
        names, width = [*names, x.name], width + x.width
    d.step("cat", f"torch.cat([{', '.join(names)}], {dim(x)})", x.kind, with_width(x, width))
    return True


def part(d: Draft, x: Value) -> bool:
    """Some of the channels."""
    c, at = x.width, ":, " * dim(x)
    if c < 4:
        return False
    cut = d.rng.randrange(1, c - 1)
    half, rest = c // 2, c - cut
    ways = [
        (f"{x.name}[{at}{cut}:]", rest),
        (f"{x.name}[{at}:{cut}]", cut),
        (f"{x.name}[{at}::2]", (c + 1) // 2),
        (f"{x.name}.narrow({dim(x)}, {cut}, {rest})", rest),
        (f"{x.name}.split([{cut}, {rest}], {dim(x)})[1]", rest),
    ]
    if c % 2 == 0:
        ways += [(f"{x.name}.chunk(2, {dim(x)})[{d.rng.randrange(2)}]", half)] * 2
        ways += [
            (f"torch.tensor_split({x.name}, 2, {dim(x)})[0]", half),
            (f"{x.name}.unfold({dim(x)}, 2, 2)[..., 0]", half),
        ]
    code, width = d.rng.choice(ways)
    if "unfold" in code and x.kind != VECTOR:
        return False
    d.step("part", code, x.kind, with_width(x, width))
    return True


def halves(d: Draft, x: Value) -> bool:
    """Both halves, combined: a gated unit, a swap, a rotation."""
    c, at = x.width, dim(x)
    if c % 2 or c < 4:
        return False
    ways = [("a * torch.sigmoid(b)", c // 2), (f"torch.cat([b, a], {at})", c), (f"torch.cat([-b, a], {at})", c)]
    ways += [("F.silu(a) * b", c // 2), ("a + b", c // 2), (f"torch.cat([a, b.relu()], {at})", c)]
    code, width = d.rng.choice(ways)
    cuts = (f"{x.name}.chunk(2, {at})", f"{x.name}.split({c // 2}, {at})", f"{x.name}.split([{c // 2}] * 2, {at})")
    cut = d.rng.choice(cuts)
    if d.coin(0.15):
        d.step("glu", f"F.glu({x.name}, {at})", x.kind, with_width(x, c // 2))
    else:
        d.step("halves", [f"a, b = {cut}", code], x.kind, with_width(x, width))
    return True


def order(d: Draft, x: Value) -> bool:
    """Channels in another order, some of them twice."""
    c, at = x.width, dim(x)
    way = d.rng.randrange(6)
    if way == 0:
        d.step("flip", f"{x.name}.flip({at})", x.kind, x.shape)
    elif way == 1:
        d.step("roll", f"{x.name}.roll({d.rng.randrange(1, c) if c > 1 else 1}, {at})", x.kind, x.shape)
    elif way == 2:
        chosen = [d.rng.randrange(c) for _ in range(d.rng.randrange(2, c + 2))]
        where = d.buffer(f"torch.tensor({chosen})")
        d.step("index_select", f"{x.name}.index_select({at}, {where})", x.kind, with_width(x, len(chosen)))
    elif way == 3:
        chosen = d.rng.sample(range(c), c)
        d.step("index", f"{x.name}[{':, ' * at}{d.buffer(f'torch.tensor({chosen})')}]", x.kind, x.shape)
    elif way == 4 and 2 * c <= 48:
        code = d.rng.choice((f"repeat_interleave(2, {at})", f"tile({_times(x, 2)})", f"repeat({_times(x, 2)})"))
        d.step("repeat", f"{x.name}.{code}", x.kind, with_width(x, 2 * c))
    else:
        return False
    return True


def _times(x: Value, times: int) -> str:
    counts = [1] * (len(x.shape) + 1)
    counts[dim(x)] = times
    return ", ".join(map(str, counts))


def shuffle(d: Draft, x: Value) -> bool:
    """Channels as groups, transposed: ShuffleNet's way."""
    g, c = d.divisor(x.width), x.width
    if g in (1, c):
        return False
    before, after = list(map(str, x.shape[: dim(x) - 1])), [str(n) for n in x.shape[dim(x) :]]
    wide = ", ".join([f"{x.name}.shape[0]", *before, str(g), str(c // g), *after])
    flat = ", ".join([f"{x.name}.shape[0]", *before, str(c), *after])
    turned = f"{x.name}.view({wide}).transpose({dim(x)}, {dim(x) + 1})".replace(".view(", ".reshape(")
    d.step("shuffle", f"{turned}.reshape({flat})", x.kind, x.shape)
    return True


def affine(d: Draft, x: Value) -> None:
    """A learned factor and summand for each channel, some of them buffers or constants."""
    c = x.width
    after = "[:, None, None]" if x.kind == IMAGE else "[:, None]" if x.kind == SIGNAL else ""
    scale = d.rng.choice((d.parameter, lambda n: d.buffer(f"torch.linspace(0.5, 1.5, {n})")))(c)
    ways = [
        "{x} * {s}{a}",
        "{x} + {s}{a}",
        "torch.addcmul({s}{a}, {x}, {s}{a})",
        "{x} * {s}{a} + {s}{a}",
        "{x} - {s}{a}",
    ]
    ways += [
        "{x} * {s}.sigmoid(){a}",
        "{x} * {s}{a}.expand_as({x})",
        "{x} * torch.arange(1, {c1}, dtype={x}.dtype){a} / {c}",
    ]
    d.step("affine", d.rng.choice(ways).format(x=x.name, s=scale, a=after, c=c, c1=c + 1), x.kind, x.shape)


def statistic(d: Draft, x: Value) -> bool:
    """What runs over all channels and keeps their shape."""
    at = dim(x)
    ways = [
        "{x}.softmax({d})",
        "{x}.log_softmax({d})",
        "F.normalize({x}, dim={d})",
        "{x} - {x}.mean({d}, keepdim=True)",
    ]
    ways += [
        "{x}.cumsum({d})",
        "{x} / (1 + {x}.norm(dim={d}, keepdim=True))",
        "{x} * {x}.sum({d}, keepdim=True).tanh()",
    ]
    ways += ["{x} / ({x}.var({d}, keepdim=True) + 1).sqrt()", "{x} - {x}.amax({d}, keepdim=True)"]
    ways += ["{x} / (1 + {x}.abs().sum({d}, keepdim=True))", "{x} - {x}.logsumexp({d}, keepdim=True)"]
    if x.width < 2:
        return False
    # What a removed channel holds matters where channels are summed: often it is not zero.
    of = d.rng.choice(NOT_ZERO).format(x=x.name) if d.coin(0.4) else x.name
    d.step("statistic", [f"t = {of}", d.rng.choice(ways).format(x="t", d=at)], x.kind, x.shape)
    return True


def contract(d: Draft, x: Value) -> bool:
    """Channels of two activations are multiplied and summed: scores, similarities, Gram matrices."""
    y = d.alike(x) or x
    lines = [
        f"{t} = {d.rng.choice((*NOT_ZERO, '{x}', '{x}', 'torch.relu({x})')).format(x=v.name)}"
        for t, v in zip("ab", (x, y))
    ]
    if x.kind == VECTOR:
        ways = [("a * (a * b).sum(-1, keepdim=True).tanh()", VECTOR, x.shape)]
        ways += [("a * F.cosine_similarity(a, b, dim=-1)[:, None]", VECTOR, x.shape)]
        ways += [("b - torch.einsum('bc,bc->b', a, b).tanh()[:, None]", VECTOR, x.shape)]
    elif x.kind == SEQUENCE:
        t = x.shape[0]
        ways = [("torch.einsum('btc,bsc->bts', a, b)", SEQUENCE, (t, t)), ("a @ b.transpose(1, 2)", SEQUENCE, (t, t))]
        ways += [("torch.bmm((a @ b.transpose(1, 2) / 4).softmax(-1), a)", SEQUENCE, x.shape)]
        ways += [("a.transpose(1, 2) @ b", SEQUENCE, (x.width, x.width))]
    else:
        flat = "torch.bmm(a.flatten(2), b.flatten(2).transpose(1, 2)) / 8"
        ways = [(flat, SEQUENCE, (x.width, x.width)), ("a * (a * b).sum(1, keepdim=True).tanh()", x.kind, x.shape)]
    code, kind, shape = d.rng.choice(ways)
    d.step("contract", [*lines, code], kind, shape)
    return True


def use_mask(d: Draft, x: Value) -> bool:
    """Places out of a mask are set to zero."""
    masks = [v for v in d.inputs if v.kind == MASK]
    if not masks or x.kind != SEQUENCE or x.shape[0] != masks[0].shape[0]:
        return False
    mask = masks[0].name
    ways = [f"{x.name}.masked_fill(~{mask}[..., None], 0.0)", f"{x.name} * {mask}[..., None]"]
    ways += [f"{x.name} * {mask}[..., None].to({x.name}.dtype)", f"torch.where({mask}.unsqueeze(-1), {x.name}, 0.0)"]
    d.step("mask", d.rng.choice(ways), x.kind, x.shape)
    return True


def use_number(d: Draft, x: Value) -> bool:
    """A number among the inputs, or a size, takes part."""
    found = [v for v in d.inputs if v.kind == SCALE]
    ways = [f"{x.name} * ({x.name}.shape[{dim(x)}] ** -0.5)", f"{x.name} + {x.name}.size({dim(x)}) / 10"]
    ways += [f"{x.name} * {v.name}" for v in found] * 2
    d.step("number", d.rng.choice(ways), x.kind, x.shape)
    return True


def over_batch(d: Draft, x: Value) -> bool:
    """Something over the batch: a result must not take the example's size for granted."""
    if not d.coin(0.3):
        return False
    ways = ["{x} - {x}.mean(0, keepdim=True)", "{x} / {x}.shape[0]", "{x} + {x}.sum(0)", "{x}.flip(0)"]
    ways += ["torch.cat([{x}, {x}])[: {x}.shape[0]]", "{x} - {x}[:1]"]
    d.step("batch", d.rng.choice(ways).format(x=x.name), x.kind, x.shape)
    return True


def counter(d: Draft, x: Value) -> bool:
    """A buffer that every call changes."""
    if not d.coin(0.1):
        return False
    d.step("counter", f"{d.member('Counter()')}({x.name})", x.kind, x.shape)
    return True


ANY = (
    *(activation, activation, activation, activation_module, in_place, write_part, residual, residual, residual),
    *(
        join,
        join,
        part,
        halves,
        halves,
        order,
        shuffle,
        affine,
        affine,
        statistic,
        statistic,
        contract,
        contract,
        use_mask,
        use_mask,
    ),
    *(use_number, over_batch, counter),
)

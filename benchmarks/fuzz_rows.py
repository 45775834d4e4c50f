"""Random steps over vectors and sequences: linears in all their forms, norms, attention, gates, reductions."""

from __future__ import annotations

from benchmarks.fuzz_draft import Draft
from benchmarks.fuzz_sketch import IMAGE, MASK, SEQUENCE, SIGNAL, VECTOR, Value


def _like(x: Value, width: int) -> tuple[int, ...]:
    return (*x.shape[:-1], width)


def linear(d: Draft, x: Value) -> None:
    """A linear layer, seldom one that ran before."""
    o = d.width()
    again = [(name, wide) for name, narrow, wide in d.linears if narrow == x.width]
    if again and d.coin(0.15):
        name, o = d.rng.choice(again)
        d.step("shared linear", f"{name}({x.name})", x.kind, _like(x, o))
        return
    bias = "" if d.coin(0.75) else ", bias=False"
    code = f"nn.Linear({x.width}, {o}{bias})"
    if d.coin(0.05):
        code = f"weight_normed({code})"
    name = d.member(code)
    d.linears.append((name, x.width, o))
    d.step("linear", f"{name}({x.name})", x.kind, _like(x, o))


def square(d: Draft, x: Value) -> None:
    """A linear as wide as its input, beside a way around it, or called twice."""
    m = d.member(f"nn.Linear({x.width}, {x.width})")
    ways = [f"{x.name} + {m}({x.name})", f"{m}(torch.relu({m}({x.name})))", f"{x.name} * torch.sigmoid({m}({x.name}))"]
    d.step("square linear", d.rng.choice(ways), x.kind, x.shape)


def mlp(d: Draft, x: Value) -> None:
    """Two linears or three, in a Sequential or by hand."""
    h, o = d.width(), d.width()
    act = d.rng.choice(("nn.ReLU()", "nn.GELU()", "nn.Tanh()", "nn.SiLU()", "nn.ReLU(inplace=True)", "nn.Sigmoid()"))
    norm = d.rng.choice(
        ("", "", f", nn.LayerNorm({h})", f", nn.RMSNorm({h})", f", nn.Dropout(0.1), nn.Linear({h}, {h})")
    )
    if x.kind == VECTOR and d.coin(0.3):
        norm = f", nn.BatchNorm1d({h})"
    m = d.member(f"nn.Sequential(nn.Linear({x.width}, {h}){norm}, {act}, nn.Linear({h}, {o}))")
    d.step("mlp", f"{m}({x.name})", x.kind, _like(x, o))


def functional(d: Draft, x: Value) -> bool:
    """A parameter that some product reads, with no module around it."""
    i, o, way = x.width, d.width(), d.rng.randrange(9)
    name = x.name
    if way == 0:
        code = f"F.linear({name}, {d.parameter(o, i)}, {d.parameter(o)})"
    elif way == 1:
        code = f"{name} @ {d.parameter(i, o)}"
    elif way == 2:
        code = f"torch.einsum('...i,oi->...o', {name}, {d.parameter(o, i)})"
    elif way == 3:
        code = f"torch.matmul({name}, {d.parameter(o, i)}.t())"
    elif way == 4 and x.kind == VECTOR:
        code = f"torch.addmm({d.parameter(o)}, {name}, {d.parameter(i, o)})"
    elif way == 5:
        weight = d.parameter(o, i)
        code, o = f"F.linear(torch.relu(F.linear({name}, {weight})), {weight}.t())", i
    elif way == 6:
        weight = d.parameter(o, i)
        code = f"F.linear({name}, {weight} * {weight}.sigmoid())"
    elif way == 7 and x.kind == SEQUENCE:
        code = f"torch.bmm({name}, {d.parameter(i, o)}.expand({name}.shape[0], {i}, {o}))"
    elif way == 8 and i % 2 == 0:
        parts, weight = f"{name}.unflatten(-1, (2, {i // 2}))", d.parameter(2, i // 2, 6)
        code, o = f"torch.einsum('...hi,hio->...ho', {parts}, {weight}).flatten(-2)", 12
    else:
        return False
    d.step("functional", code, x.kind, _like(x, o))
    return True


def tied(d: Draft, x: Value) -> None:
    """Two modules with one weight."""
    i = x.width
    first = d.member(f"nn.Linear({i}, {i})")
    second = d.member(f"tied({first}, nn.Linear({i}, {i}))")
    d.step("tied", f"{second}(torch.relu({first}({x.name})))", x.kind, x.shape)


def norm(d: Draft, x: Value) -> bool:
    """A norm over the last dimension, or of the batch."""
    c = x.width
    if c < 2:
        return False
    codes = [f"nn.LayerNorm({c})", f"nn.LayerNorm({c}, bias=False)", f"nn.RMSNorm({c})", f"OwnRMSNorm({c})"]
    codes += [f"nn.LayerNorm({c}, elementwise_affine=False)"]
    if x.kind == VECTOR:
        g = d.divisor(c)
        codes += [f"nn.BatchNorm1d({c})"] * 3 + [f"nn.BatchNorm1d({c}, affine=False)"]
        codes += [f"nn.GroupNorm({g}, {c})"] if g not in (1, c) else []
    d.step("norm", f"{d.member(d.rng.choice(codes))}({x.name})", x.kind, x.shape)
    return True


def blocks(d: Draft, x: Value) -> None:
    """A block that is there in every transformer, or a residual one of linears."""
    c = x.width
    flag = d.rng.choice(("True", "False"))
    codes = [f"SwiGLU({c}, {d.width()}, bias={flag}, fused={d.coin()})", f"Experts({c}, {c}, 3, stacked={d.coin(0.3)})"]
    codes += [f"ResidualMLP({c}, {d.width()}, norm='{kind}')" for kind in ("layer", "rms", "none")]
    codes += [f"ResidualMLP({c}, {d.width()}, post=True)"]
    d.step("block", f"{d.member(d.rng.choice(codes))}({x.name})", x.kind, x.shape)


def heads(d: Draft, x: Value) -> bool:
    """Channels seen as [heads, size] for one step."""
    c, g = x.width, d.divisor(x.width)
    if g in (1, c):
        return False
    s, name = c // g, x.name
    wide, flat = f"{name}.unflatten(-1, ({g}, {s}))", ".flatten(-2)"
    ways = [
        (f"({wide} * {d.parameter(g, s)}){flat}", c),
        (f"{wide}.softmax(-1){flat}", c),
        (f"{wide}.transpose(-1, -2){flat}", c),
        (f"{wide}.mean(-1)", g),
        (f"{wide}.sum(-2)", s),
        (f"F.layer_norm({wide}, ({s},)){flat}", c),
        (f"({wide} - {wide}.mean(-2, keepdim=True)){flat}", c),
        (f"{wide}[..., : {max(1, s // 2)}]{flat}", g * max(1, s // 2)),
        (f"({wide} @ {d.parameter(s, s)}){flat}", c),
    ]
    code, width = d.rng.choice(ways)
    d.step("heads", code, x.kind, _like(x, width))
    return True


def outer(d: Draft, x: Value) -> bool:
    """Products of all pairs of two vectors' elements, or a bilinear form."""
    y = d.beside(x)
    if x.kind != VECTOR or y is None or x.width * y.width > 128:
        return False
    if d.coin():
        d.step("bilinear", f"{d.member(f'nn.Bilinear({x.width}, {y.width}, 6)')}({x.name}, {y.name})", VECTOR, (6,))
    else:
        pairs = f"torch.einsum('bi,bj->bij', {x.name}, {y.name}).reshape({x.name}.shape[0], -1)"
        ways = (f"({x.name}[:, :, None] * {y.name}[:, None, :]).flatten(1)", pairs)
        d.step("outer", d.rng.choice(ways), VECTOR, (x.width * y.width,))
    return True


def fold(d: Draft, x: Value) -> bool:
    """A vector becomes a sequence, a signal or an image."""
    c, n = x.width, d.divisor(x.width)
    if n == 1 or c // n < 2:
        return False
    way = d.rng.randrange(3)
    if way == 0:
        d.step("fold", f"{x.name}.reshape({x.name}.shape[0], {n}, {c // n})", SEQUENCE, (n, c // n))
    elif way == 1:
        d.step("fold", f"{x.name}.reshape(-1, {c // n}, {n})", SIGNAL, (c // n, n))
    else:
        d.step("fold", f"{x.name}[:, :, None, None].expand(-1, -1, 4, 4)", IMAGE, (c, 4, 4))
    return True


def attention(d: Draft, x: Value) -> bool:
    """Self-attention of our own or torch's."""
    c, h = x.width, d.divisor(x.width, 4)
    if h in (1, c):
        return False
    masks = [v.name for v in d.inputs if v.kind == MASK and v.shape == x.shape[:1]]
    mask = d.rng.choice(masks) if masks and d.coin() else ""
    if d.coin(0.25):
        m = d.member(f"nn.MultiheadAttention({c}, {h}, batch_first=True, bias={d.coin(0.7)})")
        told = f", key_padding_mask=~{mask}" if mask else ""
        weights = d.coin(0.3)
        code = f"{m}({x.name}, {x.name}, {x.name}{told}, need_weights={weights})[0]"
        d.step("MultiheadAttention", code, x.kind, x.shape)
    elif d.coin(0.1):
        layer = f"nn.TransformerEncoderLayer({c}, {h}, {d.width()}, batch_first=True, norm_first={d.coin()})"
        d.step("TransformerEncoderLayer", f"{d.member(layer)}({x.name})", x.kind, x.shape)
    elif d.coin(0.15):
        d.step("residual attention", f"{d.member(f'ResidualAttention({c}, {h})')}({x.name})", x.kind, x.shape)
    else:
        groups = d.rng.choice([g for g in range(1, h + 1) if h % g == 0])
        size, way = d.rng.choice((2, 4, 4, 6, 8)), d.rng.choice(("sdpa", "sdpa", "gqa", "softmax", "einsum"))
        more = f"fused={d.coin(0.3)}, rotary={d.coin(0.4)}, causal={not mask and d.coin(0.4)}, bias={d.coin()}"
        m = d.member(f"Attention({c}, {h}, {groups}, {size}, way='{way}', {more})")
        d.step("attention", f"{m}({x.name}{', ' + mask if mask else ''})", x.kind, x.shape)
    return True


def cross(d: Draft, x: Value) -> bool:
    """Attention of one sequence to another."""
    found = [v for v in d.values if v.kind == SEQUENCE and v.name != x.name and v.width == x.width]
    if not found:
        return False
    y = d.rng.choice(found)
    code = f"F.scaled_dot_product_attention({x.name}[:, None], {y.name}[:, None], {y.name}[:, None])[:, 0]"
    if d.coin():
        code = f"({x.name} @ {y.name}.transpose(1, 2) * 0.3).softmax(-1) @ {y.name}"
    d.step("cross attention", code, SEQUENCE, x.shape)
    return True


def recurrent(d: Draft, x: Value) -> bool:
    """An LSTM, GRU or RNN."""
    if not d.coin(0.4):
        return False
    o, both = d.rng.choice((4, 6, 8)), d.coin(0.2)
    code = f"Recurrent('{d.rng.choice(('LSTM', 'GRU', 'RNN'))}', {x.width}, {o}, {d.rng.choice((1, 1, 2))}, {both})"
    d.step("recurrent", f"{d.member(code)}({x.name})", SEQUENCE, (x.shape[0], 2 * o if both else o))
    return True


def over_places(d: Draft, x: Value) -> None:
    """Places of a sequence mix: positions, a linear over places, sums so far, a token in front."""
    t, c = x.shape
    ways = [
        (f"{x.name} + {d.parameter(t, c)}", t),
        (f"{x.name} + {d.member(f'nn.Embedding({t}, {c})')}(torch.arange({t}))", t),
        (f"{d.member(f'nn.Linear({t}, {t})')}({x.name}.transpose(1, 2)).transpose(1, 2)", t),
        (f"{x.name}.cumsum(1)", t),
        (f"torch.cat([{d.parameter(1, 1, c)}.expand({x.name}.shape[0], -1, -1), {x.name}], 1)", t + 1),
        (f"{x.name}.softmax(1)", t),
        (f"torch.einsum('btc,st->bsc', {x.name}, {d.parameter(t + 1, t)})", t + 1),
        (f"F.pad({x.name}, (0, 0, 1, 0))[:, :-1]", t),
    ]
    code, places = d.rng.choice(ways)
    d.step("over places", code, SEQUENCE, (places, c))


def pool(d: Draft, x: Value) -> None:
    """A vector of a sequence, or the sequence as another kind."""
    t, c = x.shape
    ways = [("{x}.mean(1)", VECTOR, (c,)), ("{x}.amax(1)", VECTOR, (c,)), ("{x}[:, 0]", VECTOR, (c,))]
    ways += [("{x}[:, -1]", VECTOR, (c,)), ("{x}.sum(1)", VECTOR, (c,)), ("{x}.transpose(1, 2)", SIGNAL, (c, t))]
    ways += [("{x}.permute(0, 2, 1).contiguous()", SIGNAL, (c, t)), ("{x}.std(1)", VECTOR, (c,))]
    ways += [("{x}.flatten(1)", VECTOR, (t * c,))] if t * c <= 96 else []
    ways += [("{x}.sum(-1)", VECTOR, (t,)), ("{x}.mean(-1)", VECTOR, (t,))]
    code, kind, shape = d.rng.choice(ways)
    d.step("pool", code.format(x=x.name), kind, shape)


BOTH = (
    linear,
    linear,
    linear,
    linear,
    mlp,
    mlp,
    square,
    functional,
    functional,
    tied,
    norm,
    norm,
    blocks,
    blocks,
    heads,
)
VECTORS = (*BOTH, outer, fold)
SEQUENCES = (*BOTH, attention, attention, attention, attention, cross, recurrent, over_places, over_places, pool, pool)

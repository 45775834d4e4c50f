"""Mutants in nets: which ops become one call, and what that computes."""

from __future__ import annotations

from benchmarks.mutant import Mutant

_TOKENS = "tests/lower/test_nets_tokens.py"
_NETS = "tests/lower/test_nets.py"
_KERNEL = "tests/kernels/test_net.py"
_KERNEL_TOKENS = "tests/kernels/test_net_tokens.py"
_CACHE = "tests/lower/test_attention.py"

NETS = (
    Mutant(
        "fxprune/lower/nets/read_tokens.py",
        "first = int(found[0, 0, 0, 0])",
        "first = 0",
        "keys and values in one tensor with the queries are read as the queries",
        f"{_TOKENS}::test_layers_become_one_net",
    ),
    Mutant(
        "fxprune/lower/nets/read_tokens.py",
        "return _Source(tokens, heads, size, first, chain) if torch.equal(found, wanted) else None",
        "return _Source(tokens, heads, size, first, chain)",
        "heads are taken to lie side by side where they do not",
        f"{_TOKENS}::test_heads_that_do_not_lie_side_by_side_stay_outside",
    ),
    Mutant(
        "fxprune/lower/nets/read_tokens.py",
        "return found is not None and torch.equal(found, numbers.transpose(1, 2).flatten(2))",
        "return found is not None",
        "heads are taken to be put side by side where they are not",
        f"{_TOKENS}::test_heads_that_are_not_put_side_by_side_stay_outside",
    ),
    Mutant(
        "fxprune/lower/nets/masks.py",
        "return bool(found.all()) if found.dtype == torch.bool else not bool(found.any())",
        "return True",
        "a mask of constants is dropped, whatever it hides",
        f"{_TOKENS}::test_a_mask_of_constants_that_hides_nothing_is_none",
    ),
    Mutant(
        "fxprune/lower/nets/masks.py",
        "aten.where.Scalar, (mask, 0.0, -math.inf)",
        "aten.where.Scalar, (mask, -math.inf, 0.0)",
        "a mask shows what it hides",
        f"{_TOKENS}::test_masks",
    ),
    Mutant(
        "fxprune/lower/nets/regions.py",
        "        nodes -= others",
        "        break",
        "views that others read vanish with the attention",
        f"{_TOKENS}::test_what_others_read_as_well_is_handed_out",
    ),
    Mutant(
        "fxprune/lower/nets/regions.py",
        "if now < 0 or now in blocked:",
        "if now < 0:",
        "a region takes in what hangs on it through something else",
        f"{_NETS}",
    ),
    Mutant(
        "fxprune/lower/nets/lower.py",
        "return not forced and (part.kind",
        "return not forced or (part.kind",
        "dense linears go into nets",
        f"{_TOKENS}::test_dense_linears_stay_outside",
    ),
    Mutant(
        "fxprune/kernels/native/net_attention.h",
        "s = query < static_cast<int32_t>(first + j)",
        "s = query <= static_cast<int32_t>(first + j)",
        "a causal query does not see itself",
        f"{_KERNEL_TOKENS}::test_attention",
    ),
    Mutant(
        "fxprune/kernels/native/net_attention.h",
        "each.from[l] = image < to.nb ? image * g.ly * g.lx + ix : -1;",
        "each.from[l] = image < to.nb ? ix : -1;",
        "all images of a vector take the first one's keys",
        f"{_KERNEL_TOKENS}::test_an_encoder_layer",
    ),
    Mutant(
        "fxprune/kernels/native/net_norm.h",
        "scale[v] = scale[v] / static_cast<float>(channels) + epsilon;",
        "scale[v] = scale[v] / static_cast<float>(channels);",
        "a norm forgets its epsilon",
        f"{_KERNEL_TOKENS}::test_layer_norm",
    ),
    Mutant(
        "fxprune/kernels/native/net_depth_first.h",
        "turns[band][turn[*high]].end.push_back(&row);",
        "turns[band][turn[*low]].end.push_back(&row);",
        "a row's place is taken again before it was read",
        f"{_KERNEL}",
    ),
    Mutant(
        "fxprune/kernels/native/net_depth_first.h",
        "if (user != item && writes(user, row)) needs_[item].push_back(user);",
        "if (user != item && writes(user, row) && user % 8 != 0) needs_[item].push_back(user);",
        "a row is read before it is made",
        f"{_KERNEL}",
    ),
    Mutant(
        "fxprune/kernels/native/maps.h",
        "if (iy * g.bh + r < 0 || iy * g.bh + r >= in.height) continue;",
        "if (r < 0 || r >= g.bh || iy * g.bh + r >= in.height) continue;",
        "what lies over the edge of a sub-block is not waited for",
        f"{_KERNEL}",
    ),
    Mutant(
        "fxprune/kernels/native/net_steps.h",
        "from.images == 1 ? 0 : f.image * image",
        "f.image * image",
        "a constant is read as if each image had its own",
        f"{_KERNEL}",
    ),
    Mutant(
        "fxprune/kernels/native/net_place.h",
        "if (times == 1) plan_.maps[made].storage = at(old).storage;",
        "plan_.maps[made].storage = at(old).storage;",
        "a step writes over what it reads twice",
        f"{_KERNEL}",
    ),
    Mutant(
        "fxprune/kernels/native/conv_rows.h",
        "sum[v] = sum[v] > e.finish.high ? Lane{} + e.finish.high : sum[v];",
        "sum[v] = sum[v];",
        "a clamp has no upper end",
        f"{_KERNEL}",
    ),
    Mutant(
        "fxprune/kernels/native/net_steps.h",
        "shuffles ? y % again_h * again_w + x % again_w : 0",
        "shuffles ? x % again_w * again_h + y % again_h : 0",
        "a shuffle takes the places of a channel column by column",
        f"{_KERNEL}",
    ),
    Mutant(
        "fxprune/lower/nets/transposed.py",
        "rest = apart * (size - 1) + 1 + more[d] - 2 * before - step",
        "rest = apart * (size - 1) + 1 - 2 * before - step",
        "a transposed convolution forgets its output padding",
        f"{_NETS}::test_a_model_becomes_one_net",
    ),
    Mutant(
        "fxprune/kernels/native/net_product.h",
        "              block > 0, expander);",
        "              false, expander);",
        "of a long row of a product only the last blocks count",
        f"{_KERNEL_TOKENS}::test_products_by_tiles",
    ),
    Mutant(
        "fxprune/kernels/native/net_attention_tiles.h",
        "s = key < 0 ? Lane{} + kNever : s;",
        "s = s;",
        "places that hold no key are seen",
        f"{_KERNEL_TOKENS}::test_long_heads_of_bfloat16_numbers",
    ),
    Mutant(
        "fxprune/kernels/native/bitmap.py",
        "if not any((block & 0xFFFF).any() for block in blocks):",
        "if not any((block & 0xFF).any() for block in blocks):",
        "a weight is stored in 16 bits though it needs more",
        "tests/lower/test_bitmap.py",
    ),
    Mutant(
        "fxprune/measure/timing.py",
        "return 4 * wins >= 3 * len(self.warm)",
        "return 2 * wins >= len(self.warm)",
        "a form is taken for faster that was in every other round",
        "tests/measure/test_measure.py::test_who_beats_another_was_faster_in_three_of_four_rounds",
    ),
    Mutant(
        "fxprune/lower/attention.py",
        "since.get(x) != since[reader] or not",
        "not",
        "a cache is read where it lies after it was written to",
        f"{_CACHE}::test_what_is_written_to_after_it_was_joined_is_read_as_it_was",
    ),
    Mutant(
        "fxprune/lower/attention.py",
        "if _is_heads(source) and since.get(chain[0]) == since[reader]:",
        "if _is_heads(source):",
        "heads that were copied are read anew after a write",
        f"{_CACHE}::test_heads_that_were_copied_before_a_write_are_read_as_they_were",
    ),
    Mutant(
        "fxprune/lower/attention.py",
        "if found is not None and torch.equal(found, wanted) else 0",
        "if found is not None else 0",
        "heads that alternate are taken for heads that share keys",
        f"{_CACHE}::test_heads_that_alternate_are_not_taken_for_heads_that_share",
    ),
    Mutant(
        "fxprune/lower/attention.py",
        "if lengths[0] == lengths[1]:",
        "if True:",
        "keys in two tensors go with values in one",
        f"{_CACHE}::test_keys_alone_returned",
    ),
    Mutant(
        "fxprune/kernels/native/attention.cpp",
        "if (greatest == kNever) greatest = 0.0f;",
        "",
        "a query that sees no key is nan",
        "tests/kernels/test_attention.py",
    ),
    Mutant(
        "fxprune/kernels/native/attention.cpp",
        "kv_head * p.group() + (first + n) / p.queries, token",
        "kv_head * p.group() + (first + n) % p.group(), token",
        "the queries of heads that share keys are mixed up",
        "tests/kernels/test_attention.py",
    ),
)

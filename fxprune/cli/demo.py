"""`fxprune demo`: prune a real model, compile it, check it, time it, and print a table of what each cost."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from fxprune.measure.benchmark import benchmark
from fxprune.plan.plan import Plan, Rule, Unstructured
from fxprune.select.selection import Selection
from fxprune.transform import transform

from . import demo_data

ENCODER_LINEARS = "encoder.*.weight"
# (sparsity, whether the weights are calibrated or pruned by magnitude alone); the first is what cosines compare with.
WAYS = ((0.0, False), (0.8, False), (0.8, True), (0.9, True))
QUICK_WAYS = ((0.0, False), (0.8, True))
QUICK_DOCUMENTS = 100
QUICK_CALIBRATION = 64
WIDTH = 110

Batch = tuple[Tensor, Tensor]
Model = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    """What one way to prune cost and gained: times in seconds, weights in bytes, `sparsity` and `recall` of 1."""

    sparsity: float
    method: str
    dense: float
    pruned: float
    ratio: float
    ratio_low: float
    ratio_high: float
    recall: float
    cosine: float
    difference: float
    dense_bytes: int
    pruned_bytes: int


@dataclass(frozen=True)
class Texts:
    """Tokenized inputs `[1, seq]`: two examples to time and check with, and the texts to retrieve.

    `calibration` are batches of other documents, `[32, ...]`.
    """

    examples: list[Batch]
    titles: list[Batch]
    bodies: list[Batch]
    calibration: list[dict[str, Tensor]]


def pruning_plan(sparsity: float) -> Plan:
    """Return the plan that prunes the encoder's linear layers by magnitude, each to the same sparsity."""
    return Plan([Rule(ENCODER_LINEARS, Unstructured(sparsity))])


def pruned_eager(model: nn.Module, selection: Selection) -> nn.Module:
    """Return a copy of `model` with the selection's values and zeros written in: plain PyTorch, the right answer."""
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for name in {**selection.mask, **selection.values}:
            parameter = pruned.get_parameter(name)
            parameter.copy_(selection.apply(name, parameter))
    return pruned


def largest_difference(expected: Model, got: Model, batches: Sequence[Batch]) -> float:
    """Return max|expected - got| / max|expected| of the hidden states, the worst of all batches."""
    differences = []
    with torch.no_grad():
        for ids, mask in batches:
            right = expected(ids, attention_mask=mask)[0]
            answer = got(ids, attention_mask=mask)[0]
            differences.append((right - answer).abs().max() / right.abs().max())
    # torch's max, unlike Python's, lets what is not a number through.
    return torch.stack(differences).max().item()


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of `module`; what two of them share counts once."""
    storages = {}
    for tensor in (*module.parameters(), *module.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def example_batches(tokenizer: demo_data.Tokenizer, documents: Sequence[demo_data.Document], seq: int) -> list[Batch]:
    """Return two inputs `[1, seq]`: a story that fills it, and a headline that leaves most of it padding."""
    longest = max(documents, key=lambda document: len(document.body))
    return demo_data.tokenize(tokenizer, [longest.body, documents[0].title], cut=seq, width=seq, rows=1)


def read_texts(tokenizer: demo_data.Tokenizer, count: int, calibrated: int, seq: int) -> Texts:
    """Load the documents and tokenize the examples, `count` documents to retrieve and others to calibrate on.

    One text a batch and as wide as the example, so that the program that was timed is the one that is scored.
    """
    documents = demo_data.load_documents()
    scored = demo_data.evaluation_documents(documents, count)
    titles = [document.title for document in scored]
    bodies = [document.body for document in scored]
    return Texts(
        examples=example_batches(tokenizer, documents, seq),
        titles=demo_data.tokenize(tokenizer, titles, cut=demo_data.TITLE_TOKENS, width=seq, rows=1),
        bodies=demo_data.tokenize(tokenizer, bodies, cut=demo_data.BODY_TOKENS, width=seq, rows=1),
        calibration=calibration_batches(tokenizer, demo_data.calibration_documents(documents, calibrated)),
    )


def calibration_batches(
    tokenizer: demo_data.Tokenizer, documents: Sequence[demo_data.Document]
) -> list[dict[str, Tensor]]:
    """Return the stories and headlines of documents as the model's arguments, 32 rows a batch."""
    cut = {demo_data.BODY_TOKENS: [d.body for d in documents], demo_data.TITLE_TOKENS: [d.title for d in documents]}
    return [
        {"input_ids": ids, "attention_mask": mask}
        for width, texts in cut.items()
        for ids, mask in demo_data.tokenize(tokenizer, texts, cut=width, width=width, rows=32)
    ]


def measure_way(
    model: nn.Module, texts: Texts, way: tuple[float, bool], dense: Tensor | None, step: Callable[[str], None]
) -> tuple[Row, Tensor, str]:
    """Prune, compile, check, score and time `model` one way; return its row, its embeddings and its report.

    `dense` are the embeddings to compare with (None: its own). `step` is told before each of the four parts what comes.
    """
    sparsity, calibrated = way
    ids, mask = texts.examples[0]
    kwargs = {"attention_mask": mask}
    step("calibrate, prune and compile" if calibrated else "prune and compile")
    data = texts.calibration if calibrated else None
    plan = pruning_plan(sparsity)
    fast = transform(model, plan, example_inputs=(ids,), kwargs=kwargs, calibration=data, progress=False)
    step("compare with the pruned model")
    eager = pruned_eager(model, fast.meta["selection"])
    difference = largest_difference(eager, fast, texts.examples)
    step("retrieve")
    count = len(texts.titles)
    titles, bodies = (demo_data.embed(fast, part, count) for part in (texts.titles, texts.bodies))
    found = torch.cat([titles, bodies])
    step("time against dense")
    timed = benchmark(eager, fast, (ids,), kwargs, progress=False)
    row = Row(
        sparsity=sparsity,
        method="" if sparsity == 0 else "calibrated" if calibrated else "by magnitude",
        dense=timed.a.median,
        pruned=timed.b.median,
        ratio=timed.ratio,
        ratio_low=timed.ratio_low,
        ratio_high=timed.ratio_high,
        recall=demo_data.recall_at_1(titles, bodies),
        cosine=1.0 if dense is None else demo_data.mean_cosine(found, dense),
        difference=difference,
        dense_bytes=stored_bytes(eager),
        pruned_bytes=stored_bytes(fast),
    )
    # Each way compiles the model's forward again; past a limit Dynamo would leave the dense side eager.
    torch._dynamo.reset()
    return row, found, str(fast.meta["report"])


def run_demo(*, threads: int | None = None, quick: bool = False, progress: bool = True, seq: int = 128) -> None:
    """Run the demo at batch 1 and `seq` tokens; print one report, the table and what its columns mean."""
    if threads is not None:
        torch.set_num_threads(threads)
    model, tokenizer = demo_data.load_minilm()
    scored, calibrated = (
        (QUICK_DOCUMENTS, QUICK_CALIBRATION)
        if quick
        else (demo_data.EVALUATION_DOCUMENTS, demo_data.CALIBRATION_DOCUMENTS)
    )
    texts = read_texts(tokenizer, scored, calibrated, seq)
    ways = QUICK_WAYS if quick else WAYS
    rows, dense, report = [], None, ""
    # disable=None draws no bar where stderr is not a terminal.
    with tqdm(total=4 * len(ways), disable=None if progress else True, leave=False) as bar:
        for way in ways:

            def step(what: str, label: str = f"{way[0]:.0%}") -> None:
                bar.set_description(f"{label}: {what}")
                bar.update()

            row, found, report = measure_way(model, texts, way, dense, step)
            dense = found if dense is None else dense
            rows.append(row)
    # The report is long; the table comes after it, where the reader is left.
    print(f"The report at {ways[-1][0]:.0%}:\n\n{report}\n")
    print(f"MiniLM-L6, batch 1, {seq} tokens, fp32, threads: {torch.get_num_threads()}\n")
    print(format_table(rows) + "\n")
    embeddings = stored_bytes(model.get_submodule("embeddings"))
    print(explanation(rows, len(texts.titles), calibrated, seq, embeddings))


def format_table(rows: Sequence[Row]) -> str:
    """Return the rows as the demo's table."""
    cells = [
        (
            f"{row.sparsity:.0%}",
            row.method,
            f"{row.dense * 1e3:.1f}",
            f"{row.pruned * 1e3:.1f}",
            f"{row.ratio:.2f}x [{row.ratio_low:.2f}, {row.ratio_high:.2f}]",
            f"{row.recall:.3f}",
            f"{row.cosine:.3f}",
            f"{row.difference:.1e}",
            f"{row.dense_bytes / 1e6:.1f}",
            f"{row.pruned_bytes / 1e6:.1f}",
        )
        for row in rows
    ]
    headers = (
        "sparsity",
        "pruned",
        "dense ms",
        "pruned ms",
        "speed-up",
        "R@1",
        "cos",
        "max diff",
        "dense MB",
        "pruned MB",
    )
    return tabulate(cells, headers=headers, stralign="right", disable_numparse=True)


def explanation(rows: Sequence[Row], scored: int, calibrated: int, seq: int, embedding_bytes: int) -> str:
    """Return what the columns mean, in words that keep pruning's loss and the compiler's error apart."""
    worst = max(row.difference for row in rows)
    meanings = {
        "sparsity": "Share of zeros in the weights of each of the encoder's linear layers.",
        "pruned": "By magnitude: the smallest go, all else stays as it is. Calibrated: masks and weights are fitted, "
        f"layer by layer, to what the dense model computes on {calibrated} other stories, without labels or training.",
        "dense ms": "The same pruned weights, zeros and all, in the fastest of eager PyTorch, torch.compile "
        "and torch.compile, frozen. Both sides are timed in turns; medians are shown.",
        "speed-up": "Dense over pruned, with its interval.",
        "R@1": f"Of {scored} BBC News headlines, the share whose own story is the most similar of {scored} "
        f"(headlines cut to {demo_data.TITLE_TOKENS} tokens, stories to {demo_data.BODY_TOKENS}). Computed "
        f"by the compiled pruned program that was timed, on inputs padded to {seq} tokens.",
        "cos": "Mean cosine between the embeddings of these texts and the dense model's.",
        "max diff": "Largest difference between that program and the pruned model in eager PyTorch, over the "
        f"largest value: the compiler's error, at most {worst:.1e} here. What R@1 loses is pruning's alone.",
        "MB": f"Weights and buffers of the whole model; {embedding_bytes / 1e6:.1f} MB of them are "
        "embeddings, which are not pruned.",
    }
    return "\n".join(
        textwrap.fill(meaning, WIDTH, initial_indent=f"{name:<10}", subsequent_indent=" " * 10)
        for name, meaning in meanings.items()
    )

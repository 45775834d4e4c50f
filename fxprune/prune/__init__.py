"""torch.nn.utils.prune under the same names, with its masks and its state: `import fxprune.prune as prune`.

Modules pruned by torch and by this package mix freely: each side's functions, containers and hooks work on the other's.
What is more than torch's: any weight has every norm; `generator=`, `include_bias=` and `model=` (tied parameters); all
dtypes; deepcopy at any time; a failed call changes nothing; global_unstructured ranks without concatenating; errors
name the parameter. `load_state_dict` reads what a pruned model saved into a model that is not pruned.

As with torch, an entry of nn.ParameterDict or nn.ParameterList, which nothing calls, shows what it was pruned to and
not what was trained since.
"""

from __future__ import annotations

from .amount import (
    _compute_nparams_toprune,
    _validate_pruning_amount,
    _validate_pruning_amount_init,
    _validate_pruning_dim,
    _validate_structured_pruning,
)
from .channels import LnStructured, RandomStructured
from .elements import CustomFromMask, Identity, L1Unstructured, RandomUnstructured
from .functions import (
    custom_from_mask,
    identity,
    is_pruned,
    l1_unstructured,
    ln_structured,
    random_structured,
    random_unstructured,
    remove,
)
from .method import BasePruningMethod, PruningContainer
from .norm import _compute_norm
from .pooled import global_unstructured
from .state import load_state_dict

__all__ = [
    "BasePruningMethod",
    "PruningContainer",
    "Identity",
    "RandomUnstructured",
    "L1Unstructured",
    "RandomStructured",
    "LnStructured",
    "CustomFromMask",
    "identity",
    "random_unstructured",
    "l1_unstructured",
    "random_structured",
    "ln_structured",
    "global_unstructured",
    "custom_from_mask",
    "remove",
    "is_pruned",
    "load_state_dict",
    "_compute_norm",
    "_compute_nparams_toprune",
    "_validate_pruning_amount",
    "_validate_pruning_amount_init",
    "_validate_pruning_dim",
    "_validate_structured_pruning",
]

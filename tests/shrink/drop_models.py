"""Models with residual blocks for the tests of drop, and what is left of them, held against an oracle."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxprune.capture.capture import capture
from fxprune.errors import PlanError
from fxprune.graph.program import Program
from fxprune.shrink.drop.blocks import Block, find_blocks
from fxprune.shrink.drop.drop import Bypassing, drop_blocks

D = 8
TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99,
    "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def first(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A dropped block as a user would write it: it answers its first argument."""
    return x


class Pre(nn.Module):
    """x + f(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Apply(nn.Module):
    """A linear and a function of (linear, *args) as its forward."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(D, D)

    def forward(self, *args: Any) -> Any:
        return self.function(self.linear, *args)


class Between(nn.Module):
    """`block` between two linears, with a function of (block, x) to call it."""

    def __init__(self, block: nn.Module, call: Callable[..., Any] = lambda block, x: block(x)) -> None:
        super().__init__()
        self.before, self.block, self.after, self.call = nn.Linear(D, D), block, nn.Linear(D, D), call

    def forward(self, x: Tensor) -> Any:
        return pytree.tree_map(self.after, self.call(self.block, self.before(x)))


class Basic(nn.Module):
    """A ResNet block with everything in place; with a stride, its shortcut is a projection."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, padding=1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or i != o:
            self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(Basic(8, 8), Basic(8, 8))
        self.layer2 = nn.Sequential(Basic(8, 16, 2), Basic(16, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


def randomised(model: nn.Module) -> nn.Module:
    """The model in evaluation, with batch-norm statistics and norms that do something."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.dim() == 1 and "inv_freq" not in name:
            tensor.data.uniform_(0.5, 1.5)
    return model.eval()


def ids(batch: int, length: int = 12) -> Tensor:
    return torch.randint(3, 99, (batch, length))


def bert(batch: int = 2) -> Case:
    mask = torch.ones(batch, 12, dtype=torch.long)
    mask[-1, 9:] = 0
    return hf.BertModel(hf.BertConfig(**TEXT)), (ids(batch),), {"attention_mask": mask}


def llama(batch: int = 2) -> Case:
    config = hf.LlamaConfig(**TEXT, num_key_value_heads=2, use_cache=False)
    return hf.LlamaForCausalLM(config), (ids(batch),), {}


def vit(batch: int = 2) -> Case:
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    return hf.ViTModel(config), (torch.randn(batch, 3, 16, 16),), {}


def resnet(batch: int = 2) -> Case:
    return ResNet(), (torch.randn(batch, 3, 16, 16),), {}


def find_block(program: Program, path: str) -> Block:
    """The block of one module."""
    return find_blocks(program, [path])[0]


def program_of(model: nn.Module, *args: Any, **kwargs: Any) -> Program:
    return capture(randomised(model), args, kwargs).program


def run(function: Any, *args: Any, **kwargs: Any) -> Any:
    """The outputs of a call on copies of its tensors."""
    args, kwargs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    with torch.no_grad():
        return function(*args, **kwargs)


def bypassed(program: Program, blocks: list[Block], *args: Any, **kwargs: Any) -> Any:
    """The outputs that the oracle gives."""
    flat = [leaf.clone() for leaf in pytree.tree_leaves((args, kwargs))]
    with torch.no_grad():
        flat_out = Bypassing(program, blocks).run(*flat, enable_io_processing=False)
    return program.graph.process_outputs(flat_out)


def replaced(model: nn.Module, paths: list[str], identity: Callable[..., Any] = first) -> nn.Module:
    """The model with identities as the forwards of the modules at `paths`."""
    result = copy.deepcopy(model)
    for path in paths:
        result.get_submodule(path).forward = identity
    return result


@functools.cache
def captured(case: Callable[..., Case]) -> tuple[nn.Module, Program]:
    """A case's model and its program, which no test may change."""
    model, args, kwargs = case()
    return model, program_of(model, *args, **kwargs)


def dropped(model: nn.Module, paths: list[str], *args: Any, **kwargs: Any) -> Program:
    """The program without the blocks, held against the oracle on these arguments, bit for bit."""
    return checked(program_of(model, *args, **kwargs), paths, *args, **kwargs)


def checked(program: Program, paths: list[str], *args: Any, **kwargs: Any) -> Program:
    blocks = [find_block(program, path) for path in paths]
    result = drop_blocks(program, blocks)
    got, expected = run(result, *args, **kwargs), bypassed(program, blocks, *args, **kwargs)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b)
    return result


def refused(model: nn.Module, path: str, *args: Any, **kwargs: Any) -> PlanError:
    """The error for a block, which must say what, where, why and what to do."""
    return refusal(program_of(model, *args, **kwargs), path)


def refusal(program: Program, path: str) -> PlanError:
    with pytest.raises(PlanError) as caught:
        find_block(program, path)
    error = caught.value
    assert error.what == "cannot drop this block" and f'"{path}"' in error.where and error.why and error.do
    return error


def stack(node: torch.fx.Node) -> list[str]:
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]

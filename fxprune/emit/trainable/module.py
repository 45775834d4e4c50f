"""module: Program -> TrainableModule, the torch.fx.GraphModule that transform returns for trainable=True."""

from __future__ import annotations

import copy
import dataclasses
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.node import has_side_effect

from fxprune.capture.capture import Capture
from fxprune.capture.entry import EntryCheck
from fxprune.capture.hooks import mask_hooks, pruned_names
from fxprune.capture.own_masks import Held
from fxprune.emit.pickled import reduced, rooted
from fxprune.emit.pruned import Result
from fxprune.graph.program import (
    Program,
    copy_program,
    owner,
    replace_tensors,
    set_argument,
)
from fxprune.select.mask import PackedMask

from .masks import mask_weights
from .parts import Part, make_layers, name_parts
from .side_by_side import Inserted, ModeArguments

aten = torch.ops.aten

# path.parametrizations.weight.original1 -> path.weight
_PARAMETRIZED = re.compile(r"^(.*\.)?parametrizations\.([^.]+)\.original\d*(?:_orig)?$")


class TrainableModule(Result):
    """A pruned model that trains: an ordinary module.

    Parameters and buffers have the model's own names; `train()` and `eval()` switch what the model's own would. It
    starts in eval mode, as it was captured. It is not compiled: `torch.compile(module)` and `module.compile()` work as
    on any module, and follow train() and eval().
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Nothing calls the parts of a graph, so the pruning hooks that they were given are called here.
        for part in self.modules():
            if isinstance(part, Part):
                for hook in mask_hooks(part).values():
                    hook(part, args)
        return super().__call__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainableModule:
        result = super().__deepcopy__(memo)
        # Copied already: deepcopy remembers.
        return _holding(
            result, {key: copy.deepcopy(value, memo) for key, value in vars(self).items() if _is_held(key, value)}
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return reduced(_rebuild, self)


def _rebuild(state: dict[str, Any], nodes: list[tuple[Any, ...]], codegen: Any) -> TrainableModule:
    return trainable_over(*rooted(state, nodes, codegen))


def trainable_over(root: nn.Module, graph: Graph) -> TrainableModule:
    """A TrainableModule of a graph and the module that holds its parts, tensors, hooks and `meta`."""
    return _holding(_module(root, graph), vars(root))


def _module(root: nn.Module, graph: Graph) -> TrainableModule:
    result = TrainableModule(root, graph, class_name="TrainableModule")
    result.graph._tracer_cls = None
    result._tracer_cls = None
    result.meta = vars(root)["meta"]
    return result


# What torch's GraphModule takes from its root by the reads of its graph alone, or not at all.
_HELD = {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
_HELD |= {"_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"}


def _is_held(key: str, value: Any) -> bool:
    """Whether a module holds its state in this attribute: a weight that a pruning hook masks is a plain one."""
    return key in _HELD or isinstance(value, Tensor)


def _holding(result: TrainableModule, state: Mapping[str, Any]) -> TrainableModule:
    """Gives a copy the very parts, tables and hooks of what it is a copy of, in their order."""
    vars(result).update({key: value for key, value in state.items() if _is_held(key, value)})
    return result


def _names(module: nn.Module) -> list[str]:
    """All parts, parameters and buffers of a module in its order, tied ones under each of their names."""
    names = []
    for path, part in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        names += [path, *(prefix + name for name in (*part._parameters, *part._buffers))]
    return names


def _order(result: nn.Module, names: Sequence[str]) -> None:
    """Puts what `result` holds into the order of `names`; what is new comes last.

    torch's GraphModule has it in the order of the graph, and an optimiser's state goes to parameters by position.
    """
    ranks: dict[str, int] = {}
    for rank, name in enumerate(names):
        ranks.setdefault(name, rank)
    for path, part in result.named_modules():
        prefix = f"{path}." if path else ""
        for table in (part._modules, part._parameters, part._buffers):
            for name in sorted(table, key=lambda name: ranks.get(prefix + name, len(names))):
                table[name] = table.pop(name)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a trainable result takes from the user's model besides the program.

    Names of all that it holds in its own order, of the parameters that require gradients and of the buffers that a
    state_dict holds, the buffers that count batches and those that hold masks, by weight, and the storages (data
    pointers) that a result must not share.
    """

    names: tuple[str, ...]
    trains: frozenset[str]
    saved: frozenset[str]
    counters: Mapping[str, Tensor]
    holders: Mapping[str, Held]
    storages: frozenset[int]


def origin_of(model: nn.Module | ExportedProgram, captured: Capture) -> Origin:
    """Reads an Origin off the model and its capture."""
    program = captured.program
    parameters = dict(program.named_parameters(remove_duplicate=False))
    buffers = dict(program.named_buffers(remove_duplicate=False))
    storages = {t.untyped_storage().data_ptr() for t in [*parameters.values(), *buffers.values()]}
    trains = {name for name, p in parameters.items() if p.requires_grad}
    counters = {name: b for name, b in buffers.items() if name.endswith("num_batches_tracked")}
    if isinstance(model, ExportedProgram):
        names, saved = _with_parts(model.state_dict), set(model.state_dict)
    else:
        names, saved = _plain_names(model), set()
        for path, module in model.named_modules():
            prefix = f"{path}." if path else ""
            saved.update(prefix + name for name in module._buffers.keys() - module._non_persistent_buffers_set)
    return Origin(
        tuple(names), frozenset(trains), frozenset(saved), counters, captured.holders, frozenset(storages - {0})
    )


def _plain_names(model: nn.Module) -> list[str]:
    """The names of a model as they are once its masks and parametrizations are folded, in the order of what holds them.

    So the order is that of `model.parameters()`, where a mask moved a weight behind its bias.
    """
    pruned = {f"{path}.{name}".lstrip(".") for path, m in model.named_modules() for name in pruned_names(m)}
    names = []
    for name in _names(model):
        name = _PARAMETRIZED.sub(r"\1\2", name)
        names.append(name.removesuffix("_orig") if name.removesuffix("_orig") in pruned else name)
    return names


def _with_parts(names: Iterable[str]) -> list[str]:
    """Names of tensors, each behind the paths of the modules that hold it."""
    found: list[str] = []
    for name in names:
        parts = name.split(".")
        found += [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return found


@torch.inference_mode(False)
def emit_trainable(
    program: Program,
    entry: EntryCheck,
    modes: Mapping[str, ModeArguments],
    origin: Origin,
    masks: Mapping[str, PackedMask] | None = None,
    *,
    masked_matmul: bool = False,
) -> TrainableModule:
    """A TrainableModule with tensors of its own, in eval mode; the program is left as it is.

    `modes` of nodes that the program does not have any more are passed over. Each weight of `masks` is multiplied by a
    buffer `<name>_keep`, or by the model's own that held its mask, so that what is zero stays zero; it is zero in the
    parameter too. With
    `masked_matmul` the weights of linear layers are not multiplied: `masked_linear` has the mask as bits.
    """
    draft = copy_program(program)
    own = _own_tensors(draft, origin)
    masked = mask_weights(draft, masks or {}, origin.holders, masked_matmul)
    _switch(draft, modes, {n: own.get(id(t), t) for n, t in origin.counters.items()})
    for node in list(draft.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            # Export asserts the dtypes that it saw; under autocast they are others, and right.
            draft.graph.erase_node(node)
            continue
        node.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    draft.meta = {"entry": entry}
    make_layers(draft)
    result = _module(draft, draft.graph)
    for path, module in result.named_modules():
        prefix = f"{path}." if path else ""
        module._non_persistent_buffers_set = {n for n in module._buffers if prefix + n not in origin.saved | masked}
    _order(result, origin.names)
    name_parts(result)
    return result.eval()


def _own_tensors(draft: Program, origin: Origin) -> dict[int, Tensor]:
    """Puts ordinary parameters and buffers in place of the program's; tied ones stay tied. Returns old id -> new."""
    trains = {id(p) for n, p in draft.named_parameters(remove_duplicate=False) if n in origin.trains}

    def own(old: Tensor) -> Tensor:
        value = old.detach()
        shared = value.untyped_storage().data_ptr() in origin.storages
        partial = value.untyped_storage().nbytes() > value.numel() * value.element_size()
        value = value.clone() if shared or partial or value.is_inference() else value
        return nn.Parameter(value, id(old) in trains) if isinstance(old, nn.Parameter) else value

    return replace_tensors(draft, own)


def _switch(draft: Program, modes: Mapping[str, ModeArguments], counters: Mapping[str, Tensor]) -> None:
    """Makes the graph do in each mode what `modes` say, by reading the module's own `training` flag.

    One graph for both modes needs nothing done in train() and eval(), copies as any graph does, and is recompiled by
    Dynamo's own guard on the flag.
    """
    graph = draft.graph
    nodes = {n.name: n for n in graph.nodes}
    switches = _Switches(draft, counters)
    for name, mode in modes.items():
        node = nodes.get(name)
        if node is None:
            continue
        for source, chain in mode.inserted.items():
            switches.insert(node, nodes.get(source), chain)
        if node.target is aten.batch_norm.default and "training" in mode.differs:
            switches.begin_batch(node, mode.counter)
        for argument, (in_eval, in_train) in mode.differs.items():
            set_argument(node, argument, switches.choose(node, in_eval, in_train))
        if mode.cumulative and mode.counter is not None:
            set_argument(node, "momentum", switches.momentum(node, mode.counter))
    without = {nodes[name] for name, mode in modes.items() if mode.no_grad and name in nodes}
    for node in without:
        readers = [user for user in node.users if user not in without]
        if readers:
            with graph.inserting_after(node):
                detached = graph.call_function(aten.detach.default, (node,))
            for user in readers:
                user.replace_input_with(node, detached)


class _Switches:
    """Nodes that depend on the mode, each made once."""

    def __init__(self, draft: Program, counters: Mapping[str, Tensor]) -> None:
        self._draft, self._graph, self._counters = draft, draft.graph, counters
        self._training: Node | None = None
        self._inserted: dict[str, Node] = {}

    @property
    def training(self) -> Node:
        """The module's own flag, read once, before all else."""
        if self._training is None:
            with self._graph.inserting_before(next(n for n in self._graph.nodes if n.op != "placeholder")):
                # Graph.get_attr would warn that this is no tensor.
                self._training = self._graph.create_node("get_attr", "training", name="training")
        return self._training

    def choose(self, before: Node, in_eval: Any, in_train: Any) -> Node:
        """One of two literals."""
        if (in_eval, in_train) == (False, True):
            return self.training
        training = self.training
        with self._graph.inserting_before(before):
            return self._graph.call_function(operator.getitem, ((in_eval, in_train), training))

    def insert(self, reader: Node, source: Node | None, chain: tuple[Inserted, ...]) -> None:
        """Puts ops between two nodes. Does nothing where the reader reads the source no more."""
        if source is None or source not in reader.all_input_nodes:
            return
        value = source
        for op in chain:
            if op.name not in self._inserted:
                arguments = () if op.p is None else (op.p, self.training)
                with self._graph.inserting_after(value):
                    self._inserted[op.name] = self._graph.call_function(op.op, (value, *arguments))
            value = self._inserted[op.name]
        reader.replace_input_with(source, value)

    def begin_batch(self, norm: Node, counter: str | None) -> None:
        """What nn.BatchNorm does in train mode before it normalises."""
        training, read = self.training, self._counter(norm, counter)
        with self._graph.inserting_before(norm):
            self._graph.call_function(begin_batch, (norm.args[0], read, training))

    def momentum(self, norm: Node, counter: str) -> Node:
        """The momentum of a batch-norm that averages over all batches."""
        training, read = self.training, self._counter(norm, counter)
        with self._graph.inserting_before(norm):
            return self._graph.call_function(cumulative_momentum, (read, training))

    def _counter(self, norm: Node, name: str | None) -> Node | None:
        if name is None or name not in self._counters:
            return None
        module, leaf = owner(self._draft, name)
        if leaf not in module._buffers:
            module.register_buffer(leaf, self._counters[name].detach().clone())
        with self._graph.inserting_before(norm):
            return self._graph.get_attr(name)


@has_side_effect
def begin_batch(x: Tensor, counter: Tensor | None, training: bool) -> None:
    """What nn.BatchNorm does first in train mode: counts the batch, refuses `x` [N, C, ...] of one value a channel."""
    if training:
        if counter is not None:
            counter.add_(1)
        if x.numel() == x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")


def cumulative_momentum(counter: Tensor, training: bool) -> float:
    """The momentum that makes running statistics the mean over all batches: 1 / counter; not used in eval mode."""
    return 1.0 / float(counter) if training else 0.0

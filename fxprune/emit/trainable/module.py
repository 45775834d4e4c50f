"""module: Program -> TrainableModule, the torch.fx.GraphModule that transform returns for trainable=True."""

from __future__ import annotations

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
from fxprune.capture.hooks import pruned_names
from fxprune.emit.pruned import Result
from fxprune.errors import InputError
from fxprune.graph.program import (
    Program,
    copy_program,
    names_of_parameters,
    owner,
    replace_tensors,
    set_argument,
)
from fxprune.kernels.masked_linear import masked_linear
from fxprune.select.mask import PackedMask

from .pickled import graph_data, graph_from
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

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainableModule:
        return _alike(super().__deepcopy__(memo), self)

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(vars(self))
        graph = state.pop("_graph")
        # What torch.compile made does not pickle; the loaded module is compiled by whoever wants it so.
        state.pop("_compiled_call_impl", None)
        return _rebuild, (state, graph_data(graph), graph._codegen)


def _rebuild(state: dict[str, Any], nodes: list[tuple[Any, ...]], codegen: Any) -> TrainableModule:
    root = nn.Module()
    root.__dict__ = state
    return _alike(_module(root, graph_from(nodes), codegen), root)


def _module(root: nn.Module, graph: Graph, codegen: Any) -> TrainableModule:
    graph._codegen = codegen
    result = TrainableModule(root, graph, class_name="TrainableModule")
    result.graph._tracer_cls = None
    result._tracer_cls = None
    result.meta = vars(root)["meta"]
    return result


def _alike(result: TrainableModule, source: nn.Module) -> TrainableModule:
    """Gives a copy what torch's GraphModule forgets of its source: modes, order, and which buffers are not saved."""
    for path, module in result.named_modules():
        original = source.get_submodule(path)
        module.training = original.training
        module._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
    _order(result, _names(source))
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
    state_dict holds, the buffers that count batches, and the storages (data pointers) that a result must not share.
    """

    names: tuple[str, ...]
    trains: frozenset[str]
    saved: frozenset[str]
    counters: Mapping[str, Tensor]
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
    return Origin(tuple(names), frozenset(trains), frozenset(saved), counters, frozenset(storages - {0}))


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
    buffer `<name>_mask` where it is read, so that what is zero stays zero; it is zero in the parameter too. With
    `masked_matmul` the weights of linear layers are not multiplied: `masked_linear` has the mask as bits.
    """
    draft = copy_program(program)
    own = _own_tensors(draft, origin)
    masked = _mask(draft, masks or {}, masked_matmul)
    _switch(draft, modes, {n: own.get(id(t), t) for n, t in origin.counters.items()})
    for node in list(draft.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            # Export asserts the dtypes that it saw; under autocast they are others, and right.
            draft.graph.erase_node(node)
            continue
        node.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    draft.meta = {"entry": entry}
    result = _module(draft, draft.graph, draft.graph._codegen)
    for path, module in result.named_modules():
        prefix = f"{path}." if path else ""
        module._non_persistent_buffers_set = {n for n in module._buffers if prefix + n not in origin.saved | masked}
    _order(result, origin.names)
    return result.eval()


def _own_tensors(draft: Program, origin: Origin) -> dict[int, Tensor]:
    """Puts ordinary parameters and buffers in place of the program's; tied ones stay tied. Returns old id -> new."""
    trains = {id(p) for n, p in draft.named_parameters(remove_duplicate=False) if n in origin.trains}

    def own(old: Tensor) -> Tensor:
        value = old.detach()
        shared = value.untyped_storage().data_ptr() in origin.storages
        partial = value.untyped_storage().nbytes() > value.numel() * value.element_size()
        value = value.clone() if shared or partial else value
        return nn.Parameter(value, id(old) in trains) if isinstance(old, nn.Parameter) else value

    return replace_tensors(draft, own)


def _mask(draft: Program, masks: Mapping[str, PackedMask], masked_matmul: bool) -> set[str]:
    """Multiplies weights by their masks where they are read; returns the names of the mask buffers."""
    canonical = names_of_parameters(draft)
    readers: dict[str, list[Node]] = {}
    for node in draft.graph.nodes:
        if node.op == "get_attr" and node.users and str(node.target) in canonical:
            readers.setdefault(canonical[str(node.target)], []).append(node)
    names: set[str] = set()
    for name, mask in masks.items():
        first = canonical.get(name)
        if first is None or tuple(draft.get_parameter(first).shape) != tuple(mask.shape):
            shape = "no parameter" if first is None else list(draft.get_parameter(first).shape)
            raise InputError(f'cannot mask "{name}"', why=f"the mask is {list(mask.shape)}, the program has {shape}")
        module, leaf = owner(draft, first)
        parameter = draft.get_parameter(first)
        keep = mask.unpack().to(parameter.device)
        parameter.data = parameter.detach().masked_fill(~keep, 0)
        buffer = f"{leaf}_mask"
        while hasattr(module, buffer):
            buffer += "_"
        reads = readers.get(first, [])
        in_matmul = masked_matmul and all(map(_only_linears, reads))
        module.register_buffer(buffer, mask.bits.to(parameter.device) if in_matmul else keep)
        for read in reads:
            (_mask_in_linears if in_matmul else _multiply)(draft.graph, read, first.removesuffix(leaf) + buffer)
        names.add(first.removesuffix(leaf) + buffer)
    return names


def _only_linears(read: Node) -> bool:
    """Whether a weight is read by linear layers alone, and as their weight."""
    return all(
        user.target is aten.linear.default and user.args[1] is read and read not in (user.args[0], *user.args[2:])
        for user in read.users
    )


def _mask_in_linears(graph: Graph, read: Node, buffer: str) -> None:
    """linear(x, weight, bias) -> masked_linear(x, weight, bits, bias) wherever `read` is the weight."""
    for linear in list(read.users):
        x, weight, *bias = linear.args
        bias = bias or [linear.kwargs.get("bias")]
        with graph.inserting_before(linear):
            bits = graph.get_attr(buffer)
            product = graph.call_function(masked_linear, (x, weight, bits, *bias))
        linear.replace_all_uses_with(product)
        graph.erase_node(linear)


def _multiply(graph: Graph, read: Node, buffer: str) -> None:
    """weight -> weight * mask for all that reads it."""
    with graph.inserting_after(read):
        keep = graph.get_attr(buffer)
    with graph.inserting_after(keep):
        masked = graph.call_function(aten.mul.Tensor, (read, keep))
    read.replace_all_uses_with(masked, delete_user_cb=lambda user: user is not masked)


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

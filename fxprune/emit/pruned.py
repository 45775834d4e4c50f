"""pruned: Program -> PrunedModule, the compiled torch.fx.GraphModule that transform returns."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack
from torch.utils import _pytree as pytree

from fxprune.capture.entry import EntryCheck
from fxprune.errors import FxPruneError, warn_once
from fxprune.graph.program import Program, copy_program, replace_tensors
from fxprune.measure.ways import compiled
from fxprune.select.selection import Selection

from .compiled import Compiled, can_compile, returned
from .pickled import reduced, rooted
from .report import Report


class Result(torch.fx.GraphModule):
    """What is made of a model: the same call signature and output structure.

    Calls are checked against what the model was captured for; `forward` is the bare graph, without the check. `report`
    and `selection` live in `meta`, where they survive a deepcopy.
    """

    @property
    def report(self) -> Report:
        """What happened to every weight and group, why, how exact the result is and how fast."""
        return self.meta["report"]

    @property
    def selection(self) -> Selection:
        """What was kept, masked and replaced; `transform(model, selection=...)` replays it."""
        return self.meta["selection"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        entry: EntryCheck = self.meta["entry"]
        entry.check(args, kwargs)
        args, kwargs = entry.bound(args, kwargs)
        return super().__call__(*args, **kwargs)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Result:
        for dtype in {t.dtype for t in [*self.parameters(), *self.buffers()] if t.is_floating_point()}:
            new = fn(torch.empty(0, dtype=dtype)).dtype
            if new != dtype:
                raise FxPruneError(
                    f"cannot convert a result from {dtype} to {new}",
                    why="its graph was captured in the first, and casts and packed weights in it stay what they are",
                    do="Convert the model, and transform it again with an input like that; or call the result under "
                    "torch.autocast, if it trains.",
                )
        super()._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with warnings.catch_warnings():
            # torch deep-copies its own tree specs through a name it has deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            return super().__deepcopy__(memo)


class PrunedModule(Result):
    """A pruned, compiled model, which runs under no_grad and in the captured precision, whatever stands outside.

    Its weights are frozen into its code: `load_state_dict`, `to` and the like make the next call compile anew, and what
    writes to a tensor of it otherwise is not seen.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_traced():
            with torch.no_grad():
                return super().__call__(*args, **kwargs)
        run = vars(self).get("_run") or self._prepare()
        if self._forward_hooks or self._forward_pre_hooks or nn.modules.module._has_any_global_hook():
            run = functools.partial(_with_hooks, self, run)
        if torch._C._is_any_autocast_enabled():
            # Dense ops would follow it, and packed ones know float32 only.
            with torch.no_grad(), _without_autocast():
                return run(*args, **kwargs)
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        torch._C._set_grad_enabled(False)
        try:
            return run(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(True)

    @property
    def is_compiled(self) -> bool:
        """Whether a call runs compiled code; the first one compiles it."""
        return self.meta["compile"] is not None

    def _prepare(self) -> Callable[..., Any]:
        """What a call runs, from arguments to outputs. Nothing is compiled before it is called."""
        entry, options = self.meta["entry"], self.meta["compile"]
        program, check = copy_program(self), entry.check
        if options is not None and (options.get("triton.cudagraphs") or not can_compile(program, entry)):
            # CUDA graphs and writes to inputs are looked after by Dynamo.
            live = {key: value for key, value in options.items() if key != "freezing"}
            through_dynamo = compiled(program, freezing=bool(options.get("freezing")), options={**live, **_NO_GUARDS})

            def run(*args: Any, **kwargs: Any) -> Any:
                check(args, kwargs)
                args, kwargs = entry.bound(args, kwargs)
                return through_dynamo(*args, **kwargs)
        else:
            code, structured = Compiled(program, entry, options), _structure(program)

            def run(*args: Any, **kwargs: Any) -> Any:
                return structured(code(check(args, kwargs)))

        vars(self)["_run"] = run
        return run

    def _renew(self) -> None:
        """Forgets the code, which holds the weights as they were."""
        vars(self).pop("_run", None)

    def recompile(self) -> Any:
        """Generates `forward` anew from the graph, as a GraphModule does."""
        code = super().recompile()
        self._renew()
        # torch's wrapper around __call__ explains errors of generated code, at the price of a small layer's time.
        if "__call__" in vars(type(self)) and type(self) is not PrunedModule:
            del type(self).__call__
        return code

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Also what a module calls that holds this one.
        super()._load_from_state_dict(*args, **kwargs)
        self._renew()

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> PrunedModule:
        super()._apply(fn, recurse)
        self._renew()
        return self

    def train(self, mode: bool = True) -> PrunedModule:
        if mode:
            warn_once(
                "A pruned result was asked for train mode, perhaps by a model that holds it, and stays as it is: its "
                "masks are folded, its weights packed and its graph frozen for inference. To train, transform the "
                "model with trainable=True."
            )
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedModule:
        run = vars(self).pop("_run", None)
        try:
            return super().__deepcopy__(memo)
        finally:
            if run is not None:
                vars(self)["_run"] = run

    def __reduce__(self) -> tuple[Any, ...]:
        return reduced(_rebuild, self)


_NO_GUARDS = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}


def _is_traced() -> bool:
    """Whether somebody looks at the ops of a call, or makes other ops of them, instead of wanting it done."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
    )


def _with_hooks(module: PrunedModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call with the hooks before and after it, the module's and those of all modules, as nn.Module calls them."""
    of_all = nn.modules.module
    before = {**of_all._global_forward_pre_hooks, **module._forward_pre_hooks}
    for key, hook in before.items():
        if key in module._forward_pre_hooks_with_kwargs:
            changed: Any = hook(module, args, kwargs)
            args, kwargs = changed if changed is not None else (args, kwargs)
        else:
            changed = hook(module, args)
            args = args if changed is None else changed if isinstance(changed, tuple) else (changed,)
    result = run(*args, **kwargs)
    for key, hook in {**of_all._global_forward_hooks, **module._forward_hooks}.items():
        with_kwargs = key in module._forward_hooks_with_kwargs or key in of_all._global_forward_hooks_with_kwargs
        changed = hook(module, args, kwargs, result) if with_kwargs else hook(module, args, result)
        result = result if changed is None else changed
    return result


def _structure(program: Program) -> Callable[[Sequence[Any]], Any]:
    """Outputs in the model's structure from those that the graph computes, flat; constants among them are put in."""
    leaves = returned(program)
    info = getattr(program.graph._codegen, "pytree_info", None)
    spec = info.out_spec if info is not None else pytree.tree_structure(program.graph.output_node().args[0])
    varies = _follow_from(program)
    if all(leaf in varies for leaf in leaves):
        if len(leaves) == 1 and spec == pytree.tree_structure(0):
            return lambda flat: flat[0]
        return lambda flat: pytree.tree_unflatten(flat, spec)

    def put_in(flat: Sequence[Any]) -> Any:
        computed = iter(flat)
        values = [next(computed) if isinstance(leaf, torch.fx.Node) else leaf for leaf in leaves]
        # What hangs on no input is frozen, one tensor for all calls, and its reader may write to it.
        own = [
            value if leaf in varies or not isinstance(value, torch.Tensor) else value.clone()
            for leaf, value in zip(leaves, values, strict=True)
        ]
        return pytree.tree_unflatten(own, spec)

    return put_in


def _follow_from(program: Program) -> set[Any]:
    """The nodes that hang on an input."""
    found: set[Any] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _without_autocast() -> contextlib.AbstractContextManager[object]:
    """Switches torch.autocast off on every device that a result runs on."""
    stack = contextlib.ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def _rebuild(state: dict[str, Any], nodes: list[tuple[Any, ...]], codegen: Any) -> PrunedModule:
    return pruned_over(*rooted(state, nodes, codegen))


def pruned_over(root: nn.Module, graph: torch.fx.Graph) -> PrunedModule:
    """A PrunedModule of a graph and the module that holds its tensors and `meta`."""
    result = PrunedModule(root, graph, class_name="PrunedModule")
    result.graph._tracer_cls = None
    result._tracer_cls = None
    result.meta = vars(root)["meta"]
    return result.eval()


def emit(program: Program, entry: EntryCheck, compile_options: Mapping[str, Any] | None) -> PrunedModule:
    """A PrunedModule over the program's tensors, which the first call compiles with Inductor's `compile_options`.

    None leaves it eager.
    """
    for node in program.graph.nodes:
        # Fake values hold the capture's shape environment, which neither pickles nor is of use after emission.
        node.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    result = PrunedModule(program, program.graph, class_name="PrunedModule")
    result.graph._tracer_cls = None
    result._tracer_cls = None
    result.eval()
    # Parameters with gradients may be the user's own: over the same storage others without take their place.
    replace_tensors(
        result, lambda t: nn.Parameter(t.detach(), False) if isinstance(t, nn.Parameter) and t.requires_grad else t
    )
    result.meta = {"entry": entry, "compile": dict(compile_options) if compile_options is not None else None}
    return result


def own_storage(program: Program, theirs: set[int]) -> None:
    """Clones the parameters and buffers whose storage is among `theirs` (data pointers), once per tied tensor."""

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in theirs:
            return tensor
        clone = tensor.detach().clone()
        return nn.Parameter(clone, requires_grad=False) if isinstance(tensor, nn.Parameter) else clone

    replace_tensors(program, own)

"""users_model: the user's model as the checks run it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.capture import admit
from fxprune.capture.state import State
from fxprune.errors import InputError
from fxprune.graph.note import Note

from .calls import Call
from .compare import outputs
from .oracle import widened


class UsersModel:
    """The user's model, which every call finds in the state that it was handed in: what one call leaves, none sees.

    `notes` are for the report.
    """

    def __init__(self, model: nn.Module, state: State) -> None:
        self._model, self._state = model, state
        self._answers: dict[str, list[Any]] = {}
        self.notes: list[Note] = []

    def answer(self, call: Call) -> list[Any]:
        """Flat outputs of a call. Raises InputError where the model fails."""
        if call.label not in self._answers:
            self._state.restore()
            self._answers[call.label] = self.answer_next(call)
        return self._answers[call.label]

    def answer_next(self, call: Call) -> list[Any]:
        """Flat outputs of a call that finds what the call before it left."""
        return outputs(lambda *args, **kwargs: admit.run_model(self._model, args, kwargs), call)

    def takes(self, call: Call) -> bool:
        """Whether the model runs on a call."""
        try:
            self.answer(call)
        except InputError:
            return False
        return True

    def answer_slowly(self, call: Call) -> list[Any]:
        """Flat outputs of a call without the fast path of nn.TransformerEncoder and nn.MultiheadAttention."""
        self._state.restore()
        with _no_fast_path():
            return self.answer_next(call)

    def note_slow(self) -> None:
        """Tells that a capture is the model without that fast path."""
        told = "nn.TransformerEncoder's fast path gives zeros where a mask hides a position; the result gives what the "
        told += "model gives without it, as where gradients are on"
        if told not in self.notes:
            self.notes.append(Note(told))

    def answer_in_float64(self, call: Call) -> list[Any]:
        """Flat outputs of a call in float64, from copies of the weights: whatever the model raises there is raised."""
        self._state.restore()
        held = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        wide = {name: widened(tensor.detach(), torch.float64) for name, tensor in held.items()}
        args, kwargs = pytree.tree_map(
            lambda leaf: widened(leaf, torch.float64) if isinstance(leaf, Tensor) else leaf, call.copy()
        )
        return outputs(lambda: torch.func.functional_call(self._model, wide, args, kwargs), Call(call.label, (), {}))

    def keeps_something(self, example: Call, second: Call) -> bool:
        """Whether the model answers the second input after the example otherwise than by itself."""
        alone = self.answer(second)
        if not self._state.restore():
            return False
        self.answer_next(example)
        after = self.answer_next(second)
        same = [a.equal(b) if isinstance(a, Tensor) else a == b for a, b in zip(alone, after)]
        return len(alone) != len(after) or not all(same)


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)

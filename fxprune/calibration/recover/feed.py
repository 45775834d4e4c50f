"""feed: batches for training, as many as are asked for, and the first few of the data, which are held out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from fxprune.calibration.batches import read_call, refuse_no_series, samples_of, tensors_of
from fxprune.check.calls import Call
from fxprune.errors import InputError

# A share of the data measures how training goes; measuring must stay short beside training.
_HELD_OUT = 0.05
_MOST_HELD_OUT = 8
# So many where the data do not say how many they are.
_UNKNOWN_HELD_OUT = 4
# How many batches are looked at before the first step, for their sizes; of a list or tuple all.
_LOOK_IN_LIST, _LOOK_IN_STREAM = 64, 4
# What a stream gave is kept for the next round as far as it has no more bytes than this.
_KEPT_BYTES = 1 << 30


class Feed:
    """Calls of the model without end, each by `next()`.

    `held_out` are the first batches, never to be trained on; `head` those and some more, to see what sizes there are.
    A list is gone through again and again, shuffled by `seed` each time. What else can be iterated is gone through
    once, and then what it gave (the last GiB of it), shuffled.

    Raises InputError naming the batch for data that are no series of batches, and for fewer than two.
    """

    def __init__(self, data: Any, seed: int) -> None:
        refuse_no_series(data, "batches")
        self._random = torch.Generator().manual_seed(seed)
        calls = _List(data, self._random) if isinstance(data, Sequence) else _Stream(data, seed, self._random)
        self._calls: _List | _Stream = calls
        self.held_out, self.head = calls.held_out, calls.head

    def next(self) -> Call:
        """The next call to train on."""
        return self._calls.next()

    def skip(self, count: int) -> None:
        """Leaves out calls that an earlier run was trained on."""
        for _ in range(count):
            self._calls.skip()


class _List:
    def __init__(self, data: Sequence[Any], random: torch.Generator) -> None:
        _enough(len(data))
        held_out = _held_out(len(data))
        self._data = data
        self._order = _shuffled(range(held_out, len(data)), random)
        looked_at = len(data) if isinstance(data, (list, tuple)) else min(len(data), held_out + _LOOK_IN_LIST)
        self.head = [_read(data[i], i) for i in range(looked_at)]
        self.held_out = self.head[:held_out]

    def next(self) -> Call:
        index = next(self._order)
        return _read(self._data[index], index)

    def skip(self) -> None:
        next(self._order)


class _Stream:
    def __init__(self, data: Iterable[Any], seed: int, random: torch.Generator) -> None:
        count = _length(data)
        wanted = (_UNKNOWN_HELD_OUT if count is None else _held_out(count)) + _LOOK_IN_STREAM
        # A loader that shuffles draws its order as it begins.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._items = enumerate(data)
            first = next(self._items, None)
        self.head = [] if first is None else [_read(first[1], first[0])]
        self.head += [_read(item, i) for i, item in islice(self._items, wanted - 1)]
        _enough(len(self.head))
        held_out = wanted - _LOOK_IN_STREAM if len(self.head) == wanted else _held_out(len(self.head))
        self.held_out, self._waiting = self.head[:held_out], deque(self.head[held_out:])
        self._kept: deque[Call] = deque()
        self._bytes = 0
        self._random, self._order = random, None

    def next(self) -> Call:
        if self._order is not None:
            return self._kept[next(self._order)]
        call = self._waiting.popleft() if self._waiting else None
        if call is None:
            found = next(self._items, None)
            if found is None:
                self._order = _shuffled(range(len(self._kept)), self._random)
                return self.next()
            call = _read(found[1], found[0])
        self._keep(call)
        return call

    def skip(self) -> None:
        self.next()

    def _keep(self, call: Call) -> None:
        self._kept.append(call)
        self._bytes += _bytes(call)
        while self._bytes > _KEPT_BYTES and len(self._kept) > 1:
            self._bytes -= _bytes(self._kept.popleft())


def _held_out(count: int) -> int:
    return min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * count)))


def _enough(count: int) -> None:
    if count < 2:
        raise InputError(
            "cannot train without data" if count == 0 else "cannot train on one batch",
            where="batches=",
            why="it has no batches" if count == 0 else "the first one is held out to measure how training goes",
            do="Give two batches at least, better hundreds.",
        )


def _read(item: Any, index: int) -> Call:
    call = read_call(item, f"batches[{index}]")
    if samples_of(call) == 0:
        do = "Leave it out."
        raise InputError("cannot train on an empty batch", where=call.label, why="its tensors have size 0", do=do)
    return call


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        # A loader over a stream has the method and no answer.
        return None


def _shuffled(indices: range, random: torch.Generator) -> Iterator[int]:
    while True:
        for place in torch.randperm(len(indices), generator=random).tolist():
            yield indices[place]


def _bytes(call: Call) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(call))

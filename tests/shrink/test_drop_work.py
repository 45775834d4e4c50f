"""The work of dropping blocks: what belongs to the program is done once, and the rest is linear in the graph."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.graph import memory
from fxprune.graph.program import Program
from fxprune.shrink.drop import blocks, branch, drop, facts
from fxprune.shrink.drop.blocks import find_blocks
from fxprune.shrink.drop.drop import drop_blocks
from tests.shrink.drop_models import Apply, D, program_of


class Chain(nn.Module):
    """Many blocks in a row between two linears."""

    def __init__(self, depth: int, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(D, D), nn.Linear(D, D)
        self.blocks = nn.ModuleList(Apply(function) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for block in self.blocks:
            x = block(x)
        return self.after(x)


CHAINS: dict[str, Callable[..., Tensor]] = {
    "sums": lambda linear, x: x + linear(x).relu(),
    "sums in place": lambda linear, x: x.add_(linear(x).relu()),
    "branches": lambda linear, x: x + 2 * linear(x),
    "branches in place": lambda linear, x: x.add_(linear(x).mul_(2)),
}


def chain_of(depth: int, name: str) -> tuple[Program, list[str]]:
    """A chain's program and every second block of it, or the branch in that."""
    program = program_of(Chain(depth, CHAINS[name]), torch.randn(2, D))
    inner = ".linear" if name.startswith("branches") else ""
    return program, [f"blocks.{index}{inner}" for index in range(0, depth, 2)]


def lines_run(act: Callable[[], Any]) -> int:
    """How many lines of the modules that drop blocks, loops over one line included, `act` runs."""
    count, files = 0, {module.__file__ for module in (blocks, branch, drop, facts, memory)}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("name", ["sums", "branches"])
def test_what_belongs_to_the_program_is_found_once_for_all_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, paths = chain_of(8, name)
    calls: Counter[str] = Counter()
    once = [(facts, each) for each in ("varying_tensors", "names_of_parameters", "calls_by_module")]
    for module, each in [*once, *((memory, each) for each in ("aliased", "written", "checks_inputs"))]:
        original = getattr(module, each)

        def counted(*args: Any, name: str = each, original: Callable[..., Any] = original) -> Any:
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(module, each, counted)
    assert len(find_blocks(program, paths)) == 4
    assert calls["varying_tensors"] == calls["names_of_parameters"] == calls["calls_by_module"] == 1
    nodes = len(program.graph.nodes)
    assert calls["aliased"] == calls["written"] == nodes and calls["checks_inputs"] <= nodes


@pytest.mark.parametrize("name", CHAINS)
def test_the_work_is_linear_in_the_size_of_the_graph(name: str) -> None:
    small, large = (chain_of(depth, name) for depth in (12, 48))

    def work(program: Program, paths: list[str]) -> tuple[int, int]:
        blocks = find_blocks(program, paths)
        return lines_run(lambda: find_blocks(program, paths)), lines_run(lambda: drop_blocks(program, blocks))

    for few, many in zip(work(*small), work(*large), strict=True):
        assert many < 4.5 * few

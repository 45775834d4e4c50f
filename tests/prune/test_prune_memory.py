"""Memory of global_unstructured, as a process that does nothing else sees it."""

from __future__ import annotations

import json
import sys

import pytest

from tests.own_process import printed

SCRIPT = """
import gc, json, sys
import torch
from torch import nn
import fxprune.prune as prune

torch.set_num_threads(1)


def status(field):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


def reset(layers):
    gc.collect()
    # A system that takes pages which lie idle would have them counted as new once they are read again.
    for module in layers:
        for tensor in (*module.parameters(), *module.buffers(), module.weight):
            tensor.detach().sum()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def layer(width):
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(width, 1000))
    return module


warm = layer(10)
prune.global_unstructured([(warm, "weight")], prune.L1Unstructured, amount=0.5)
sizes = json.loads(sys.argv[1])
layers = [layer(width) for width in sizes]
size = 4000 * sum(sizes)
extra = []
for round_ in range(3):
    reset(layers)
    before = status("VmRSS")
    prune.global_unstructured([(each, "weight") for each in layers], prune.L1Unstructured, amount=0.5)
    state = 2 * size if round_ == 0 else 0
    extra.append((status("VmHWM") - before - state) / size)
print(json.dumps(extra))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("sizes", [[4000] * 10, [40000]], ids=["ten weights", "one weight"])
def test_the_peak_beyond_the_state_is_a_quarter_of_the_weights(sizes: list[int]) -> None:
    """The state is the float mask and the pruned copy, twice the weights; later rounds replace it."""
    # Of each of three rounds, as a share of the weights.
    peaks = json.loads(printed(SCRIPT, json.dumps(sizes)))
    assert max(peaks) < 0.25, peaks

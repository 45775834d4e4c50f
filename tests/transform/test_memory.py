"""Memory, as a process that does nothing else sees it: the peak of transform, and what its result keeps."""

from __future__ import annotations

import json
import sys

import pytest

from tests.own_process import printed

SCRIPT = """
import gc, json, sys
import torch
from torch import nn
import fxprune
from fxprune import Plan, Rule, Unstructured

options = json.loads(sys.argv[1])
plan = Plan([Rule("*", Unstructured(0.8))])


def perceptron(width, depth):
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), nn.GELU())]).eval()


def status(field):
    # getrusage's peak would begin at that of the process that started this one.
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


x = torch.randn(8, 256)
fxprune.transform(perceptron(256, 2), plan, (x,), options={"layout": "nonzeros", **options}, progress=False)(x)
torch._dynamo.reset()
gc.collect()
model = perceptron(2048, 12)
x = torch.randn(64, 2048)
weights = sum(4 * p.numel() for p in model.parameters())
before = status("VmRSS")
result = fxprune.transform(model, plan, (x,), options=options, progress=False)
after = status("VmRSS")
print(json.dumps({
    "weights": weights,
    "peak": status("VmHWM") - before,
    "kept": after - before,
    "stored": sum(t.numel() * t.element_size() for t in result.state_dict().values()),
    "nonzeros": sum(mask.kept() for mask in result.selection.mask.values()),
    "packed": sum(w.layout == "nonzeros" for w in result.report.weights),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "options",
    [{"layout": "nonzeros", "compile": False}, {"layout": "nonzeros"}, {}],
    ids=["eager", "compiled", "measured"],
)
def test_the_peak_stays_below_twice_the_weights(options: dict[str, object]) -> None:
    seen = json.loads(printed(SCRIPT, json.dumps(options)))
    assert seen["weights"] > 200e6
    assert seen["peak"] < 2 * seen["weights"]
    if options:
        # Values of 4 bytes and columns of 2, and a little for where they begin; the dense copy is gone.
        assert seen["packed"] == 12
        assert 6 * seen["nonzeros"] <= seen["stored"] < 6.5 * seen["nonzeros"]
        assert seen["kept"] < 0.6 * seen["weights"]

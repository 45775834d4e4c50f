"""How long the analysis of a graph takes: a Llama-shaped decoder of 1 to 8 billion parameters on the meta device.

    python -m benchmarks.analysis

Needs transformers. Prints nodes, seconds to capture and to analyse, and microseconds a node; writes them to
benchmarks/results/analysis-<machine>.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.machine import describe_machine, slug
from fxprune.capture.capture import capture
from fxprune.couple.couple import couple

# layers, width, FFN width
SHAPES = ((4, 2048, 8192), (8, 2048, 8192), (16, 2048, 8192), (32, 4096, 14336))
# Seconds allowed: the analysis of 1,000 nodes, and capture and analysis of 1e9 parameters.
PER_1000_NODES, PER_1E9 = 2.0, 30.0
RESULTS = Path(__file__).resolve().parent / "results"


def measure(layers: int, width: int, ffn: int) -> dict[str, Any]:
    """One decoder: captured once, analysed three times, the fastest of which counts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    start = time.perf_counter()
    captured = capture(model, (torch.zeros(1, 64, dtype=torch.long, device="meta"),), {})
    captured_in = time.perf_counter() - start
    coupling = couple(captured.program)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        couple(captured.program)
        seconds.append(time.perf_counter() - start)
    return {
        "layers": layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "nodes": len(captured.program.graph.nodes),
        "groups": len(coupling),
        "free": sum(group.free for group in coupling),
        "capture_s": captured_in,
        "analysis_s": min(seconds),
    }


def main() -> None:
    """Measure every shape, print the table and write the figures."""
    rows = [measure(*shape) for shape in SHAPES]
    table = [
        (
            r["layers"],
            f"{r['parameters'] / 1e9:.2f}",
            r["nodes"],
            r["groups"],
            r["free"],
            f"{r['capture_s']:.1f}",
            f"{r['analysis_s']:.2f}",
            f"{1e6 * r['analysis_s'] / r['nodes']:.0f}",
        )
        for r in rows
    ]
    headers = ("layers", "1e9 parameters", "nodes", "groups", "free", "capture s", "analysis s", "us a node")
    print(tabulate(table, headers=headers, disable_numparse=True))
    for row in rows:
        both = row["capture_s"] + row["analysis_s"]
        met = row["analysis_s"] <= PER_1000_NODES * max(1.0, row["nodes"] / 1000)
        met = met and both <= PER_1E9 * max(1.0, row["parameters"] / 1e9)
        print(f"{'met' if met else 'MISSED'}: {row['nodes']} nodes analysed in {row['analysis_s']:.2f} s")
    machine = describe_machine()
    path = RESULTS / f"analysis-{slug(machine['cpu'])}.json"
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()

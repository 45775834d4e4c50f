"""DeepSparse with one model, taking turns as benchmarks.cpu_child does; for an environment of its own, without torch.

    python cpu_deepsparse.py THREADS FOLDER

Reads deepsparse.onnx and input-00.npy, input-01.npy, ... from FOLDER.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

SECONDS = 0.25
FEWEST = 3


def main() -> int:
    """Serve DeepSparse."""
    threads, folder = int(sys.argv[1]), Path(sys.argv[2])
    try:
        from deepsparse import Engine  # pyright: ignore[reportMissingImports]

        inputs = [np.load(file) for file in sorted(folder.glob("input-*.npy"))]
        engine = Engine(str(folder / "deepsparse.onnx"), batch_size=len(inputs[0]), num_cores=threads)
        np.save(folder / "DeepSparse.npy", np.asarray(engine.run(inputs)[0], dtype=np.float32))
    except Exception as error:
        print(json.dumps({"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}), flush=True)
        return 1
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        seconds: list[float] = []
        start = time.perf_counter()
        while len(seconds) < FEWEST or time.perf_counter() - start < SECONDS:
            before = time.perf_counter()
            engine.run(inputs)
            seconds.append(time.perf_counter() - before)
        print(json.dumps(seconds[1:]), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

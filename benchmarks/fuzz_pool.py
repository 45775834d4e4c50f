"""Cases run in processes of their own: one that crashes or hangs is a row like any other.

    python -m benchmarks.fuzz_pool

is such a process: it reads seeds, one a line, and answers each with a line of JSON, after lines that say what it is at.
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CASES_A_WORKER = 200  # Memory of compiled code and registered ops only ever grows.
START_SECONDS = 120.0
COMMAND = [sys.executable, "-W", "ignore", "-m", "benchmarks.fuzz_pool"]
OWN = "the model itself"  # What a process is at while no code of fxprune runs.

Row = dict[str, Any]


class Worker:
    """A process that runs cases, started by `command` when it is needed and anew when it is gone or old."""

    def __init__(self, command: Sequence[str] | None = None, most: int = CASES_A_WORKER) -> None:
        self._command, self._most = command or COMMAND, most
        self._process: subprocess.Popen[bytes] | None = None
        self._count = 0
        self._read = b""

    def run(self, seed: int, seconds: float) -> Row:
        """The row of one seed. "died" and "time limit" are outcomes; what torch does alone is no case of ours."""
        if self._process is None or self._count >= self._most:
            self._start()
        process, at = self._process, "start"
        assert process is not None and process.stdin is not None
        self._count += 1
        process.stdin.write(f"{seed}\n".encode())
        process.stdin.flush()
        end = time.monotonic() + seconds
        while True:
            line = self._line(end)
            if line is None:
                alive = process.poll() is None
                self.stop()
                outcome = "time limit" if alive else "died"
                if at == OWN:
                    outcome = "not a case"
                return {
                    "seed": seed,
                    "outcome": outcome,
                    "why": f"at {at}: {'still running' if alive else process.returncode}",
                }
            told = json.loads(line)
            if "at" not in told:
                return told["row"]
            at = told["at"]

    def _start(self) -> None:
        self.stop()
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        environment["PYTHONHASHSEED"] = "0"
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._count, self._read = 0, b""
        if self._line(time.monotonic() + START_SECONDS) is None:
            self.stop()
            raise RuntimeError(f"a worker does not start: {' '.join(self._command)}")

    def _line(self, end: float) -> bytes | None:
        """The next line that the process writes; None once it is gone or the time is up."""
        assert self._process is not None and self._process.stdout is not None
        out = self._process.stdout.fileno()
        while b"\n" not in self._read:
            left = end - time.monotonic()
            if left <= 0 or not select.select([out], [], [], left)[0]:
                return None
            found = os.read(out, 1 << 16)
            if not found:
                self._process.wait()
                return None
            self._read += found
        line, _, self._read = self._read.partition(b"\n")
        return line

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def run_seeds(
    seeds: Sequence[int],
    jobs: int,
    seconds: float,
    command: Sequence[str] | None = None,
    most: int = CASES_A_WORKER,
) -> Iterator[Row]:
    """The rows of all seeds as they come."""
    waiting: queue.Queue[int] = queue.Queue()
    for seed in seeds:
        waiting.put(seed)
    rows: queue.Queue[Row | BaseException] = queue.Queue()
    stopped = threading.Event()

    def work() -> None:
        worker = Worker(command, most)
        try:
            while not stopped.is_set():
                rows.put(worker.run(waiting.get_nowait(), seconds))
        except queue.Empty:
            pass
        except BaseException as error:
            rows.put(error)
        finally:
            worker.stop()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    try:
        for _ in seeds:
            row = rows.get()
            if isinstance(row, BaseException):
                raise row
            yield row
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def main() -> int:
    """Answers seeds until there are no more."""
    # Whatever a library prints goes elsewhere: the answers have a pipe of their own.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    from benchmarks.fuzz_case import draw_case
    from benchmarks.fuzz_judge import run_case

    def say(**told: Any) -> None:
        out.write(json.dumps(told) + "\n")

    torch.set_num_threads(1)
    say(at="start")
    for line in sys.stdin:
        seed = int(line)
        say(at="drawing")
        try:
            row = run_case(draw_case(seed), lambda at: say(at=at))
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            row = {"seed": seed, "outcome": "fuzzer", "why": said, "traceback": traceback.format_exc()[-5000:]}
        say(row=row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

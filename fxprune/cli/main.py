"""The `fxprune` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fxprune.errors import FxPruneError

from .demo import run_demo
from .demo_data import BODY_TOKENS, MissingPackageError

MOST_TOKENS = 512


def thread_count(text: str) -> int:
    """Parse a positive number of threads."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is not a positive number of threads")
    return count


def token_count(text: str) -> int:
    """Parse a sequence length that holds the documents and that the model has positions for."""
    count = int(text)
    if not BODY_TOKENS <= count <= MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"{count} is not between {BODY_TOKENS} and {MOST_TOKENS} tokens")
    return count


def parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    top = argparse.ArgumentParser(prog="fxprune", description="A pruning compiler for PyTorch.")
    commands = top.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="prune a real sentence encoder, check it, time it, print a table")
    demo.add_argument("--threads", type=thread_count, default=None, help="CPU threads (default: PyTorch's)")
    demo.add_argument("--seq", type=token_count, default=128, help="tokens per input (default: 128)")
    demo.add_argument("--quick", action="store_true", help="fewer sparsities and documents")
    demo.add_argument("--no-progress", action="store_true", help="no progress bar")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 for an error of fxprune's, 2 for a missing package."""
    given = parser().parse_args(argv)
    try:
        run_demo(threads=given.threads, quick=given.quick, progress=not given.no_progress, seq=given.seq)
    except MissingPackageError as error:
        print(f"fxprune: {error}", file=sys.stderr)
        return 2
    except FxPruneError as error:
        print(f"fxprune: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

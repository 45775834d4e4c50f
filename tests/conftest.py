"""What every test shares: a seed, one thread, checked stages, memory that holds NaN, and whether there is a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Without a GPU Triton's interpreter runs the kernels; it must be told before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# torch reads this as it is imported: pools of compiling processes beside several workers cost more than they gain.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Neither how long an example takes nor how long it is to draw one says anything on a busy machine.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def settings() -> Iterator[None]:
    """One thread for each worker and for what it starts, and stages that are checked and hide no error.

    For the session, so that fixtures of modules have it too.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MKL_NUM_THREADS", "1")
        if "FXPRUNE_CHECK" not in os.environ:
            patch.setenv("FXPRUNE_CHECK", "1")
        # What other processes measured, and the user's own memory of it, are none of a test's business.
        patch.setenv("FXPRUNE_REMEMBER", "0")
        # Six compilations of each model, which tests that are about them ask for.
        patch.setenv("FXPRUNE_MEASURE", "0")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def same_start(settings: None) -> None:
    """Whatever ran before, a test begins with the same seed and on one thread."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Memory that is allocated and not written holds NaN, or the largest integer.

    torch fills it below every way to allocate, those of C++ included, and only in deterministic mode, which on a GPU
    picks other kernels: there the tests of kernels poison torch.empty themselves.
    """
    if request.node.get_closest_marker("cuda"):
        yield
        return
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _of_the_process() -> dict[str, object]:
    """Switches of torch that all tests of a process share."""
    return {
        "is_compiling": torch.compiler.is_compiling(),
        "is_exporting": torch.compiler.is_exporting(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "flush denormal": float(torch.tensor([1e-40]) * 1) == 0,
    }


@pytest.fixture(autouse=True)
def same_end(settings: None) -> Iterator[None]:
    """A test leaves the switches of the process as it found them."""
    before = _of_the_process()
    yield
    assert _of_the_process() == before

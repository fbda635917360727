"""Fixtures shared by the whole suite."""

import contextlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

# what several folders share
sys.path.insert(0, str(Path(__file__).parent))
# verdicts on the kernels under test do not mix with those of the user's own work
os.environ.setdefault("PURIFY_FAST_CACHE", str(Path(__file__).resolve().parents[1] / "build" / "verdicts"))

from purify_fast import _library
from purify_fast.ops import use_backend
from purify_fast.ops.dispatch import races, registry, verify


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Triton's interpreter needs a process of its own: its tests run only where they are named."""
    named = any("interpreter" in argument for argument in config.args)
    return True if collection_path.name == "interpreter" and not named else None


@pytest.fixture
def kernel_cache(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty folder of verdicts and races, and a process that knows of none."""
    monkeypatch.setenv("PURIFY_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PURIFY_FAST_VERIFY", raising=False)
    monkeypatch.setattr(verify, "_known", {})
    monkeypatch.setattr(verify, "_postponed", {})
    verify._warn_unwritable.cache_clear()
    races.forget()
    registry.forget()
    yield tmp_path / "cache"
    races.forget()
    registry.forget()


@pytest.fixture(params=["reference", "cpp"])
def backend(request) -> Iterator[str]:
    """Each CPU backend in turn, forced for the test."""
    if request.param == "cpp" and not _library.loaded():
        if os.environ.get("PURIFY_FAST_NO_EXTENSION") == "1":
            pytest.skip("the compiled extension is switched off by PURIFY_FAST_NO_EXTENSION=1")
        pytest.fail(f"no compiled extension to test: {_library.load_error}", pytrace=False)
    with use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def core():
    """csrc/core as a Python module, built by CMake (`make test-cpp`)."""
    build = Path(__file__).resolve().parents[1] / "build/cmake"
    built = list(build.glob("purify_fast_core*" + sysconfig.get_config_var("EXT_SUFFIX")))
    if not built and not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("Python.h is missing (for example `apt install python3-dev`)")
    if not built:
        pytest.fail(f"no purify_fast_core in {build}: build it with `make test-cpp`", pytrace=False)
    spec = importlib.util.spec_from_file_location("purify_fast_core", built[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny models: a second thread only spins, many times slower when the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory holds NaN (integers: the largest), so that an element a kernel forgets is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def _within_budget(actual: Tensor, golden: Tensor, same: Tensor) -> None:
    """``actual`` errs against the float64 ``golden`` by at most twice what the same-dtype reference does + 2 eps."""
    assert actual.dtype == same.dtype and actual.shape == same.shape == golden.shape
    assert golden.dtype == torch.float64
    if actual.dtype == torch.float64:  # the golden value has rounding errors of its own
        torch.testing.assert_close(actual, golden, rtol=1e-10, atol=1e-12, equal_nan=True)
        return
    assert torch.equal(actual.isnan(), same.isnan()), "NaN elsewhere than in the reference"
    assert torch.equal(actual.isinf() * actual.sign(), same.isinf() * same.sign()), "infinities differ"
    ok = same.isfinite() & golden.isfinite()
    if not ok.any():
        return
    eps = torch.finfo(actual.dtype).eps
    actual, same, golden = actual[ok].double(), same[ok].double(), golden[ok]
    error, reference = (actual - golden).abs().max().item(), (same - golden).abs().max().item()
    budget = 2 * reference + 2 * eps * golden.abs().max().item()
    assert error <= budget, f"error {error:.3e}, budget {budget:.3e} (the reference's error: {reference:.3e})"


@pytest.fixture
def within_budget() -> Callable[[Tensor, Tensor, Tensor], None]:
    return _within_budget


@pytest.fixture
def ulps() -> Callable[[Tensor, Tensor], int]:
    """The largest distance between two float32 tensors, in representable numbers."""

    def distance(a: Tensor, b: Tensor) -> int:
        a, b = (x.contiguous().view(torch.int32).long() for x in (a, b))
        a, b = (torch.where(x < 0, -(x & 0x7FFFFFFF), x) for x in (a, b))
        return int((a - b).abs().max()) if a.numel() else 0

    return distance


class Rerun:
    """Stands for CUDA graphs on a CPU: a replay runs the captured function again, on the buffers it was captured with.

    Attributes:
        recorded: how many functions were captured.
        replayed: how often one was replayed.
        replaying: whether one is being replayed.
        times: seconds of launching a step and of all of it, as `CudaCapture.timed` measures them.
        replay_time: seconds of a replay; None: as long as a step, so that captures tell nothing of what they are worth.
        cost: seconds that a capture takes.
        released: how often memory was given back.
        error: raised in place of a capture, if given.
    """

    kind = "cpu"

    def __init__(self) -> None:
        self.recorded, self.replayed, self.replaying = 0, 0, False
        self.times, self.cost, self.released = (1.0, 1.0), 10.0, 0
        self.replay_time: float | None = None
        self.error: Exception | None = None

    def aside(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def timed(self, run: Callable[[], None], device: torch.device) -> tuple[float, float]:
        before = self.replayed
        run()
        replays, self.replayed = self.replayed - before, before
        return (self.replay_time,) * 2 if replays and self.replay_time is not None else self.times

    def now(self, device: torch.device) -> float:
        return self.recorded * self.cost

    def release(self) -> None:
        self.released += 1

    def record(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        if self.error is not None:
            raise self.error
        self.recorded += 1
        # the first replay of each checks it
        self.replayed -= 1

        def replay() -> None:
            self.replayed += 1
            self.replaying = True
            run()
            self.replaying = False

        return replay


class Launched(Rerun):
    """Captures, and replays nothing: what is still counted then is what the host launches beside a graph."""

    def record(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        # but for the first time, which checks it
        once = iter([run])
        return lambda: next(once, lambda: None)()


@pytest.fixture
def rerun() -> Rerun:
    return Rerun()


@pytest.fixture
def launched() -> Launched:
    return Launched()

"""Fixtures shared by the whole suite."""

import multiprocessing
import os
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

# what several folders share
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent / "training"))
# verdicts on the kernels under test do not mix with those of the user's own work
os.environ.setdefault("PURIFY_FAST_CACHE", str(Path(__file__).resolve().parents[1] / "build" / "verdicts"))
# torch.compile starts processes that compile for it and import PyTorch: that costs tests more than it saves
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from captures import Rerun, Tape
from loading import module_at
from slow_shares import of_other_shares

from purify_fast import _library
from purify_fast.ops import use_backend
from purify_fast.ops.dispatch import choices, records, verify
from purify_fast.ops.dispatch.examples import Example

#: Set by `make test`, which installs all that tests need, and where a test that is not marked as slow must not be.
COMPLETE = os.environ.get("PURIFY_FAST_TEST_COMPLETE") == "1"
#: Processor seconds, with those of its child processes, that a test may take without the mark ``slow``: ten on the
#: machine of CONTRIBUTING's table; a busy or older processor takes up to three times as long.
MOST_SECONDS = 30.0
#: Reasons to skip a test, in part, that the machine causes. Nothing that can be installed is among them.
OF_THE_MACHINE = (
    *("Windows", "Linux", "no /proc", "this system does not tell", "no CUDA device", "needs a CUDA device", "a GPU"),
    *("neither streams nor CUDA graphs", "flush denormals", "no kernel", "no such kernel", "no Chromium"),
    *("Python.h is missing", "one backend only", "no such ball"),
)
#: Folders whose tests compute in several threads, as kernels do. Those of the other folders have tiny models.
IN_SEVERAL_THREADS = {"aot", "fuzz", "gpu", "interpreter", "models", "ops", "speed"}
_began = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreter: tests a kernel, and tests/interpreter runs it once more")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "of the slow tests, run only share K (from 0) of N equal shares; others are not affected"
    parser.addoption("--slow-share", metavar="K/N", help=text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (share := config.getoption("--slow-share")) is not None:
        left_out = of_other_shares(items, share)
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))


def _processor_seconds() -> float:
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    item.stash[_began] = _processor_seconds()
    _seed()
    return (yield)


def _seed() -> None:
    # The tests are shared out among processes as these become free, so no test may depend on what ran before it.
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same numbers, whether or not it was the first to make a fixture of its module."""
    _seed()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that takes long says so: `make test` counts its fixtures and its processes too."""
    yield
    spent = _processor_seconds() - item.stash[_began]
    if COMPLETE and spent > MOST_SECONDS and item.get_closest_marker("slow") is None:
        pytest.fail(f"it took {spent:.0f} s of the processor: make it shorter, or mark it as slow", pytrace=False)


def _must_run(report):
    """A test that is skipped where everything is installed has failed, unless the machine is the reason."""
    if COMPLETE and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if not any(part in reason for part in OF_THE_MACHINE):
            report.outcome, report.longrepr = "failed", f"it must run after `make`, and was skipped: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[pytest.TestReport]:
    return _must_run((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[pytest.CollectReport]:
    return _must_run((yield))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Triton's interpreter needs a process of its own: its tests run only where they are named."""
    named = any("interpreter" in argument for argument in config.args)
    return True if collection_path.name == "interpreter" and not named else None


@pytest.fixture
def kernel_cache(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty folder of verdicts and tuned sizes, and a process that knows of none."""
    monkeypatch.setenv("PURIFY_FAST_CACHE", str(tmp_path / "cache"))
    verify._warn_unwritable.cache_clear()
    records._contents.clear()
    choices.forget_choices()
    yield tmp_path / "cache"
    records._contents.clear()
    choices.forget_choices()


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
    return module_at(built[0])


@pytest.fixture
def forking(monkeypatch) -> Iterator[None]:
    """Worker processes are forks of this one where there are any: none imports PyTorch again."""
    # A fork would wait for ever for threads of OpenMP that this process started: it computes in one thread.
    before, set_threads = torch.get_num_threads(), torch.set_num_threads
    if "fork" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("fork")
        monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: context)
        set_threads(1)
        monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    yield
    set_threads(before)


@pytest.fixture
def without_autoattack(monkeypatch) -> None:
    """Neither of the packages of AutoAttack can be imported."""
    for package in ("pyautoattack", "autoattack"):
        monkeypatch.setitem(sys.modules, package, None)


@pytest.fixture
def short_signs(monkeypatch) -> None:
    """The signs of an evaluation are looked for with few steps, which shows that they are looked for and no more."""
    from purify_fast.judge.alarms import probes

    for name, few in {"STEPS": 2, "SWEEP": 2, "ITERATIONS": (1, 3), "DRAWS": (1, 2), "JUDGES": 3}.items():
        monkeypatch.setattr(probes, name, few)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny models: a second thread only spins, many times slower when the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _(request) -> None:
    folders = request.path.relative_to(Path(__file__).parent).parts[:-1]
    if folders and folders[0] not in IN_SEVERAL_THREADS:
        request.getfixturevalue("one_thread")


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
    """``actual`` errs against the float64 ``golden`` by no more than the rule allows by which kernels are verified."""
    actual, golden, same = (one.detach() for one in (actual, golden, same))
    assert actual.dtype == same.dtype and actual.shape == same.shape == golden.shape and golden.dtype == torch.float64
    if actual.dtype == torch.float64:
        # the golden value has rounding errors of its own
        torch.testing.assert_close(actual, golden, rtol=1e-10, atol=1e-12, equal_nan=True)
        return
    found = verify.deviation(actual, golden, same, Example("", lambda dtype, seed: ()), "")
    assert found.passed, found


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


# Autograd starts a thread for each device at the first backward pass, and a fork has none of them. FakeTensorMode
# pretends that there is a GPU: this pass comes before it, and starts no thread where there is none.
torch.ones((), requires_grad=True).backward()


@pytest.fixture
def compiler(monkeypatch) -> Iterator[list]:
    """The graphs that torch.compile gave to a backend which stands for Inductor, and takes no time."""
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda step, **options: compile(step, **options | {"backend": backend}))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


@pytest.fixture
def rerun() -> Rerun:
    return Rerun()


@pytest.fixture
def tape() -> Tape:
    return Tape()

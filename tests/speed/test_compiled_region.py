"""The graphs that are made of a region: one for all batch sizes on a CPU, one for each of the first two on a GPU."""

import threading

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils import _python_dispatch

from purify_fast._compiler import outside_graphs
from purify_fast.attacks import pgd
from purify_fast.models.classifiers import SmallCNN
from purify_fast.speed import InferenceCopy, StepGraphs
from purify_fast.speed.folding import inference_copy
from purify_fast.speed.folding.inference_copy import STATIC_SIZES, CompiledRegion
from purify_fast.speed.graphs.host_syncs import HostSyncs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def graphs(monkeypatch) -> list[list[object]]:
    """The batch sizes with which each graph was made."""
    made: list[list[object]] = []
    compile = torch.compile

    def backend(graph, inputs):
        made.append([x.shape[0] for x in inputs if isinstance(x, Tensor)])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend, **options))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


def test_on_a_cpu_all_sizes_from_eight_share_a_graph(graphs):
    """Four images that are computed as sixteen made AToP's step slower with the compiler than without."""
    given: list[int] = []

    def squares(x: Tensor) -> Tensor:
        given.append(len(x))
        return x * x + 1

    made = CompiledRegion(squares)
    for size in (1, 4, 7):
        x = torch.rand(size, 3)
        assert torch.equal(made(x), x * x + 1)
    assert given == [1, 4, 7] and graphs == []
    made = CompiledRegion(lambda x: x * x + 1)
    for size in (8, 20, 5, 33):
        x = torch.rand(size, 3)
        assert torch.equal(made(x), x * x + 1)
    assert len(graphs) == 1 and not made.static


def test_on_a_gpu_the_first_sizes_have_graphs_of_their_own(graphs, monkeypatch):
    monkeypatch.setattr(inference_copy, "keeps_sizes", lambda device: True)
    made = CompiledRegion(lambda x: x * x + 1)
    for size in (20, 5, 20, 5, 20):
        x = torch.rand(size, 3)
        assert torch.equal(made(x), x * x + 1)
    assert graphs == [[20], [5]] and len(made.static) == STATIC_SIZES == 2
    for size in (33, 34, 7, 20, 5):
        x = torch.rand(size, 3)
        assert torch.equal(made(x), x * x + 1)
    # further sizes share one more, in which the size is a symbol
    assert len(graphs) == 3


def test_what_is_captured_is_what_was_compiled(monkeypatch, rerun):
    """A captured step must run the compiled graphs, forward and backward, with all of their operators."""
    monkeypatch.setattr(inference_copy, "keeps_sizes", lambda device: True)
    compile, compiled, ran = torch.compile, dict[str, int](), list[tuple[str, int]]()

    def compiler(kind: str):
        def made(graph, inputs):
            nodes = compiled[kind] = sum(node.op == "call_function" for node in graph.graph.nodes)

            def run(*given):
                ran.append((kind, nodes))
                return graph(*given)

            return make_boxed_func(run)

        return made

    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend, **options))
    torch._dynamo.reset()
    record, captured = rerun.record, list[tuple[str, int]]()

    def recorded(run, device):
        ran.clear()
        # A capture runs the function once.
        run()
        captured.extend(ran)
        return record(run, device)

    monkeypatch.setattr(rerun, "record", recorded)
    torch.manual_seed(0)
    network = InferenceCopy(SmallCNN(3, 10, (8, 8), 4).eval(), (3, 8, 8), torch.bfloat16, compile=True)
    x, y = torch.rand(16, 3, 8, 8), torch.arange(16) % 10
    graphs = StepGraphs("always", capture=rerun)
    pgd(network, x, y, eps=8 / 255, alpha=2 / 255, steps=3, random_start=False, graphs=graphs)
    torch._dynamo.reset()
    assert graphs.refusal is None and rerun.recorded == 1
    assert captured == [("forward", compiled["forward"]), ("backward", compiled["backward"])]
    assert min(compiled.values()) > 5


def test_modes_that_overlap_in_threads_leave_the_compiler_on(graphs, monkeypatch):
    # After modes that overlap, PyTorch takes one for active until the process ends. Pytest then sets the flags back.
    for flag in ("_is_in_torch_dispatch_mode", "_is_in_non_infra_torch_dispatch_mode"):
        monkeypatch.setattr(_python_dispatch, flag, False)
    first, second = HostSyncs(), HostSyncs()
    begun, ended = threading.Event(), threading.Event()

    def other():
        with second:
            begun.set()
            ended.wait(10)

    thread = threading.Thread(target=other)
    with first:
        thread.start()
        begun.wait(10)
    ended.set()
    thread.join()
    function = torch.compile(lambda x: x * 2)
    function(torch.ones(3))
    assert len(graphs) == 1


def test_a_mode_inside_a_compiled_function_is_no_error():
    def count(x: Tensor) -> int:
        with HostSyncs() as counted:
            x + 1
        return counted.dispatched

    plain = outside_graphs(count, recursive=False)
    function = torch.compile(lambda x: plain(x * 2), backend="eager")
    assert function(torch.ones(3)) == 1

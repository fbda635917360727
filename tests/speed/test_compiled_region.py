"""The graphs that are made of a region: one for all batch sizes on a CPU, one for each of the first two on a GPU."""

import pytest
import torch
from host_syncs import HostSyncs
from torch import Tensor

from purify_fast._compiler import outside_graphs
from purify_fast.speed.folding import inference_copy
from purify_fast.speed.folding.inference_copy import STATIC_SIZES, CompiledRegion

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


def test_after_a_mode_the_compiler_is_on(graphs):
    function = torch.compile(lambda x: x * 2)
    with HostSyncs():
        function(torch.ones(3))
    assert len(graphs) == 0
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

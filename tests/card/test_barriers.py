"""Kernels in the graphs of compiled trainings: the compiler of a GPU cannot fuse them with their neighbors."""

import pytest
import torch
from functorch.compile import make_boxed_func
from small_runs import arrest_task, atop_task, attack, batch, carso_task
from torch._dynamo.backends.common import aot_autograd

from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch import registry
from purify_fast.speed.graphs import compiled_step
from purify_fast.training.loop import train_step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
#: For each training, the ops that move fewer bytes than their compiled references, or are as many launches.
AHEAD = {
    "ARREST": (lambda: arrest_task(attack=attack(steps=3)), set()),
    "CARSO, pipeline": (lambda: carso_task("pipeline", attack=attack(steps=3)), {"philox"}),
    "AToP": (lambda: atop_task("classifier"), {"contextual_attention"}),
    "AToP, pipeline": (lambda: atop_task("pipeline", 3), {"contextual_attention", "random_transform"}),
}


def on_a_gpu(name: str, kind: str, index: int | None, variant: str) -> str:
    """Choose a kernel where a graph for a GPU has one; here it is the CPU's, or the reference as an op."""
    used = REGISTRY[name].launch is not None and variant in REGISTRY[name].in_graphs.get("cuda", ())
    return "cpp" if used else "reference"


on_a_gpu._dynamo_marked_constant = True


@pytest.mark.parametrize("name", AHEAD)
def test_compiled_steps_call_only_kernels_that_are_ahead_of_the_compiler(name, monkeypatch):
    make, wanted = AHEAD[name]
    found, graphs = set(), []

    def compiler(graph, inputs):
        graphs.append(graph)
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        found.update(one.split(".")[1].removesuffix("_backward") for one in targets if one.startswith("purify_fast."))
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(registry, "_in_graph", on_a_gpu)
    monkeypatch.setattr(compiled_step, "BACKEND", aot_autograd(fw_compiler=compiler, bw_compiler=compiler))
    torch._dynamo.reset()
    task = make()
    task.compiles = True
    task.begin()
    train_step(task, batch(1))
    assert graphs and found == wanted

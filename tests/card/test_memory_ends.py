"""Memory that ends at any operator of a capture changes nothing in a training."""

import contextlib
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from captures import Rerun
from small_runs import attack, batch, carso_task, classifier_task
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from purify_fast.speed import StepGraphs
from purify_fast.training.loop import train_step


class MemoryEnds(TorchDispatchMode):
    """Raises an error at one operator of a capture, or from there on at each operator that needs new memory."""

    def __init__(self, at: int, lasting: bool, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.at, self.lasting, self.count, self.active = at, lasting, 0, False
        make = StepGraphs._make

        def within(*given):
            self.active = True
            try:
                return make(*given)
            finally:
                self.active = False

        monkeypatch.setattr(StepGraphs, "_make", within)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.active:
            self.count += 1
            allocates = any(each.alias_info is None for each in function._schema.returns)
            if self.count == self.at or (self.lasting and 0 < self.at < self.count and allocates):
                raise torch.OutOfMemoryError("CUDA out of memory (a stand-in)")
        return function(*args, **(kwargs or {}))


def stepped(make, graphs: StepGraphs | None, ends: contextlib.AbstractContextManager) -> dict:
    """All that a training consists of after a step."""
    task, given = make(), batch(1)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    # There are gradients, moments and counts before the capture.
    train_step(task, batch(2))
    task.graphs = graphs
    with warnings.catch_warnings(), ends:
        warnings.simplefilter("ignore")
        train_step(task, given)
    return {
        "weights and buffers": dict(task.model.state_dict()),
        "gradients": [weight.grad for weight in task.model.parameters()],
        "modes": [part.training for part in task.model.modules()],
        "optimizers": [optimizer.state_dict() for optimizer in task.optimizers.values()],
        "generators": [torch.get_rng_state(), random.getstate(), torch.from_numpy(np.random.get_state()[1].copy())],
    }


def equal(tree, other) -> bool:
    pairs = zip(tree_leaves(tree), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("kind", [classifier_task, pytest.param(carso_task, marks=pytest.mark.slow)])
def test_a_capture_in_which_memory_ends_changes_nothing(kind, lasting, monkeypatch):
    make = partial(kind, **({} if kind is classifier_task else {"target": "pipeline"}), attack=attack(steps=1))
    wanted = stepped(make, None, contextlib.nullcontext())

    def captured(at: int) -> tuple[dict, int]:
        with monkeypatch.context() as patch:
            ends, graphs = MemoryEnds(at, lasting, patch), StepGraphs("always", capture=Rerun())
            found = stepped(make, graphs, ends)
            assert len(graphs) == (at == 0)
            return found, ends.count

    found, whole = captured(0)
    assert equal(found, wanted) and whole > 100
    for at in range(1, whole + 1, 7):
        found, _ = captured(at)
        for part in found:
            assert equal(found[part], wanted[part]), f"{part}, after an error at operator {at} of {whole}"

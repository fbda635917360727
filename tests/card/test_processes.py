"""Two processes, one of which cannot capture its attacks: it launches them, and both train the same weights."""

import warnings

import torch
import torch.distributed as dist
from captures import Rerun
from forks import results_of
from trainings import small_set, small_task

from purify_fast.speed import StepGraphs
from purify_fast.training import FitConfig, fit


def trained(captured: bool) -> tuple[dict, dict, bool]:
    """The weights, the last metrics, and whether this process has captured an attack."""
    stand_in, task = Rerun(), small_task("convolutional")
    if dist.get_rank() == 1:
        stand_in.error = RuntimeError("operation not permitted")
    task.graphs = StepGraphs("always", capture=stand_in) if captured else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        last = fit(task, *small_set(), FitConfig(3, 16, validation_share=0.2), progress=False)
    return task.model.state_dict(), last, captured and task.graphs.captures > 0


def test_a_process_that_captures_nothing_trains_with_one_that_does(tmp_path):
    done = results_of(tmp_path, 2, lambda: [trained(captured) for captured in (False, True)])
    wanted, wanted_last, _ = done[0][0]
    for (_, (state, last, captured)), can in zip(done, (True, False), strict=True):
        assert all(torch.equal(value, wanted[name]) for name, value in state.items()) and last == wanted_last
        assert captured == can

"""Two processes, one of which cannot capture its steps: it launches them, and both train the same weights."""

import warnings

import torch
import torch.distributed as dist
from captures import Rerun
from forks import results_of
from trainings import small_set, small_task

from purify_fast.speed import StepGraphs
from purify_fast.training import FitConfig, fit
from purify_fast.training.captured_step import CapturedStep


def trained(captured: bool) -> tuple[dict, dict, list[bool]]:
    """The weights, the last metrics, and which kinds of steps are captured in this process."""
    stand_in, task = Rerun(), small_task("diffusion")
    if dist.get_rank() == 1:
        stand_in.error = RuntimeError("operation not permitted")
    task.graphs = StepGraphs("always", capture=stand_in) if captured else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        last = fit(task, *small_set(), FitConfig(3, 16, validation_share=0.2), progress=False)
    steps = task.graphs.whole_steps.values() if captured else ()
    return task.model.state_dict(), last, [isinstance(step, CapturedStep) for step in steps]


def test_a_process_that_captures_nothing_trains_with_one_that_does(tmp_path):
    done = results_of(tmp_path, 2, lambda: [trained(captured) for captured in (False, True)])
    wanted, wanted_last, _ = done[0][0]
    for (_, (state, last, captured)), can in zip(done, (True, False), strict=True):
        assert all(torch.equal(value, wanted[name]) for name, value in state.items()) and last == wanted_last
        assert captured == [can]

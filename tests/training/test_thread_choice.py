"""A training measures its number of threads by trial steps, which change nothing, and a resumed one takes it again."""

import pytest
import torch
from small_runs import StopAt, Stopped, arrest_task, images, on_step, same, task
from trainings import small_set, small_task

from purify_fast.training import FitConfig, fit, loop


@pytest.fixture
def found(found_threads):
    """The numbers of threads that measurements find, one after the other."""
    return found_threads(loop)


KINDS = ("classifier", "published", "pipeline")
SLOW = ("convolutional", "diffusion", "atop gan", "atop pipeline", "arrest")


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_the_trial_steps_change_nothing(found, monkeypatch, kind):
    def train():
        made = arrest_task() if kind == "arrest" else small_task(kind)
        metrics = fit(made, *small_set(), FitConfig(2, 32, padding=1, flip=True), progress=False)
        return made, metrics

    found += [2]
    made, metrics = train()
    monkeypatch.setattr(loop, "may_choose", lambda device: False)
    plain, expected = train()
    assert not found and same(made, plain) and metrics == expected


def test_the_number_holds_inside_and_a_resumed_run_takes_it_again(found, tmp_path):
    seen, (x, y) = [], images()
    threads = on_step(lambda _: seen.append(torch.get_num_threads()))

    def train(*listeners):
        made = task()
        config = FitConfig(3, 16, checkpoint_seconds=0)
        fit(made, x, y, config, tmp_path, progress=False, callbacks=(threads, *listeners))
        return made

    found += [1]
    with pytest.raises(Stopped):
        train(StopAt(6))
    assert torch.get_num_threads() == 2 and seen == [1] * 6
    train()
    assert torch.get_num_threads() == 2 and set(seen) == {1} and len(seen) > 12


def test_with_another_number_of_cores_a_resumed_run_measures_again(found, tmp_path):
    seen, (x, y) = [], images()
    threads = on_step(lambda _: seen.append(torch.get_num_threads()))
    found += [1, 3]
    with pytest.raises(Stopped):
        fit(task(), x, y, FitConfig(3, 16), tmp_path, progress=False, callbacks=(StopAt(6),))
    torch.set_num_threads(3)
    fit(task(), x, y, FitConfig(3, 16), tmp_path, progress=False, callbacks=(threads,))
    assert not found and set(seen) == {3}

"""The number of threads that is fastest for a step, by a clock of the test."""

import logging

import pytest
import torch

from purify_fast.speed import threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_threads(monkeypatch):
    """The user has set nothing, and the cores are four, however many there are."""
    now = [4]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delitem(threads.sys.modules, "torch._inductor.compile_fx", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[-1])
    monkeypatch.setattr(torch, "set_num_threads", now.append)
    return now


@pytest.fixture
def clock(monkeypatch):
    """Time passes only in `step`: so many seconds by the number of threads."""

    class Clock:
        now, seconds, steps = 0.0, {4: 1e-3, 2: 1e-3, 1: 1e-3}, 0

        def step(self):
            self.steps += 1
            self.now += self.seconds[torch.get_num_threads()]

    clock = Clock()
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock.now)
    return clock


@pytest.mark.parametrize("fastest", [4, 2, 1])
def test_the_fastest_number_is_chosen_told_and_not_yet_set(clock, caplog, fastest):
    clock.seconds[fastest] = 0.5e-3
    with caplog.at_level(logging.INFO, "purify_fast"):
        assert threads.fastest_threads(clock.step) == fastest
    assert torch.get_num_threads() == 4 and clock.now == pytest.approx(threads.ROUNDS * 3 * threads.SECONDS, rel=0.02)
    (line,) = caplog.messages
    assert line.startswith(f"the number of threads is {fastest}, because a step took ")
    assert f"0.5 ms with {fastest}" in line


def test_an_error_of_a_step_or_a_block_restores_the_threads(clock):
    def step():
        clock.step()
        if torch.get_num_threads() == 1:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        threads.fastest_threads(step)
    assert torch.get_num_threads() == 4
    with pytest.raises(ValueError, match="broken"), threads.restored_threads():
        torch.set_num_threads(1)
        raise ValueError("broken")
    assert torch.get_num_threads() == 4


def test_nothing_is_measured_if_the_number_is_given(monkeypatch):
    assert threads.may_choose(CPU) and not threads.may_choose(torch.device("cuda"))
    with monkeypatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "4")
        assert not threads.may_choose(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(threads, "processes", lambda: (0, 2))
        assert not threads.may_choose(CPU)
    with monkeypatch.context() as patch:
        patch.setitem(threads.sys.modules, "torch._inductor.compile_fx", threads)
        assert not threads.may_choose(CPU)
    torch.set_num_threads(1)
    assert not threads.may_choose(CPU)

"""The stand-in for CUDA graphs refuses what CUDA refuses in a capture, so that tests without a GPU find it."""

import pytest
import torch
from captures import RefusedInCapture

CPU = torch.device("cpu")


X = torch.rand(3)
WRONG = {
    "a state of the generator": lambda: torch.get_rng_state(),
    "a state of the device": lambda: torch.cuda.get_rng_state(),
    "a wait": lambda: torch.cuda.synchronize(),
    "the free memory": lambda: torch.cuda.mem_get_info(),
    "an array": lambda: X.numpy(),
    "a copy to the host": lambda: X.cpu(),
    "new pinned memory": lambda: torch.empty(3, pin_memory=True),
    "a number": lambda: X.sum().item(),
    "a branch": lambda: bool(X.sum() > 0),
    "a mask": lambda: X[X > 0.5],
    "indices": lambda: X.nonzero(),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cuda_refuses_is_refused(name, rerun):
    with pytest.raises(RuntimeError, match=r"not permitted while a stream is capturing|waits for the device"):
        rerun.record(WRONG[name], CPU)
    assert rerun.recorded == 0
    # Afterwards all works as before.
    assert X.tolist() == X.numpy().tolist()
    rerun.record(lambda: X.mul(2), CPU)


def test_a_first_compilation_is_refused_and_compiled_code_is_not(rerun):
    def double(x):
        return 2 * x

    compiled = torch.compile(double, backend="eager")
    with pytest.raises(RefusedInCapture, match="the first compilation of"):
        rerun.record(lambda: compiled(X), CPU)
    compiled(X)
    rerun.record(lambda: compiled(X), CPU)

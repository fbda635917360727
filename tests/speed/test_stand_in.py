"""The stand-in for CUDA graphs refuses what CUDA refuses in a capture, so that tests without a GPU find it."""

import numpy as np
import pytest
import torch
from captures import RefusedInCapture

CPU = torch.device("cpu")


def forked() -> None:
    with torch.random.fork_rng([]):
        pass


X = torch.rand(3)
WRONG = {
    "a state of the generator": lambda: torch.get_rng_state(),
    "another state of it": lambda: torch.random.set_rng_state(None),
    "a fork of it": forked,
    "a state of the device": lambda: torch.cuda.get_rng_state(),
    "a wait": lambda: torch.cuda.synchronize(),
    "the free memory": lambda: torch.cuda.mem_get_info(),
    "an array": lambda: X.numpy(),
    "an array by numpy": lambda: np.asarray(X),
    "numbers": lambda: X.tolist(),
    "a copy to the host": lambda: X.cpu(),
    "pinned memory": lambda: X.pin_memory(),
    "new pinned memory": lambda: torch.empty(3, pin_memory=True),
    "a number": lambda: X.sum().item(),
    "a branch": lambda: bool(X.sum() > 0),
    "a mask": lambda: X[X > 0.5],
    "indices": lambda: X.nonzero(),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("kind", ["rerun", "tape"])
def test_what_cuda_refuses_is_refused(name, kind, request):
    stand_in = request.getfixturevalue(kind)
    with pytest.raises(RuntimeError, match=r"not permitted while a stream is capturing|waits for the device"):
        stand_in.record(WRONG[name], CPU)
    assert stand_in.recorded == 0
    # Afterwards all works as before.
    forked()
    assert X.tolist() == X.numpy().tolist()
    stand_in.record(lambda: X.mul(2), CPU)


def test_a_first_compilation_is_refused_and_compiled_code_is_not(rerun):
    def double(x):
        return 2 * x

    for make in (lambda: torch.compile(double, backend="eager"), lambda: torch.compile(Double(), backend="eager")):
        compiled = make()
        with pytest.raises(RefusedInCapture, match="the first compilation of"):
            rerun.record(lambda compiled=compiled: compiled(X), CPU)
        compiled(X)
        rerun.record(lambda compiled=compiled: compiled(X), CPU)


class Double(torch.nn.Module):
    def forward(self, x):
        return 2 * x

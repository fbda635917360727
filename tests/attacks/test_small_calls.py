"""Count the functions and operators that an attack runs beside the network, for a call and for a step."""

import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from purify_fast.attacks import pgd
from purify_fast.attacks.pgd import reference

#: Operators that launch nothing.
VIEWS = {"view", "_unsafe_view", "t", "detach", "alias", "expand", "unsqueeze", "squeeze", "transpose", "as_strided"}
VIEWS |= {"promote_types", "select", "slice", "split", "unbind"}
#: Comprehensions are functions of their own before Python 3.12.
INLINED = ("<listcomp>", "<dictcomp>", "<setcomp>")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(4)


def calls(run) -> Counter:
    """The functions of the package that a call passes, and how often."""
    found = Counter()

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and "purify_fast" in code.co_filename and not code.co_name.endswith(INLINED):
            found[code] += 1

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name.partition("::")[2] not in VIEWS
        return function(*args, **(kwargs or {}))


def operators_of_a_step(attack) -> int:
    counts = []
    for steps in (5, 6):
        with Operators() as operators:
            attack(steps)
        counts.append(operators.count)
    return counts[1] - counts[0]


def test_a_plain_call_passes_few_functions(monkeypatch):
    # In a process in which something was compiled, an attack also looks for steps to compile.
    monkeypatch.delitem(sys.modules, "purify_fast.speed.graphs.compiled_step", raising=False)
    model, (x, y) = network(), batch()
    run = lambda steps: pgd(model, x, y, 0.1, steps=steps, alpha=0.01)  # noqa: E731
    run(2)
    five, six = calls(lambda: run(5)), calls(lambda: run(6))
    assert len(five) <= 45 and sum(six.values()) - sum(five.values()) <= 10


@pytest.mark.parametrize("options", [{}, {"norm": "l2"}, {"alpha": None}], ids=["linf", "l2", "falling"])
def test_a_step_takes_few_operators(options):
    model, (x, y) = network().requires_grad_(False), batch()
    how = {"alpha": 0.01, "random_start": False} | options
    ours = operators_of_a_step(lambda steps: pgd(model, x, y, 0.1, steps=steps, **how))
    assert ours <= 14
    if not options:
        assert ours <= operators_of_a_step(lambda n: reference(model, x, y, x, eps=0.1, alpha=0.01, steps=n)) + 3

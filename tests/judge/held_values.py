"""Models that hold a value in every way in which a model may."""

import dataclasses
import enum
import functools
import logging
import types
from collections import deque

import numpy as np
import torch
from torch import nn

from purify_fast.judge.request.fingerprint import state_hash

log = logging.getLogger(__name__)


class Mode(enum.Enum):
    ON = 1.0
    OFF = 0.0


@dataclasses.dataclass
class Settings:
    scale: float
    names: set = dataclasses.field(default_factory=lambda: {"a", "bc", "def", "ghij"})


class Part:
    """An object that a user made; its pickles leave out what decides."""

    def __init__(self, scale):
        self._scale = scale

    def __getstate__(self):
        return {}


class Linear(nn.Module):
    """A classifier with constant weights, which holds a value."""

    def __init__(self, held=None):
        super().__init__()
        self.base, self._held = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)), held
        for parameter in self.base.parameters():
            nn.init.constant_(parameter, 0.1)

    def forward(self, x):
        return self.base(x)


class Traced(nn.Module):
    """Calls a function, which a tracer records."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


def wrapped(value):
    """`functools.wraps` copies the module's name, so the wrapper looks like the library's function."""
    model = nn.Flatten()
    model.forward = functools.wraps(inner := model.forward)(lambda x: value * inner(x))
    return model


def in_a_list(value):
    """A module that PyTorch does not know of."""
    inner = Linear()
    inner.base[1].weight.data.mul_(value)
    return Linear([inner])


def recursive(value):
    def scale(x):
        return scale(x - value)

    return scale


@functools.lru_cache
def remembered(x):
    return x in {"a", "bc", "def"} or log.name == x


#: By name: what a model may hold of a value; models that hold what is made of other values are others.
VALUES = {
    "private": float,
    "tensor": torch.tensor,
    "list of tensors": lambda v: [torch.tensor(v)],
    "numpy number": np.float32,
    "numpy array": lambda v: np.full(1, v, np.float32),
    "array of objects": lambda v: np.array([Settings(v)]),
    "namespace": lambda v: types.SimpleNamespace(scale=v),
    "set": lambda v: {v},
    "deque": lambda v: deque([v], maxlen=3),
    "enum": Mode,
    "dataclass": Settings,
    "left out of pickles": Part,
    "bound method": lambda v: Settings(v).__eq__,
    "dictionary of lists": lambda v: {"a": [[v]]},
    "generator's seed": lambda v: torch.Generator().manual_seed(int(v)),
    "remembered": lambda v: (remembered, functools.partial(remembered, v)),
    "around a function": lambda v: lambda x: x * v,
    "default": lambda v: lambda x, factor=v: x * factor,
    "keyword": lambda v: lambda x, *, factor=v: x * factor,
    "function of one line with another": lambda v: (lambda x: x + 1, lambda x: x - 1)[int(v)],
    "base of a class": lambda v: type("Activation", (nn.Tanh if v else nn.Sigmoid,), {"__module__": __name__})(),
    "traced": lambda v: torch.fx.symbolic_trace(Traced(torch.tanh if v else torch.relu)),
    "recursive": recursive,
    "partial": lambda v: functools.partial(torch.clamp, min=v),
    "function of a library": lambda v: torch.relu if v else torch.tanh,
}
#: By name: makes a model around a value.
WAYS = {name: lambda v, of=of: Linear(of(v)) for name, of in VALUES.items()} | {
    "module in a list": in_a_list,
    "forward that is named after that of a library": wrapped,
}


def show():
    """Print the hashes of all states."""
    for name, make in WAYS.items():
        print(name, state_hash(make(1.0)))

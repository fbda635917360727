"""Models that hold a value in every way in which a model may; as a program it prints all their fingerprints."""

import dataclasses
import enum
import functools
import logging
import types
import weakref
from collections import deque

import numpy as np
import torch
from torch import nn

from purify_fast import zoo
from purify_fast.defences.aggregation import WithAggregation
from purify_fast.defences.noisy_ensemble import NoisyEnsemble
from purify_fast.evaluation.keep.fingerprint import fingerprint
from purify_fast.methods.atop import Atop

log = logging.getLogger(__name__)


class Mode(enum.Enum):
    ON = 1.0
    OFF = 0.0


@dataclasses.dataclass
class Settings:
    scale: float
    names: set = dataclasses.field(default_factory=lambda: {"a", "bc", "def", "ghij"})


class Slots:
    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale


class Part:
    """An object that a user made; its pickles leave out what decides."""

    def __init__(self, scale):
        self._scale = scale

    def __getstate__(self):
        return {}


class Scaled(nn.Module):
    """A linear classifier of images times what ``get`` finds."""

    def __init__(self):
        super().__init__()
        self.base = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
        for parameter in self.base.parameters():
            nn.init.constant_(parameter, 0.1)
        self.base[1].weight.data[0, :4], self.base[1].weight.data[1, 4:] = 1, 1

    def get(self):
        return 1.0

    def forward(self, x):
        return self.base(x * self.get())


def scaled(**held):
    """Makes models that hold what the functions make of a value; ``get`` says how they find the value again."""
    get = held.pop("get")

    def make(value):
        class Made(Scaled):
            pass

        Made.get = get
        model = Made()
        for name, of in held.items():
            setattr(model, name, of(value))
        return model

    return make


def on_class(value):
    made = scaled(get=lambda self: self._scale)(value)
    type(made)._scale = value
    return made


def hooked(value):
    made = Scaled()
    made.base.register_forward_pre_hook(lambda module, inputs: (inputs[0] * value,))
    return made


def instance_forward(value):
    made = Scaled()
    made.forward = lambda x: made.base(x * value)
    return made


def in_a_list(value):
    """A module that PyTorch does not know of."""
    inner = Scaled()
    inner.base[1].weight.data.mul_(value)
    return scaled(nets=lambda _: [inner], get=lambda self: 1 + 0 * self.nets[0].base[1].weight.sum())(value)


@functools.lru_cache
def remembered(x):
    return x in {"a", "bc", "def"} or log.name == x


#: By name: makes a model around a value; models of other values are others.
WAYS = {
    "private": scaled(_scale=float, get=lambda self: self._scale),
    "tensor": scaled(scale=torch.tensor, get=lambda self: self.scale),
    "list of tensors": scaled(scale=lambda v: [torch.tensor(v)], get=lambda self: self.scale[0]),
    "numpy number": scaled(scale=np.float32, get=lambda self: float(self.scale)),
    "numpy array": scaled(scale=lambda v: np.full(1, v, np.float32), get=lambda self: float(self.scale[0])),
    "array of objects": scaled(scale=lambda v: np.array([Settings(v)]), get=lambda self: self.scale[0].scale),
    "namespace": scaled(config=lambda v: types.SimpleNamespace(scale=v), get=lambda self: self.config.scale),
    "set": scaled(scale=lambda v: {v}, get=lambda self: next(iter(self.scale))),
    "deque": scaled(scale=lambda v: deque([v], maxlen=3), get=lambda self: self.scale[0]),
    "enum": scaled(mode=Mode, get=lambda self: self.mode.value),
    "dataclass": scaled(settings=Settings, get=lambda self: self.settings.scale),
    "slots": scaled(settings=Slots, get=lambda self: self.settings.scale),
    "left out of pickles": scaled(part=Part, get=lambda self: self.part._scale),
    "weak reference": scaled(
        kept=lambda v: (made := Settings(v), weakref.ref(made)), get=lambda self: self.kept[1]().scale
    ),
    "bound method": scaled(times=lambda v: Settings(v).__eq__, get=lambda self: self.times.__self__.scale),
    "method in C": scaled(times=lambda v: torch.tensor(v).mul, get=lambda self: self.times(1)),
    "bytes": scaled(scale=lambda v: bytes([int(v)]), get=lambda self: self.scale[0]),
    "dictionary of lists": scaled(scale=lambda v: {"a": [[v]]}, get=lambda self: self.scale["a"][0][0]),
    "generator's seed": scaled(
        drawn=lambda v: torch.Generator().manual_seed(int(v)), get=lambda self: float(self.drawn.initial_seed())
    ),
    "class attribute": on_class,
    "hook": hooked,
    "forward of its own": instance_forward,
    "module in a list": in_a_list,
    "remembered": scaled(
        scale=lambda v: (remembered, functools.partial(remembered, v)), get=lambda self: self.scale[1].args[0]
    ),
}


class Repair(nn.Module):
    """A purifier for AToP."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, image, mask):
        return torch.tanh(self.layer(image))


def defences():
    """The package's own models, in every state that an evaluation finds them in."""
    x = torch.linspace(0, 1, 512).view(2, 1, 16, 16)
    classifier = zoo.load("digits-standard")
    carso, noisy = zoo.load("digits-carso-pipeline"), NoisyEnsemble(classifier, 0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        atop = Atop(classifier, Repair(), (1, 16, 16))
        made = {"classifier": classifier, "noisy": noisy, "view": WithAggregation(noisy, "mean"), "atop": atop}
        for name, model in {**made, "carso": carso}.items():
            model(x), model(x)
            yield name, fingerprint(model)
        for defence in (carso, atop):
            for dtype in (torch.float32, torch.bfloat16):
                defence.accelerate(dtype)(x)
                yield f"{type(defence).__name__} {dtype}", fingerprint(defence)
        with carso.fixed_noise(3):
            yield "fixed", fingerprint(carso)


if __name__ == "__main__":
    for name, make in WAYS.items():
        print(name, fingerprint(make(1.0)))
    for name, mark in defences():
        print(name, mark)

"""The training and attack loops of other people, as their papers describe them, and attacks of other packages.

Each row has four contestants: the loop as it is, an expert's changes in plain PyTorch, the loop with the lines that
this package needs, and the loop with its networks under `torch.compile`. We wrote the loops from the papers, and no
code of their authors is in them.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import purify_fast

from ..pipelines import expert
from ..pipelines.carso_inference import classifier

Batches = Iterator[tuple[Tensor, Tensor]]
#: A dtype of frozen copies, or "auto" for the dtype that suits the processor.
Dtype = torch.dtype | Literal["auto"]
#: A function of a model, batches and a dtype. The result yields the loss of each training step, or attacked images.
Program = Callable[[nn.Module, Batches, Dtype], Iterator[Tensor]]
EPS, ALPHA = 8 / 255, 2 / 255


@dataclass(frozen=True)
class Form:
    """A contestant's program, with the functions and classes that a person writes for it."""

    program: Program
    written: tuple[Callable, ...]

    def lines(self) -> list[str]:
        """Return the lines of the program, without comments, docstrings and the heads of functions."""
        return [line for part in self.written for line in _body(part)]


def _body(part: Callable) -> list[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
    assert isinstance(tree, (ast.FunctionDef, ast.ClassDef))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return [line for statement in tree.body for line in ast.unparse(statement).splitlines() if line.strip()]


def changed_lines(before: Form, after: Form) -> int:
    """Return the number of lines that were added and removed between two programs, with imports of this package."""
    imports = any("purify_fast" in line for line in after.lines())
    return imports + sum(line[0] in "+-" for line in difflib.ndiff(before.lines(), after.lines()))


def network(small: bool) -> nn.Module:
    """Return a small network for images of 8 x 8, or a ResNet-18 for images of 32 x 32."""
    if not small:
        return classifier()
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    second = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64, 10)).eval()


@dataclass(frozen=True)
class Row:
    """A loop, with the forms of its contestants.

    Attributes:
        images: number of images in a batch.
        theirs: the loop as it is.
        expert: the loop with an expert's changes.
        ours: the loop with this package.
        trains: True if the loop changes the weights and yields losses. False if it yields attacked images.
        network: function that makes the model. Its argument is True for a small one.
        parts: function that returns the modules of a model that `torch.compile` compiles.
        package: name of the package whose attack runs, or an empty text.
    """

    images: int
    theirs: Form
    expert: Form
    ours: Form
    trains: bool
    network: Callable[[bool], nn.Module] = network
    parts: Callable[[nn.Module], Iterable[nn.Module]] = lambda model: (model,)
    package: str = ""

    def form(self, who: str) -> Form:
        """Return the form of a contestant. The compiled one is theirs."""
        return {"theirs": self.theirs, "compiled": self.theirs, "expert": self.expert, "ours": self.ours}[who]

    def batches(self, model: nn.Module, side: int) -> Batches:
        """Yield random images with the labels that a model predicts, the same in every call of this function."""
        source = torch.Generator().manual_seed(1)
        while True:
            x = torch.rand(self.images, 3, side, side, generator=source)
            with torch.no_grad():
                y = model(x).argmax(1)
            yield x, y


def copied(model: nn.Module, x: Tensor, dtype: Dtype) -> nn.Module:
    """Make a frozen copy of a model, whose trainings are faster with weights in channels_last."""
    return purify_fast.frozen_copy(model.to(memory_format=torch.channels_last), x, dtype=dtype)


def with_copy(model: nn.Module, batches: Batches, dtype: Dtype) -> tuple[nn.Module, Batches]:
    """Return a frozen copy that is made with the first batch, and all batches."""
    first = next(batches)
    return copied(model, first[0], dtype), itertools.chain([first], batches)


def with_our_line(theirs: Form) -> Form:
    """Return the attacks of other people on a frozen copy."""

    def program(model: nn.Module, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
        return theirs.program(*with_copy(model, batches, dtype), dtype)

    return Form(program, (copied, *theirs.written))


def best(dtype: Dtype) -> torch.dtype:
    """Return a dtype. For "auto", it is the fastest one."""
    return dtype if isinstance(dtype, torch.dtype) else expert.DTYPES["cpu"]


def cast(dtype: torch.dtype) -> torch.autocast:
    """Return the context in which an expert trains: autocast to bfloat16, or nothing for float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


class Frozen(nn.Module):
    """A frozen copy of a model, which takes and returns float32."""

    def __init__(self, model: nn.Module, dtype: Dtype):
        super().__init__()
        self.dtype = best(dtype)
        self.copy = expert.FrozenCopy(model.to(memory_format=expert.LAST), dtype=self.dtype)
        self.model = self.copy.model

    def train(self, mode: bool = True) -> Frozen:
        """Give the copy the present weights of the model, whenever a loop turns to the evaluation mode."""
        self.training = mode
        if not mode:
            self.copy.refresh()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.dtype, memory_format=expert.LAST)).float()


#: What a person must write for a frozen copy.
WRITTEN = (expert.fastest, best, Frozen, expert.FrozenCopy, expert.pairs, expert._fused)


def registry() -> dict[str, Row]:
    """Return all rows by their names."""
    from .loops import ROWS

    return ROWS

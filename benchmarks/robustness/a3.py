"""A3 as a contestant: Liu et al., "Practical evaluation of adversarial robustness via adaptive auto attack", CVPR 2022.

It is the authors' released code (liuye6666/adaptive_auto_attack, main file of commit c3650cd), which is not part of
this package: the user gives a folder with it. The search is unchanged. Its images come from memory in place of files,
it runs on the CPU, and names that NumPy has removed are put back.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import random
from argparse import ArgumentTypeError
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from purify_fast.attacks import frozen

FILE = "Adaptive_Auto_Attack_main.py"
#: The authors' settings, from the last lines of that file and the defaults of its ``main``.
BATCH, AVERAGE = 128, 1000


def folder(text: str) -> Path:
    """Read the folder that holds the authors' code; argparse reports what is wrong with it."""
    path = Path(text)
    if not (path / FILE).is_file():
        raise ArgumentTypeError(f"{path} holds no {FILE}")
    if importlib.util.find_spec("pandas") is None:
        raise ArgumentTypeError("the code of A3 needs the package pandas: pip install pandas")
    return path


def _load(path: Path) -> ModuleType:
    """Load their module for the CPU; only the names of the device are changed."""
    code: Any = ModuleType("a3_released")
    text = (path / FILE).read_text(encoding="utf-8").replace("'cuda'", "'cpu'").replace('"cuda"', '"cpu"')
    # It chooses a GPU for the whole process.
    with patch.dict(os.environ):
        exec(compile(text, str(path / FILE), "exec"), vars(code))
    code.trange = range
    code.np = SimpleNamespace(**vars(np) | {"int": int, "bool": bool})
    return code


class _Run:
    """A run of their code, which keeps the adversarial images that the code only counts."""

    def __init__(self, code: Any, model: nn.Module, x: Tensor, y: Tensor):
        self.model, self.x, self.y, self.found = model, x, y, x.clone()
        self.batch = torch.arange(len(x))
        self.attacking, self.search = False, code.AAA_white_box
        names = [f"{label}/{index}.png" for index, label in enumerate(y.tolist())]
        code.glob = SimpleNamespace(glob=lambda pattern: names)
        code.mytest_loader, code.AAA_white_box = self.loader, self.searched

    def loader(self, batch_size: int, dataframe: Any, datasets: str, model_name: str) -> Iterator[dict[str, Tensor]]:
        """The images from memory, in place of their loader of files."""
        index = torch.tensor([int(Path(name).stem) for name in dataframe["img_path"]], dtype=torch.int64)
        for self.batch in index.split(batch_size) if len(index) else ():
            yield {"img": self.x[self.batch], "lab": self.y[self.batch]}

    def keep(self, points: Tensor, fallen: Tensor) -> None:
        self.found[self.batch[fallen]] = points.detach()[fallen]

    def predicted(self, points: Tensor) -> Tensor:
        """Call the model. Before the first search it gets the images of a batch and a random start of each."""
        logits = self.model(points)
        if not self.attacking:
            self.keep(points, logits.argmax(1) != self.y[self.batch])
        return logits

    def searched(self, *given: Any, **named: Any) -> Any:
        """Run their search, whose second and third results are the mask of standing images, and the points."""
        self.attacking = True
        result = self.search(*given, **named)
        self.keep(result[2], ~torch.from_numpy(result[1]))
        return result


def attack(path: Path, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Attack a model by their code, with the settings that it has for CIFAR-10.

    Args:
        path: the folder that holds the code.
        model: images to logits of ten classes, on the CPU.
        x: images, float32 ``[N, C, H, W]`` in [0, 1]. The search orders all of them together.
        y: labels, int64 ``[N]``.
        eps: the L-inf radius.

    Returns:
        The images; a fallen image is replaced by its adversarial image.
    """
    code: Any = _load(path)
    run = _Run(code, model, x, y)
    random.seed(0)
    with frozen(model), contextlib.redirect_stdout(io.StringIO()):
        settings = {"data_set": "cifar10", "Lnorm": "Linf"}
        code.Adaptive_Auto_white_box_attack(run.predicted, code.device, eps, True, BATCH, AVERAGE, "given", **settings)
    return run.found

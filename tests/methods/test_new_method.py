"""A folder is a method: the command line trains, saves, loads and evaluates it, and no other file knows its name."""

import os
import re
import subprocess
import sys
from pathlib import Path

from purify_fast.methods.discovery import METHODS

ROOT = Path(__file__).parents[2]
METHOD = {
    "__init__.py": """
        from typing import TYPE_CHECKING

        from ..._lazy import lazy_exports

        if TYPE_CHECKING:
            from .defence import Blurred as Blurred

        __all__, __getattr__, __dir__ = lazy_exports(__name__)
    """,
    "method.py": '''
        from __future__ import annotations

        from dataclasses import dataclass, field
        from pathlib import Path
        from typing import Any, ClassVar

        from ...training import TrainingAttack
        from ..trainings import FollowsRecipe, Method, TrainPurifier


        @dataclass(frozen=True)
        class BlurredConfig:
            """The settings.

            Args:
                attack: the attack.
                learning_rate: the learning rate.
                precision: the precision.
            """

            attack: TrainingAttack = TrainingAttack(eps=0.1, steps=1)
            learning_rate: float = 1e-3
            precision: str = "float32"


        @dataclass(frozen=True)
        class TrainBlurred(FollowsRecipe, TrainPurifier):
            """Train a blur.

            Args:
                side: Side of the filter.
            """

            called: ClassVar[str] = "train blurred"

            out: Path = Path("runs/blurred")
            side: int = 3
            method: BlurredConfig = field(default_factory=BlurredConfig)

            def task(self, images: Any, classifier: Any) -> Any:
                from .defence import Blurred
                from .task import BlurredTask

                return BlurredTask(Blurred(classifier, images.image_shape, self.side), self.method)


        @dataclass(frozen=True)
        class LoadBlurred:
            """The options of a saved blur.

            Args:
                strength: Share of the blurred image.
            """

            strength: float | None = None

            def changes(self) -> dict[str, Any]:
                return {} if self.strength is None else {"strength": self.strength}


        METHOD = Method((TrainBlurred,), defence="Blurred", loading=LoadBlurred, recipes=True)
    ''',
    "recipes.py": """
        from dataclasses import dataclass

        from ..publication import Recipe
        from .method import BlurredConfig


        @dataclass(frozen=True)
        class BlurredRecipe(Recipe):
            settings = BlurredConfig


        RECIPES = {"one": BlurredRecipe("blurred/one", "A blur of one pixel", {})}
    """,
    "defence.py": """
        import torch

        from ..._tensors import dtype_of
        from ...defences.base import Defence
        from ..saving import save_defence


        class Blurred(Defence):
            aggregation = "mean"

            def __init__(self, classifier, image_shape, side, strength=1.0):
                super().__init__(classifier, image_shape)
                self.filter = torch.nn.Conv2d(1, 1, side, padding=side // 2, padding_mode="replicate")
                self.arguments = {"image_shape": list(image_shape), "side": side, "strength": strength}
                self.strength, self.num_classes = strength, classifier.head.out_features
                self._ready()

            @property
            def purifier_dtype(self):
                return dtype_of(self.filter)

            def purify(self, x, draws=1):
                self.check_images(x)
                blurred = torch.lerp(x, self.filter(x).sigmoid(), self.strength)
                return blurred[:, None].expand(-1, draws, -1, -1, -1)

            save = save_defence
    """,
    "task.py": """
        import torch

        from ...training.method_task import cross_entropy_of
        from ..purifier_task import PurifierTask


        class BlurredTask(PurifierTask):
            name = "blurred"

            def __init__(self, defence, config, origin="scratch"):
                super().__init__(defence, config, origin)
                self.optimizer = torch.optim.Adam(defence.filter.parameters())

            def training_step(self, batch):
                loss, accuracy = cross_entropy_of(self.defence(self.config.attack.run(self.defence, batch)), batch.y)
                return loss, {"accuracy": accuracy}
    """,
}
#: Only the path of the package `purify_fast.methods` differs from a plain run of the program.
TRIED = """
import contextlib
import io
import sys

from purify_fast import methods

methods.__path__.append(sys.argv[1])
from purify_fast.cli import main

for words in (["train", "--help"], ["train", "blurred", "--help"], ["evaluate", "--help"]):
    with contextlib.suppress(SystemExit):
        main(words)
assert "torch" not in sys.modules

import torch

from purify_fast import load_defence, save_classifier
from purify_fast.models.classifiers import SmallCNN

save_classifier(SmallCNN(1, 10, (8, 8), 4), "base")
common = ["--data", "digits", "--size", "8", "--device", "cpu"]
few = ["--classifier", "base", "--out", "run", "--epochs", "1", "--batch-size", "512", "--steps-per-epoch", "1"]
assert main(["train", "blurred", *few, "--side", "5", *common]) == 0
defence, other = load_defence("run"), load_defence("run", strength=0.5)
assert type(defence).__name__ == "Blurred" and defence.filter.kernel_size == (5, 5)
assert (defence.strength, other.strength) == (1.0, 0.5)
for changes, words in (({"sides": 3}, "sides is no argument of"), ({"purifier": other}, "purifier must be None")):
    try:
        load_defence("run", **changes)
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(changes)
short = ["--protocol", "fast", "--images", "4", "--steps", "1", "--probes", "False", "--strength", "0.25"]
assert main(["evaluate", "run", *short, *common]) == 0
assert main(["recipe"]) == 0
"""


def test_a_folder_adds_a_method(tmp_path):
    for name, text in METHOD.items():
        file = tmp_path / "more" / "blurred" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(re.sub(r"^ {8}", "", text, flags=re.M))
    done = subprocess.run(
        [sys.executable, "-c", TRIED, str(tmp_path / "more")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PURIFY_FAST_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.replace("│", " ").split())
    for words in ("Train a blur.", "Side of the filter.", "Share of the blurred image.", "blurred/one"):
        assert words in said
    assert "saved to run; attack it with: purify-fast evaluate run" in said and "written: run/evaluation" in said


def test_no_other_file_knows_a_method_by_name():
    """What a method needs is in its own folder; the names that users import are the exception."""
    public = {"purify_fast/__init__.py", "purify_fast/methods/recipes.py"}
    imports = re.compile(rf"^\s*(?:from|import) \S*methods\.(?:{'|'.join(METHODS)})\b", re.M)
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "purify_fast").rglob("*.py")
        if imports.search(path.read_text())
        and path.relative_to(ROOT / "purify_fast").parts[:2] not in {("methods", name) for name in METHODS}
    }
    assert found <= public, found

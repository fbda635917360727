"""A folder is a method: the command line trains, saves, loads and evaluates it, and no other file knows its name."""

import os
import re
import subprocess
import sys
from pathlib import Path

from purify_fast.methods import all_methods

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
        from dataclasses import dataclass, field
        from pathlib import Path
        from typing import Any, ClassVar

        from ..atop import AtopConfig
        from ..trainings import Method, TrainPurifier


        @dataclass(frozen=True)
        class TrainBlurred(TrainPurifier):
            """Train a blur.

            Args:
                side: Side of the filter.
            """

            called: ClassVar[str] = "train blurred"

            out: Path = Path("runs/blurred")
            side: int = 2
            method: AtopConfig = field(default_factory=AtopConfig.pretraining)

            def task(self, images: Any, classifier: Any) -> Any:
                from ..atop import AtopTask, SmallGenerator
                from .defence import Blurred

                return AtopTask(Blurred(classifier, SmallGenerator(1, self.side), images.image_shape), self.method)


        METHOD = Method((TrainBlurred,), defence="Blurred")
    ''',
    "defence.py": """
        from ..atop import Atop


        class Blurred(Atop):
            pass
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
assert main(["train", "blurred", *few, "--side", "4", *common]) == 0
defence = load_defence("run")
assert type(defence).__name__ == "Blurred" and defence.purifier.module.arguments["width"] == 4
short = ["--protocol", "fast", "--images", "4", "--steps", "1", "--probes", "False"]
assert main(["evaluate", "run", *short, *common]) == 0
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
    for words in ("Train a blur.", "Side of the filter."):
        assert words in said
    assert "saved to run; attack it with: purify-fast evaluate run" in said and "written: run/evaluation" in said


def test_no_other_file_knows_a_method_by_name():
    """What a method needs is in its own folder; the names that users import are the exception."""
    public = {"purify_fast/__init__.py", "purify_fast/methods/recipes.py"}
    imports = re.compile(rf"^\s*(?:from|import) \S*methods\.(?:{'|'.join(all_methods())})\b", re.M)
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "purify_fast").rglob("*.py")
        if imports.search(path.read_text())
        and path.relative_to(ROOT / "purify_fast").parts[:2] not in {("methods", name) for name in all_methods()}
    }
    assert found <= public, found

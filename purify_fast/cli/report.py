"""``purify-fast report``."""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro

from .command import Command


@dataclass(frozen=True)
class ShowReport(Command):
    """Write an evaluation's HTML page if it is missing, and open it in a browser."""

    called: ClassVar[str] = "report"

    folder: tyro.conf.Positional[Path] = Path("runs/carso/evaluation")
    """The folder of a report, or of a run that was evaluated."""
    open: bool = True
    """Whether to open the page; otherwise its path is printed alone."""

    def run(self) -> None:
        from ..evaluation import Report
        from ..evaluation.show.page import page_file, write_page

        places = [self.folder, self.folder / "evaluation"]
        found = next((place for place in places if (place / "report.json").is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{self.folder} holds no report.json: `purify-fast evaluate` writes one")
        path = page_file(found)
        if not path.is_file():
            write_page(Report.from_json((found / "report.json").read_text(encoding="utf-8")), found)
        print(path)
        if self.open:
            webbrowser.open(path.resolve().as_uri())

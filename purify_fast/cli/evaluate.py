"""``purify-fast evaluate``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from .data_args import DataCommand


@dataclass(frozen=True)
class Evaluate(DataCommand):
    """Attack a saved classifier or defence on held-out images; writes a report with pictures beside it. Resumes."""

    folder: tyro.conf.Positional[Path] = Path("runs/carso")
    """What to attack: a folder that one of the `train` commands wrote."""
    eps: float = 0.2
    """Radius in image units."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Norm of the ball."""
    images: int = 500
    """Held-out images, the first so many."""
    steps: int = 100
    """Steps of PGD and APGD."""
    eot: int = 5
    """Draws of the defence that each step averages over."""
    autoattack: int = 100
    """Images for AutoAttack; 0 leaves it out."""
    also: tuple[Literal["lee_kim_2023", "l2", "l1", "stadv", "classifier"], ...] = ()
    """More attacks: PGD-200 with EOT 20; APGD in the L2 and PGD in the L1 ball; StAdv; the classifier alone (weak)."""
    l2_eps: float = 0.5
    """Radius of the L2 ball of --also l2, in image units."""
    l1_eps: float = 12.0
    """Radius of the L1 ball of --also l1, in image units; 12 is customary on CIFAR-10."""
    batch_size: int = 250
    """Images that are attacked together."""
    chunk: int | None = None
    """Images in one forward pass of PGD at most; bounds the memory, exact but for which image gets which draws."""
    seed: int = 0
    """Seed of everything random."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 evaluates the accelerated defence, a slightly different function: images are rounded to 8 bits."""
    out: Path | None = None
    """Where the report goes; default: FOLDER/evaluation."""

    def run(self) -> None:
        # PyTorch takes 1.8 seconds to import: --help does without it
        import torch

        from ..defences.base import Defence
        from ..evaluation import Attack, default_attacks, evaluate, lee_kim_2023
        from ..methods.loading import load_defence
        from ..models.classifiers import CLASSIFIERS
        from ..training import load_classifier
        from ..training.checkpoint import read_model

        if "lee_kim_2023" in self.also and self.norm != "linf":
            raise ValueError(f"--also lee_kim_2023 is an L-inf attack at the radius --eps: not with --norm {self.norm}")
        images = self.load_data()
        device = images.y_test.device
        kind = read_model(self.folder)[0].get("kind")
        own = kind in {classifier.__name__ for classifier in CLASSIFIERS.values()}
        base = None if own else load_classifier(self.folder / "classifier").to(device)
        model = load_classifier(self.folder).to(device) if base is None else load_defence(self.folder, base)
        if self.precision == "bfloat16":
            if not isinstance(model, Defence):
                raise ValueError(f"precision bfloat16 is for defences; {self.folder} holds a classifier")
            model.accelerate(torch.bfloat16)
        attacks = [a for a in default_attacks(base) if a.kind != "autoattack" or self.autoattack > 0]
        attacks = [Attack(**{**vars(a), "limit": self.autoattack}) if a.kind == "autoattack" else a for a in attacks]
        more = {
            "lee_kim_2023": lee_kim_2023(self.eps),
            "l2": Attack("apgd", norm="l2", eps=self.l2_eps),
            "l1": Attack("pgd", norm="l1", eps=self.l1_eps),
            "stadv": Attack("stadv"),
            "classifier": Attack(target="classifier"),
        }
        attacks += [more[name] for name in dict.fromkeys(self.also)]
        out = self.folder / "evaluation" if self.out is None else self.out
        report = evaluate(
            model,
            images.x_test[: self.images],
            images.y_test[: self.images],
            eps=self.eps,
            norm=self.norm,
            base=base,
            attacks=attacks,
            steps=self.steps,
            eot=self.eot,
            batch_size=self.batch_size,
            chunk=self.chunk,
            seed=self.seed,
            out=out,
            name=self.folder.name,
        )
        print(report.to_text(sys.stdout.isatty()))
        report.save(out, model)
        print(f"written: {out}/report.md, report.json and pictures")

"""The command ``purify-fast certify``: robust accuracy that is proved, beside attacks on the same model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from .._validation import AtLeast0, Count, Positive, Range
from ..evaluation.request.config import ProtocolName
from .evaluate import ModelCommand
from .run_file import write_run_file


@dataclass(frozen=True)
class Certify(ModelCommand):
    """Certify the smoothed classifier of a model within L2 balls, attack it there, and write a report on both.

    An interrupted run continues if the same command is run again.

    Args:
        sigma: Standard deviation of the Gaussian noise in image units.
        radius: L2 radius in image units, or several radii.
        alpha: Largest probability of a wrong certificate, for each image.
        draws: Largest number of draws for an image. It is undecided at the radii that are open then.
        attack: Protocol that attacks the smoothed classifier at every radius above 0. The attacked images that the
            smoothed classifier misclassifies, by proof, bound the accuracy from above. Default: no attack.
        votes: Number of predictions of which the attacks take the majority.
        one_shot: Use a diffusion purifier as a denoiser of a single step, for images with the noise of --sigma.
        batch_size: Largest number of noisy images in a forward pass.
        seed: Seed of the noise, the attacks and the choice of images.
    """

    called: ClassVar[str] = "certify"
    report_folder: ClassVar[str] = "certificates"
    no_effect: ClassVar = {
        ("without", "attack"): ("votes",),
        ("beside", "one_shot"): ("t_star", "denoising_steps", "solver"),
    }

    sigma: Positive = 0.5
    radius: tuple[AtLeast0, ...] = (0.5,)
    alpha: Annotated[float, Range(0, 1, above=True, below=True)] = 0.001
    draws: Count = 100_000
    attack: ProtocolName | None = None
    votes: Count = 10
    one_shot: bool = False
    batch_size: Count = 1000
    seed: Annotated[int, Range(0, 2**31, below=True)] = 0

    def run(self) -> None:
        from torch import nn

        from .._process import processes
        from ..evaluation import certify, refute
        from ..methods.diffusion import DiffusionPurifier

        data = self.load_data(train=False)
        model, _ = self.loaded(data)
        if self.one_shot:
            if not isinstance(model, DiffusionPurifier):
                raise ValueError(f"--one-shot is only for diffusion purifiers, got {self.folder}")
            model = model.one_shot(self.sigma)
        if self.attack is not None and not isinstance(model, nn.Module):
            raise ValueError(f"--attack is only for modules, but {self.folder} returns a function")
        if self.attack is not None and not max(self.radius) > 0:
            raise ValueError(f"--attack needs a --radius above 0, got {self.radius}")
        out, name = self.writes(), self.title()
        x, y, notes = self.chosen(data, self.seed)
        how = {"alpha": self.alpha, "draws": self.draws, "batch_size": self.batch_size, "seed": self.seed}
        certificates = certify(model, x, y, sigma=self.sigma, radius=self.radius, out=out, name=name, **how)  # type: ignore[arg-type]
        certificates.notes.extend(notes)
        certificates.about.update(dataset=data.name)
        first = processes()[0] == 0
        if first:
            # An interruption of the attacks leaves the report on the certificates.
            certificates.save(out)
            write_run_file(self, out)
        for radius in self.radius if self.attack is not None else ():
            if radius == 0:
                continue
            folder = out / f"attacks-{radius:g}"
            certificates, report = refute(
                certificates,
                model,  # type: ignore[arg-type]
                x,
                y,
                radius=radius,
                votes=self.votes,
                draws=self.draws,
                batch_size=self.batch_size,
                protocol=self.attack,
                out=folder,
                name=name,
                dataset_name=data.name,
            )
            if first:
                report.save(folder)
                certificates.save(out)
        if first:
            print(certificates.to_text())
            print(f"written: {out}/certificates.html, certificates.json and certificates.txt")

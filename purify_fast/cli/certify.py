"""The command ``purify-fast certify``: robust accuracy that is proved, beside attacks on the same model."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from .._validation import AtLeast0, Count, Positive, Range
from ..judge.request.config import ProtocolName
from .command import RUN_FILE, number, run_of, values, write_run_file
from .evaluate import LoadOptions, ModelCommand, replaced, zoo_name

if TYPE_CHECKING:
    from ..data import DataSet
    from ..data.images import Subset


@dataclass(frozen=True)
class Certify(ModelCommand):
    """Certify the smoothed classifier of a model within L2 balls, attack it there, and write a report on both.

    An interrupted run continues if the same command is run again.

    Args:
        sigma: Standard deviation of the Gaussian noise in image units. Default: that of the model's training, from the
            card of a model of the zoo or from run.yaml. Required for any other model.
        radius: L2 radius in image units, or several radii. Images that are certified there need few draws. Default: the
            largest radius of each image, which papers report.
        alpha: Largest probability of a wrong certificate, for each image.
        draws: Number of draws for an image. With --radius, it is the largest number, and an image is undecided at the
            radii that are open then.
        choosing: Number of draws that choose the class of an image, without --radius.
        skip: Certify the images whose indices are multiples of this number, in place of --images.
        start: Index of the first image, in place of --images.
        max: Index before which the images end, in place of --images.
        attack: Protocol that attacks the smoothed classifier at every radius above 0. The attacked images that the
            smoothed classifier misclassifies, by proof, bound the accuracy from above. Default: no attack.
        votes: Number of predictions of which the attacks take the majority.
        one_shot: Use a diffusion purifier as a denoiser of a single step, for images with the noise of --sigma.
        batch_size: Largest number of noisy images in a forward pass.
        seed: Seed of the noise, the attacks and the choice of images.
        seconds: Time after which no further draws begin. The report says how many images are unfinished, and the same
            command goes on with them. They replace no finished certificates. The attacks have no limit.
    """

    called: ClassVar[str] = "certify"
    example: ClassVar[str] = "zoo:digits-smoothed --radius 0.25 0.5 --images 20"
    report_folder: ClassVar[str] = "certificates"
    no_effect: ClassVar = {
        ("without", "attack"): ("votes",),
        ("beside", "one_shot"): tuple(values(LoadOptions())),
        **{("beside", name): ("images",) for name in ("skip", "start", "max")},
        ("beside", "radius"): ("choosing",),
    }

    sigma: Positive | None = None
    radius: tuple[AtLeast0, ...] = ()
    alpha: Annotated[float, Range(0, 1, above=True, below=True)] = 0.001
    draws: Count = 100_000
    choosing: Count = 100
    skip: Count | None = None
    start: Annotated[int, Range(0)] | None = None
    max: Count | None = None
    attack: ProtocolName | None = None
    votes: Count = 10
    one_shot: bool = False
    batch_size: Count = 1000
    seed: Annotated[int, Range(0, 2**31, below=True)] = 0
    seconds: Annotated[float, Range(0, above=True)] = float("inf")

    def noise(self) -> tuple[float, str]:
        """The standard deviation of the noise, and where it is from: from the option or the model's training."""
        sigma, source = self.sigma, "--sigma"
        if sigma is None and (name := zoo_name(self.folder)) is not None:
            from ..zoo import card

            sigma, source = card(name).sigma, f"the card of {name}"
        elif sigma is None and (noise := run_of(self.folder).get("noise")) is not None:
            sigma, source = number(str(noise)), str(self.folder / RUN_FILE)
        if sigma is None or not sigma > 0:
            raise ValueError(f"--sigma must be given, such as --sigma 0.25: {self.folder} was not trained with noise")
        return sigma, source

    def chosen(self, images: DataSet, seed: int) -> tuple[Subset, list[str]]:
        import torch

        from ..data.images import Subset

        if self.skip is self.start is self.max is None:
            return super().chosen(images, seed)
        count = len(images.y_test)
        ids = torch.arange(count, device=images.y_test.device)[self.start : self.max]
        ids = ids[ids % (self.skip or 1) == 0]
        if not len(ids):
            raise ValueError(f"--skip, --start and --max must leave an image, but they leave none of {count}")
        steps = f"with the indices {int(ids[0])} to {int(ids[-1])} in steps of {self.skip or 1}"
        return Subset(images.x_test[ids], images.y_test[ids], ids), [f"{len(ids)} of {count} held-out images, {steps}"]

    def run(self) -> None:
        from torch import nn

        from .._process import processes
        from ..evaluation import EvaluateConfig, certify, refute
        from ..judge.request.preparation import processor_of
        from ..protocols import supports

        (sigma, source), first = self.noise(), processes()[0] == 0
        data = self.load_data(train=False)
        model, _ = self.loaded(data)
        if self.one_shot:
            if not supports(model, "one_shot"):
                raise ValueError(f"--one-shot needs a model with a method one_shot(sigma), got {self.folder}")
            model = cast(Any, model).one_shot(sigma)
        attacked = sorted({radius for radius in self.radius if radius > 0 and self.attack is not None})
        if self.attack is not None and not attacked:
            raise ValueError(f"--attack needs a --radius above 0, got {self.radius or 'none'}")
        if attacked and not isinstance(model, nn.Module):
            raise ValueError(f"--attack is only for modules, but {self.folder} returns a function")
        out = self.writes()
        (x, y, index), notes = self.chosen(data, self.seed)
        how: dict[str, Any] = {"draws": self.draws, "batch_size": self.batch_size}
        options = {name: getattr(self, name) for name in ("alpha", "seed", "choosing", "seconds")} | how
        options |= {"radius": self.radius or None, "name": self.title()}
        certificates = certify(model, x, y, sigma=sigma, index=index, out=out, **options)
        certificates.notes.extend([f"sigma {sigma} is from {source}", *notes])
        command = shlex.join(["purify-fast", *self.typed])
        certificates.about.update(dataset=data.name, command=command, processor=processor_of(data.y_test.device))
        facts = "of sigma {sigma}, radii {radii}"
        now = facts.format(sigma=certificates.sigma, radii=list(certificates.radii))
        before = replaced(out / "certificates.json", lambda old: facts.format_map(old), now)
        if first:
            # An interruption of the attacks leaves the report on the certificates.
            certificates.save(out)
            write_run_file(replace(self, sigma=sigma), out)
        how |= {"protocol": self.attack, "votes": self.votes, "config": EvaluateConfig(dataset_name=data.name)}
        for radius in attacked:
            folder = out / f"attacks-{radius}"
            if first:
                print(f"attacks within L2 {radius}", file=sys.stderr)
            certificates, report = refute(certificates, model, x, y, radius=radius, out=folder, **how)  # type: ignore[arg-type]
            if first:
                report.save(folder)
                certificates.save(out)
        if first:
            print(certificates.to_text())
            print(f"written: {out}/certificates.html, certificates.json, certificates.txt and log.tsv{before}")

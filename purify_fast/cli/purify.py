"""The command ``purify-fast purify``, which purifies image files."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from .._files import atomic
from .._validation import Count, usable_device
from .command import Command, ProcessOptions
from .saved_models import saved_folder

if TYPE_CHECKING:
    from torch import Tensor

    from ..defences.base import Defence


@dataclass(frozen=True)
class Purify(ProcessOptions, Command):
    """Purify image files by the purifier of a saved defence, and write them as PNG files.

    The images must have the size of the images on which the defence was trained, and the same channels; a gray image
    may also have three. If the defence makes several purified images of an image, the first of them is written.

    Args:
        model: Defence whose purifier is used: a folder that a `train` command wrote, or zoo:NAME.
        source: Image to purify, such as a .png or .jpg file; or a folder, with all its subfolders.
        target: File to write, with the suffix .png; if SOURCE is a folder, a folder. A file that exists is replaced.
        batch_size: Number of images that are purified at once.
        seed: Seed of the purifier's random draws. All images get the same draws.
        device: Device to compute on: cpu, cuda, or another device of PyTorch. auto: a GPU if there is any.
    """

    called: ClassVar[str] = "purify"

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")] = Path("runs/carso")
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")] = Path("images")
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")] = Path("purified")
    batch_size: Count = 32
    seed: int = 0
    device: str = "auto"

    def run(self) -> None:
        import torch
        from PIL import Image

        files = self.files()
        defence = self.defence()
        several, waiting = 1, iter(files.items())
        with torch.inference_mode(), defence.fixed_noise(self.seed):
            while part := dict(islice(waiting, self.batch_size)):
                levels = torch.stack([of_shape(path, defence.image_shape) for path in part])
                images = levels.to(usable_device(self.device)).float() / 255
                purified = defence.purify(images)
                several = purified.shape[1]
                # Some diffusion processes do not clip their images.
                kept = (purified[:, 0].clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()
                for path, image in zip(part.values(), kept.numpy(), strict=True):
                    with atomic(path) as temporary:
                        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(temporary)
        first = f", the first of {several} purified images of each image" if several > 1 else ""
        print(f"written: {self.target} ({len(files)} image{'s' if len(files) > 1 else ''}{first})")

    def files(self) -> dict[Path, Path]:
        """The images to read, each with the file to write."""
        from ..data.folders import SUFFIXES, is_hidden

        if self.source.is_file():
            if self.target.suffix.lower() != ".png":
                raise ValueError(f"TARGET must be a .png file, because SOURCE is a file, got {self.target}")
            files = {self.source: self.target}
        else:
            shown = (path for path in self.source.rglob("*") if not is_hidden(path, self.source))
            images = sorted(path for path in shown if path.suffix.lower() in SUFFIXES)
            if not images:
                raise FileNotFoundError(f"SOURCE must be an image, or a folder of images, got {self.source}")
            files = {path: self.target / path.relative_to(self.source).with_suffix(".png") for path in images}
        written = [path.resolve() for path in files.values()]
        if len({*written, *(path.resolve() for path in files)}) < 2 * len(files):
            raise ValueError(f"each image needs its own file in TARGET, apart from SOURCE, got {self.target}")
        return files

    def defence(self) -> Defence:
        """Load the defence to the device."""
        from torch import nn

        from ..methods.loading import is_denoiser, load_defence
        from ..training import load_classifier

        folder = saved_folder(self.model)
        # Purification by a denoiser needs no classifier, so any module that returns logits will do.
        base = nn.Flatten() if is_denoiser(folder) else load_classifier(saved_folder(self.model, classifier=True))
        return load_defence(folder, base, process=self.process()).to(usable_device(self.device))


def of_shape(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """Decode an image, uint8 ``[C, H, W]``. Transparency and the orientation in the metadata of a photo are ignored."""
    from ..data import read_image

    image = read_image(path)
    image = image[:1] if shape[0] == 1 and (image == image[:1]).all() else image
    if image.shape != tuple(shape):
        got, wanted = ("x".join(map(str, sizes)) for sizes in (image.shape, shape))
        raise ValueError(f"{path} must be {wanted} (channels x height x width), as in the training, got {got}")
    return image

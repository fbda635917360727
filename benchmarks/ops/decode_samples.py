"""K samples of each of B images, by the paper's two decoders: a kernel on a GPU only, the layers serve elsewhere.

The others run the same folded layers in bfloat16 and channels_last, their weights unpacked once.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from purify_fast.methods.carso.networks import Decoder, PackedDecoder, published_decoder

from . import Case, normal

DEVICES = ("cuda",)
#: images, samples of each; side of the images
SHAPES = ((512, 8, 32), (8, 8, 32), (64, 8, 32), (2048, 8, 32), (256, 8, 64))
#: By the side: the preset, its condition and latent.
SIZES = {32: ("cifar10", 512, 128), 64: ("tiny_imagenet", 768, 192)}


class Decoding:
    """The call that is timed, and its inputs; the decoder is made where they are."""

    def __init__(self, batch: int, samples: int, side: int):
        self.batch, self.samples, self.side = batch, samples, side
        self.decoder: PackedDecoder | None = None

    def inputs(self) -> tuple[Tensor, ...]:
        _, condition, latent = SIZES[self.side]
        shape = (3, self.side, self.side)
        torch.manual_seed(0)
        self.decoder = PackedDecoder(Decoder(latent, condition, shape, *published_decoder(shape)).eval())
        return normal(self.batch, condition, dtype=torch.float32), torch.tensor([7]), torch.arange(self.batch)

    def __call__(self, condition: Tensor, seed: Tensor, ids: Tensor) -> Tensor:
        assert self.decoder is not None
        images = self.decoder(condition, seed, ids, self.samples, channels_last=True, dtype=torch.bfloat16)
        return images.flatten(0, 1)


def macs(side: int) -> tuple[int, int, int]:
    """Products of a sample and of a condition, weights."""
    _, condition, latent = SIZES[side]
    start, layers = published_decoder((3, side, side))
    first, weights = prod(start), latent * prod(start)
    total, (channels, h, w) = latent * first, start
    for layer in layers:
        size = channels * layer.channels * layer.kernel**2
        weights, total = weights + size, total + h * w * size
        channels, (h, w) = layer.channels, layer.size(h, w)
    return total, condition * first, weights


def case(batch: int, samples: int, side: int) -> Case:
    sample, image, weights = macs(side)
    pixels = 3 * side * side
    decoding = Decoding(batch, samples, side)
    return Case(
        (batch, samples, 3, side, side),
        torch.bfloat16,
        decoding.inputs,
        decoding,
        # bfloat16 images and weights; of the condition its half of the first map
        {
            "forward": f"2*{pixels}*B*K + 2*{weights} + {4 * image // SIZES[side][1]}*B",
            "backward": f"4*{pixels}*B*K + 4*{weights} + {8 * image // SIZES[side][1]}*B",
        },
        {"forward": f"2*{sample}*B*K + 2*{image}*B", "backward": f"4*{sample}*B*K + 2*{image}*B"},
        SIZES[side][0],
        differentiable=(0,),
        symbols={"B": batch, "K": samples},
    )


def cases() -> list[Case]:
    return [case(*shape) for shape in SHAPES]

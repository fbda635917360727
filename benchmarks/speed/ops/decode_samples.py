"""Cases of the op decode_samples: K samples of each of B images, by the two decoders of the CARSO paper.

Our implementation on a GPU is one kernel. The other implementations run the decoder's layers one by one, with BatchNorm
folded, in bfloat16 and channels_last. They unpack the weights once.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from purify_fast.methods.carso.networks import Decoder, published_decoder
from purify_fast.speed.decoding import PackedDecoder

from . import Case, normal

SHAPES = ((512, 8, 3, 32, 32), (8, 8, 3, 32, 32), (64, 8, 3, 32, 32), (2048, 8, 3, 32, 32), (256, 8, 3, 64, 64))
#: By the side of the images: a preset of the CARSO paper, and its widths of condition and latent.
SIZES = {32: ("cifar10", 512, 128), 64: ("tiny_imagenet", 768, 192)}


def case(shape: tuple[int, ...], dtype: torch.dtype, preset: str) -> Case:
    batch, samples, *_, side = shape
    _, width, latent = SIZES[side]
    image, decoders = (3, side, side), list[PackedDecoder]()
    start, layers = published_decoder(image)
    pixels, first, channels = prod(image), prod(start), start[0]
    weights = latent * first
    for layer in layers:
        weights += channels * layer.channels * layer.kernel**2
        channels = layer.channels

    def inputs() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        decoders[:] = [PackedDecoder(Decoder(latent, width, image, *published_decoder(image)).eval())]
        return normal(batch, width, dtype=torch.float32), torch.tensor([7]), torch.arange(batch)

    def call(condition: Tensor, seed: Tensor, ids: Tensor) -> Tensor:
        return decoders[0](condition, seed, ids, samples, channels_last=True, dtype=dtype).flatten(0, 1)

    return Case(
        inputs,
        call,
        # Two bytes per element of images and weights, and four per element of the condition's part of the first map.
        {
            "forward": f"2*{pixels}*B*K + 2*{weights} + {4 * first}*B",
            "backward": f"4*{pixels}*B*K + 4*{weights} + {8 * first}*B",
        },
        differentiable=(0,),
        symbols={"B": batch, "K": samples},
    )


def chosen(shapes: tuple) -> list[tuple]:
    return [(shape, torch.bfloat16, SIZES[shape[-1]][0]) for shape in shapes]

"""An estimate, layer by layer, of decode_samples on an H100, and of what cuDNN must do for it: nothing is measured.

Ours is counted as csrc/core/decoder_geometry.h cuts it: channels and columns are padded, and taps outside of a map are
multiplied as zeros. Its time is that of the loop over taps and channels, or of the maps that it leaves in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from purify_fast.methods.carso.networks import published_decoder

#: Samples; multiprocessors and cycles per second of an H100; FLOP of bfloat16 and bytes of memory per second.
SAMPLES, PROCESSORS, CLOCK, FLOPS, MEMORY = 4096, 132, 1.7e9, 989e12, 3.35e12
#: What mma.sync reaches of the matrix units' rate on Hopper, and what a good convolution of cuDNN does.
SYNC, CUDNN = 0.62, 0.6
#: What tl.dot would reach of it by wgmma.
DOT = 0.8
#: Products (m16n8k16, 4,096 FLOP) of one trip of the inner loop, and its instructions in the machine code for sm_90,
#: with the search for the next tap's pixels, which is not needed in every trip: of maps, and of the image.
MAP_STEP, IMAGE_STEP = (64, 325), (16, 226)


@dataclass(frozen=True)
class Layer:
    """One transposed convolution.

    Attributes:
        name: for the table.
        flops: multiplications and additions of one sample that reach a pixel of the map.
        padded: those that our kernel makes.
        bytes_in: of the map that is read, bfloat16, of one sample; 0 for the latents, which are drawn.
        bytes_out: of the map that is written.
        image: whether it is the last.
    """

    name: str
    flops: int
    padded: int
    bytes_in: int
    bytes_out: int
    image: bool


def _pairs(size: int, out: int, kernel: int, stride: int, padding: int) -> int:
    """Outputs and taps along an axis that meet a pixel of the input."""
    return sum(0 <= stride * i + k - padding < out for i in range(size) for k in range(kernel))


def _taps(out: int, kernel: int, stride: int, padding: int) -> int:
    """Outputs and taps along an axis that our kernel multiplies: all taps of each output's residue."""
    return sum(len(range((y + padding) % stride, kernel, stride)) for y in range(out))


def layers() -> list[Layer]:
    """Those of the published decoder for CIFAR-10, the linear layer first."""
    (channels, h, w), plan = published_decoder((3, 32, 32))
    flops, size = 2 * 128 * channels * h * w, 2 * channels * h * w
    found = [Layer(f"linear, 128 to {channels} x {h} x {w}", flops, flops, 0, size, False)]
    for index, one in enumerate(plan):
        (out_h, out_w), image = one.size(h, w), index + 1 == len(plan)
        columns = -(-one.channels // (8 if image else 32)) * (8 if image else 32)
        axes = [(h, out_h), (w, out_w)]
        useful = [_pairs(a, b, one.kernel, one.stride, one.padding) for a, b in axes]
        padded = [_taps(b, one.kernel, one.stride, one.padding) for _, b in axes]
        found.append(
            Layer(
                f"{channels} to {one.channels} x {out_h} x {out_w}",
                2 * channels * one.channels * useful[0] * useful[1],
                2 * -(-channels // 32) * 32 * columns * padded[0] * padded[1],
                2 * channels * h * w,
                2 * one.channels * out_h * out_w,
                image,
            )
        )
        channels, h, w = one.channels, out_h, out_w
    return found


def seconds(layer: Layer) -> tuple[float, float]:
    """Ours and cuDNN's for `SAMPLES`: what takes longer, products and their instructions or bytes."""
    products, issued = IMAGE_STEP if layer.image else MAP_STEP
    cycles = max(products / SYNC, issued / 4) / products  # of a multiprocessor, for one product
    bytes_moved = SAMPLES * (layer.bytes_in + layer.bytes_out)
    ours = SAMPLES * layer.padded / 4096 * cycles / PROCESSORS / CLOCK
    again = 0 if layer.image else 2 * SAMPLES * layer.bytes_out  # bias and LeakyReLU in a pass of their own
    theirs = max(SAMPLES * layer.flops / CUDNN / FLOPS, bytes_moved / MEMORY) + again / MEMORY
    return max(ours, bytes_moved / MEMORY), theirs


def by_dot() -> float:
    """The seconds of a form of our kernel in Triton, by tl.dot, whose last two layers are one launch."""
    *first, wide, image = layers()
    moved = [layer.bytes_in + layer.bytes_out for layer in first] + [wide.bytes_in + image.bytes_out]
    flops = [layer.flops for layer in first] + [wide.flops + image.padded]
    return sum(max(SAMPLES * f / DOT / FLOPS, SAMPLES * b / MEMORY) for f, b in zip(flops, moved, strict=True))


def chapter() -> list[str]:
    """The lines of docs/performance.md."""
    lines = [
        "",
        f"### decode_samples, layer by layer: an estimate for {SAMPLES:,} samples of CIFAR-10",
        "",
        "**An estimate, not a measurement**, by `benchmarks/decoder.py`. Ours: the inner loop's machine code for sm_90 "
        f"({MAP_STEP[1]} instructions for {MAP_STEP[0]} products at most, {IMAGE_STEP[1]} for {IMAGE_STEP[0]} in the "
        f"last layer), mma.sync at {SYNC:.0%} of the matrix units' rate, every map to memory and back; items that are "
        "not full and the epilogue are left out, so that it is a lower bound. cuDNN: the FLOP that reach a pixel at "
        f"{CUDNN:.0%} of 989 TFLOP/s, its maps at 3.35 TB/s, one more pass for bias and LeakyReLU.",
        "",
        "| layer | GFLOP that reach a pixel | GFLOP ours computes | MB read and written | ours, us | cuDNN, us |",
        "|---|---|---|---|---|---|",
    ]
    total = [0.0, 0.0]
    for layer in layers():
        times = seconds(layer)
        total = [a + b for a, b in zip(total, times, strict=True)]
        moved = SAMPLES * (layer.bytes_in + layer.bytes_out)
        lines.append(
            f"| {layer.name} | {SAMPLES * layer.flops / 1e9:,.1f} | {SAMPLES * layer.padded / 1e9:,.1f} "
            f"| {moved / 1e6:,.1f} | {times[0] * 1e6:,.0f} | {times[1] * 1e6:,.0f} |"
        )
    lines.append(f"| together | | | | {total[0] * 1e6:,.0f} | {total[1] * 1e6:,.0f} |")
    lines += [
        "",
        f"By the same count a form in Triton, by tl.dot at {DOT:.0%} of the rate and with the last two layers in one "
        f"launch, would take {by_dot() * 1e6:,.0f} us: less. It is not built, and the CUDA kernel serves.",
    ]
    return lines

"""An estimate, layer by layer, of decode_samples on an H100, and of what cuDNN must do for it: nothing is measured.

Ours is counted as kernels/decode_samples.py launches it: from its programs, the trips of their loops, the machine code
of sm_90, and what they read and write. tests/aot holds that the code has the instructions that are named here.
"""

from __future__ import annotations

from dataclasses import dataclass

from purify_fast.methods.carso.networks import published_decoder

from . import report

#: Samples; multiprocessors and cycles per second of an H100; FLOP of bfloat16 and bytes of memory per second.
SAMPLES, PROCESSORS, CLOCK, FLOPS, MEMORY = 4096, 132, 1.7e9, 989e12, 3.35e12
#: The share of the matrix units' rate that good products by wgmma reach, and a good convolution of cuDNN.
DOT, CUDNN = 0.8, 0.6
#: Bytes that a multiprocessor takes from the L2 cache in a cycle, at most, and instructions of warps that it issues.
CACHE, ISSUED = 64, 4
#: By columns of the input and of the tile: instructions of a warp in one trip of the loop, and in all the rest.
COUNTED = {(128, 128): (93, 916), (256, 128): (113, 1264), (128, 64): (162, 1173)}
#: The last two layers in one launch: all instructions of a warp, whose loop is unrolled.
COUNTED_TOGETHER = 3369
#: What the estimate was for the form before, in CUDA C++ by mma.sync, in microseconds: for the same layers.
BEFORE = (6, 46, 80, 74, 130 + 93)


@dataclass(frozen=True)
class Layer:
    """One launch.

    Attributes:
        name: for the table.
        flops: multiplications and additions of all samples that reach a pixel of the map.
        multiplied: those that the launch makes: rows and columns that fill no tile, and taps that meet no pixel, too.
        moved: bytes of memory, read and written.
        cached: bytes that its programs read from the L2 cache.
        issued: instructions of warps.
        theirs: the seconds of cuDNN.
    """

    name: str
    flops: float
    multiplied: float
    moved: float
    cached: float
    issued: float
    theirs: float

    def seconds(self) -> float:
        """What takes longest: products, instructions, bytes of memory, or bytes of the L2 cache."""
        cycles = max(self.cached / CACHE, self.issued / ISSUED) / PROCESSORS
        return max(self.multiplied / DOT / FLOPS, self.moved / MEMORY, cycles / CLOCK)


def _pairs(size: int, out: int, kernel: int, stride: int, padding: int) -> int:
    """Outputs and taps along an axis that meet a pixel of the input."""
    return sum(0 <= stride * i + k - padding < out for i in range(size) for k in range(kernel))


def _residues(out: int, kernel: int, stride: int, padding: int) -> list[tuple[int, int]]:
    """Outputs of each residue along an axis, and their taps."""
    return [
        (sum((y + padding) % stride == residue for y in range(out)), len(range(residue, kernel, stride)))
        for residue in range(stride)
    ]


def _theirs(flops: float, moved: float, written: float) -> float:
    """cuDNN's seconds: a pass of its own for bias and LeakyReLU, unless nothing is written again."""
    return max(flops / CUDNN / FLOPS, moved / MEMORY) + 2 * written / MEMORY


def _launch(name: str, flops: float, moved: tuple[float, float], channels: int, columns: int, classes: list) -> Layer:
    """A launch of `_layer`: 128 rows and up to 128 columns for a program, 64 channels for a trip of its loop."""
    tile, trips, programs = min(128, columns), 0, 0
    for pixels, taps in classes:
        of_class = -(-SAMPLES * pixels // 128) * (columns // tile)
        programs, trips = programs + of_class, trips + of_class * taps * (channels // 64)
    loop, rest = COUNTED[channels, tile]
    return Layer(
        name,
        flops,
        trips * 2 * 128 * tile * 64,
        sum(moved),
        trips * 2 * 64 * (128 + tile) + programs * 2 * 128 * tile,
        (trips * loop + programs * rest) * (8 if tile == 128 else 4),
        _theirs(flops, sum(moved), moved[1]),
    )


def _last_two(wide, image, before: tuple[int, int, int]) -> Layer:
    """The launch of the last two layers: 256 cells of 2 x 2 pixels for a program, of which it gives 220."""
    channels, h, w = before
    (mid, _), (out, _) = wide.size(h, w), image.size(*wide.size(h, w))
    cells = -(-max(mid, out) // wide.stride)
    rows, reach = 256, (wide.stride - 1 + image.padding) // wide.stride
    programs = -(-SAMPLES * cells * cells // (rows - reach * (cells + 1)))
    columns, offsets = wide.stride**2 * wide.channels, (1 + reach) ** 2
    flops = 2 * SAMPLES * channels * wide.channels * _pairs(h, mid, wide.kernel, wide.stride, wide.padding) ** 2
    last = 2 * SAMPLES * wide.channels * image.channels * _pairs(mid, out, image.kernel, 1, image.padding) ** 2
    read, kept = 2 * SAMPLES * channels * h * w, 2 * SAMPLES * wide.channels * mid * mid
    written = 2 * SAMPLES * image.channels * out * out
    return Layer(
        f"{channels} to {wide.channels} x {mid} x {mid}, to {image.channels} x {out} x {out}",
        flops + last,
        programs * 2 * rows * columns * (offsets * channels + offsets * 16),
        read + written,
        programs * 2 * offsets * (channels * (rows + columns) + 16 * columns),
        programs * COUNTED_TOGETHER * 8,
        _theirs(flops, read + kept, kept) + _theirs(last, kept + written, 0),
    )


def layers() -> list[Layer]:
    """The launches for the published decoder for CIFAR-10, the linear layer first."""
    (channels, h, w), plan = published_decoder((3, 32, 32))
    flops, size = 2.0 * SAMPLES * 128 * channels * h * w, 2.0 * SAMPLES * channels * h * w
    latents = 2.0 * SAMPLES * 128
    name = f"linear, 128 to {channels} x {h} x {w}"
    # positional because these are sizes in the order of the function
    found = [_launch(name, flops, (latents, size), 128, channels, [(1, 1)] * (h * w))]
    for one in plan[:-2]:
        out_h, out_w = one.size(h, w)
        useful = _pairs(h, out_h, one.kernel, one.stride, one.padding)
        useful *= _pairs(w, out_w, one.kernel, one.stride, one.padding)
        rows, columns = (_residues(out, one.kernel, one.stride, one.padding) for out in (out_h, out_w))
        moved = 2.0 * SAMPLES * channels * h * w, 2.0 * SAMPLES * one.channels * out_h * out_w
        classes = [(a * b, c * d) for a, c in rows for b, d in columns]
        name, flops = f"{channels} to {one.channels} x {out_h} x {out_w}", 2.0 * SAMPLES * channels * one.channels
        # positional because these are sizes in the order of the function
        found.append(_launch(name, flops * useful, moved, channels, one.channels, classes))
        channels, h, w = one.channels, out_h, out_w
    return [*found, _last_two(plan[-2], plan[-1], (channels, h, w))]


def table() -> list[str]:
    """The estimate of every launch and of all together, for docs/performance.md."""
    total = [0.0, 0.0]
    body = []
    for layer, before in zip(layers(), BEFORE, strict=True):
        times = layer.seconds(), layer.theirs
        total = [a + b for a, b in zip(total, times, strict=True)]
        work = (layer.flops / 1e9, layer.multiplied / 1e9, layer.moved / 1e6, layer.cached / 1e6, layer.issued / 1e6)
        body.append([layer.name, *(f"{one:,.1f}" for one in work), before, *(f"{1e6 * one:,.0f}" for one in times)])
    body.append(["together", *5 * [""], sum(BEFORE), *(f"{1e6 * one:,.0f}" for one in total)])
    work = ["GFLOP that reach a pixel", "GFLOP ours computes", "MB read and written", "MB from L2"]
    times = ["before, us", "ours, us", "cuDNN, us"]
    return report.table(["layer", *work, "million instructions of warps", *times], body)

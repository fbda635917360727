"""Small inputs of every registered op, as its kernel takes them: what kernels are verified and tested with.

To add an op: write a generator here under its name. ``python -m benchmarks.every_op`` runs every op once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from ._op import REGISTRY
from .aggregate import METHODS
from .apgd_step import NORMS as APGD_NORMS
from .convolution import kind as convolution_kind
from .convolution import output_side
from .decode_samples import Geometry, pack
from .pgd_step import NORMS
from .philox import DISTRIBUTIONS, Stream
from .representation_distance import KINDS

HALVES = (torch.bfloat16, torch.float16)
NHWC = torch.channels_last
ROWS = 3  # samples of an example, so that its batch dimensions can be told from others


@dataclass(frozen=True)
class Example:
    """One set of shapes and settings of one op.

    Attributes:
        make: the kernel's arguments on the CPU, of a dtype and a seed: the same shapes and settings for every seed.
        exact: every backend has the reference's bits.
        slack: error allowed beside rounding, in float32's eps of the largest output: normals differ by a few ulp.
        variant: the setting by which the op's server is chosen, if there is one.
        summed: results are sums over the samples.
        jumps: rounding decides on which side of zero some numbers are, and the result jumps there, so that no bound of
            a single number's error holds. Errors are then root mean squares, and a tenth of the result's is allowed.
    """

    name: str
    make: Callable[[torch.dtype, int], tuple]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALVES)
    exact: bool = False
    slack: float = 0.0
    variant: str = ""
    summed: bool = False
    jumps: bool = False


def tensors(value) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def to(arguments: tuple, device: torch.device) -> tuple:
    def one(tensor: Tensor) -> Tensor:
        moved = tensor.to(device)
        return Parameter(moved, False) if isinstance(tensor, Parameter) else moved

    return tree_map_only(Tensor, one, arguments)


def double(arguments: tuple) -> tuple:
    """The same in float64, settings that are dtypes too."""
    made = tree_map_only(Tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, arguments)
    return tuple(torch.float64 if isinstance(one, torch.dtype) else one for one in made)


def batch_dimension(tensor: Tensor) -> int | None:
    """Which dimension holds the samples, or their passes; None for seeds and settings, and for weights: parameters."""
    if tensor.numel() <= 1 or isinstance(tensor, Parameter):
        return None
    return 0 if tensor.shape[0] % ROWS == 0 else 1  # owners: [draws, samples, ...]


def tile(arguments, times: int):
    """The samples of an example, ``times`` over."""

    def one(tensor: Tensor) -> Tensor:
        dimension = batch_dimension(tensor)
        if dimension is None:
            return tensor
        tiled = tensor.repeat(*(times if d == dimension else 1 for d in range(tensor.dim())))
        last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=NHWC) and not tensor.is_contiguous()
        return tiled.contiguous(memory_format=NHWC) if last else tiled

    return tree_map_only(Tensor, one, arguments)


def _normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def _uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _stream(seed: int) -> tuple[Tensor, Tensor]:
    """A seed beyond 32 bits, and ids among which are a negative one and one beyond 32 bits."""
    return torch.tensor([0x0123456789ABCDEF + seed]), torch.tensor([7, -1, 2**40 + 3])


def _name(shape: tuple[int, ...], *words: object) -> str:
    return " ".join(map(str, filter(None, (*words, "x".join(map(str, shape))))))


def philox(sizes: tuple[int, ...] = (130, 1024)) -> Iterator[Example]:
    for index, distribution in enumerate(DISTRIBUTIONS):
        for numel in sizes:

            def make(dtype: torch.dtype, seed: int, index=index, numel=numel) -> tuple:
                return *_stream(seed), numel, int(Stream.LATENT), index, 3, 2**32 - 2  # draws that wrap

            normal = distribution == "normal"
            yield Example(
                _name((ROWS, 3, numel), distribution),
                make,
                (torch.float32,),
                exact=not normal,
                slack=16.0 if normal else 0.0,
            )


#: Few classes; more than a vector holds, in numbers that fill no whole one; and logits for which peel is continued by a
#: tangent. The last number is the logits' standard deviation.
AGGREGATED = (
    *((method, (ROWS, 8, 10), 3.0) for method in METHODS),
    *((method, (ROWS, 5, classes), 3.0) for method in ("lse", "mean") for classes in (37, 101)),
    ("peel", (ROWS, 64, 7), 3.0),
    ("peel", (ROWS, 8, 12), 60.0),
)
#: Where the tangent's slope, exp(70), is a number.
_WIDE_RANGE = (torch.float32, torch.bfloat16)


def _aggregated(method: str, shape: tuple[int, ...], scale: float, make: Callable) -> Example:
    """An example of `aggregate` or of its gradient; a GPU's exponentials and divisions differ by a few ulp."""
    words, dtypes = (f"scale {scale:g}", _WIDE_RANGE) if scale > 3 else ("", Example.dtypes)
    voted = method == "vote"
    return Example(_name(shape, method, words), make, dtypes, exact=voted, slack=0.0 if voted else 16.0, variant=method)


def aggregate(settings=AGGREGATED) -> Iterator[Example]:
    for method, shape, scale in settings:

        def make(dtype: torch.dtype, seed: int, method=method, shape=shape, scale=scale) -> tuple:
            return _normal(seed, *shape, scale=scale).to(dtype), METHODS.index(method)

        yield _aggregated(method, shape, scale, make)


def aggregate_backward(settings=AGGREGATED) -> Iterator[Example]:
    for method, shape, scale in settings:

        def make(dtype: torch.dtype, seed: int, method=method, shape=shape, scale=scale) -> tuple:
            grad = _normal(seed + 100, shape[0], shape[2]).to(_wide(dtype))
            return grad, _normal(seed, *shape, scale=scale).to(dtype), METHODS.index(method)

        yield _aggregated(method, shape, scale, make)


LATENTS = ((ROWS, 64), (ROWS, 37), (ROWS, 2500))


def _latent(dtype: torch.dtype, seed: int, shape: tuple[int, ...]) -> tuple:
    return _normal(seed, *shape).to(dtype), _normal(seed + 100, *shape).to(dtype), *_stream(seed)


def sample_latent(shapes=LATENTS) -> Iterator[Example]:
    for shape in shapes:
        yield Example(_name(shape), partial(_latent, shape=shape), slack=16.0)


def sample_latent_backward(shapes=LATENTS) -> Iterator[Example]:
    for shape in shapes:

        def make(dtype: torch.dtype, seed: int, shape=shape) -> tuple:
            grads = _normal(seed + 200, *shape).to(dtype), _normal(seed + 300, shape[0]).to(_wide(dtype))
            return *grads, *_latent(dtype, seed, shape)

        yield Example(_name(shape), make, slack=16.0)


#: The last ones have more numbers than one program of the norms' steps and of the losses takes.
IMAGES = ((ROWS, 1, 16, 16), (ROWS, 3, 33, 31), (ROWS, 5001), (ROWS, 16400))


def _reconstruction(dtype: torch.dtype, seed: int, shape: tuple[int, ...]) -> tuple:
    return _normal(seed, *shape, scale=3.0).to(dtype), _uniform(seed + 100, *shape).to(dtype)


def reconstruction_loss(shapes=IMAGES) -> Iterator[Example]:
    for shape in shapes:
        yield Example(_name(shape), partial(_reconstruction, shape=shape))


def reconstruction_loss_backward(shapes=IMAGES) -> Iterator[Example]:
    for shape in shapes:

        def make(dtype: torch.dtype, seed: int, shape=shape) -> tuple:
            return _normal(seed + 200, shape[0]).to(_wide(dtype)), *_reconstruction(dtype, seed, shape)

        yield Example(_name(shape), make)


def _step(last: bool, momentum: bool, shapes) -> Iterator[Example]:
    """A gradient with zeros, and images a little outside the ball, so that every branch is taken."""
    for norm, name in enumerate(APGD_NORMS if momentum else NORMS):
        for shape in shapes:
            if last and len(shape) != 4:
                continue

            def make(dtype: torch.dtype, seed: int, shape=shape, norm=norm) -> tuple:
                clean, grad = _uniform(seed, *shape), _normal(seed + 100, *shape)
                grad[_uniform(seed + 200, *shape) < 0.1] = 0
                images = [(clean + 0.2 * (_uniform(seed + i, *shape) - 0.5)).clamp(0, 1) for i in (300, 400)]
                given = [images[0], grad, clean] + ([images[1]] if momentum else [])
                given = [x.to(dtype).contiguous(memory_format=NHWC) if last else x.to(dtype) for x in given]
                radii = [torch.linspace(low, high, ROWS).to(_wide(dtype)) for low, high in ((0.01, 0.4), (0.02, 1.0))]
                return *given, *radii, *([0.75] if momentum else []), norm, 0.1, 0.9, *([] if momentum else [0.05])

            yield Example(_name(shape, name, "channels_last" if last else ""), make, exact=norm == 0, variant=name)


def pgd_step(shapes=IMAGES) -> Iterator[Example]:
    yield from _step(False, False, shapes)
    yield from _step(True, False, shapes)


def apgd_step(shapes=IMAGES) -> Iterator[Example]:
    yield from _step(False, True, shapes)
    yield from _step(True, True, shapes)


#: Shape, proposals, edge of the windows; the last have more pixels than one program of l2 or l1 sees at once.
PROPOSED = (((ROWS, 3, 32, 32), 1, 7), ((ROWS, 1, 16, 16), 3, 5), ((ROWS, 2, 9, 15), 2, 3), ((ROWS, 3, 48, 40), 1, 15))


def square_proposal(settings=PROPOSED) -> Iterator[Example]:
    """Points well inside their balls, and one outside: near the border, rounding decides what the ball has left."""
    for norm, name in enumerate(NORMS):
        for shape, draws, edge in settings:

            def make(dtype: torch.dtype, seed: int, shape=shape, norm=norm, draws=draws, edge=edge) -> tuple:
                clean, offset = 0.25 + 0.5 * _uniform(seed, *shape), 0.2 * (_uniform(seed + 100, *shape) - 0.5)
                power = (math.inf, 2, 1)[norm]
                radius = offset.flatten(1).norm(p=power, dim=1) * torch.tensor([1.5, 0.7, 2.0])
                pattern = _normal(seed + 300, 2, edge, edge)
                pattern = pattern / pattern.norm(p=power, dim=(1, 2), keepdim=True)
                given = (clean + offset).to(dtype), clean.to(dtype), radius.to(_wide(dtype))
                numbers = _uniform(seed + 200, shape[0], draws, 5 + shape[1]).float()
                # a parameter, since `tile` repeats what is none
                shapes = Parameter(pattern.float(), False) if norm else None
                return *given, numbers, shapes, edge, norm, 0.1, 0.9

            yield Example(_name(shape, name, f"{draws} proposals", f"edge {edge}"), make, exact=norm == 0, variant=name)


def hyperplane_projection(shapes=IMAGES) -> Iterator[Example]:
    """Planes nearby, further away and out of reach; a normal with zeros and what is no number."""
    for norm, name in enumerate(NORMS):
        for shape in shapes:

            def make(dtype: torch.dtype, seed: int, shape=shape, norm=norm) -> tuple:
                x, w = _uniform(seed, *shape).to(dtype), _normal(seed + 100, *shape)
                w[_uniform(seed + 200, *shape) < 0.1] = 0
                w[1].view(-1)[:2] = torch.tensor([math.nan, math.inf])
                w, wide = w.to(dtype), w.nan_to_num(posinf=0.0).to(dtype).double()
                size = wide.abs().flatten(1).sum(1)
                offset = (wide * x.double()).flatten(1).sum(1) + torch.tensor([0.02, -0.3, 2.0]) * size
                return x, w, offset.to(_wide(dtype)), norm, 0.0, 1.0

            # The sum over a row that is the distance to its plane is rounded, in another order otherwise. In l1 one
            # coordinate takes all of it.
            yield Example(_name(shape, name), make, slack=2.0**14 if name == "l1" else 256.0, variant=name)


#: shape, block, num_passes (0: RT1 and RT2), sigma, draws; planes that are no multiple of 4 among them
TRANSFORMS = (
    ((ROWS, 3, 32, 32), 4, 0, 0.25, 1),
    ((ROWS, 2, 9, 15), 3, 5, 0.25, 1),
    ((ROWS, 3, 12, 20), 4, 5, 0.25, 2),
    ((ROWS, 1, 16, 16), 4, 0, 0.0, 2),
    ((ROWS, 1, 16, 24), 8, 3, 0.25, 1),
)


def random_transform(settings=TRANSFORMS) -> Iterator[Example]:
    for shape, block, num_passes, sigma, draws in settings:
        for last in (False, True):

            def make(dtype: torch.dtype, seed: int, shape=shape, block=block, num_passes=num_passes, sigma=sigma,
                     draws=draws, last=last) -> tuple:  # fmt: skip
                x = _uniform(seed, *shape).to(dtype).contiguous(memory_format=NHWC if last else torch.contiguous_format)
                masked_blocks = (shape[2] // block) * (shape[3] // block) // 3
                return x, *_stream(seed), sigma, block, masked_blocks, num_passes, draws, False, dtype, last

            words = (
                f"block {block}",
                f"{num_passes} passes",
                f"{draws} draws",
                f"noise {sigma:g}",
                "channels_last" if last else "",
            )
            yield Example(_name(shape, *words), make, exact=sigma == 0, slack=16.0 if sigma else 0.0)


def random_transform_backward(settings=TRANSFORMS) -> Iterator[Example]:
    for forward in random_transform(settings):

        def make(dtype: torch.dtype, seed: int, forward=forward) -> tuple:
            x, key, ids, sigma, _, _, num_passes, *_ = given = forward.make(dtype, seed)
            packed, owners = REGISTRY["random_transform"].reference(*given)
            grad = torch.empty_like(packed).copy_(_normal(seed + 100, *packed.shape))  # in its layout
            return grad, x, owners, key, ids, sigma, num_passes

        yield Example(forward.name, make)


#: shape, blocks, passes
STITCHED = (((ROWS, 3, 32, 32), (4, 4), 4), ((ROWS, 2, 9, 15), (3, 5), 3))


def _stitched(backward: bool, settings) -> Iterator[Example]:
    for shape, grid, passes in settings:
        for last in (False, True):

            def make(dtype: torch.dtype, seed: int, shape=shape, grid=grid, passes=passes, last=last) -> tuple:
                images = _normal(seed, shape[0] * (1 if backward else passes), *shape[1:]).to(dtype)
                images = images.contiguous(memory_format=NHWC) if last else images
                owners = torch.randint(passes, (1, shape[0], *grid), generator=torch.Generator().manual_seed(seed))
                return images, owners.to(torch.uint8), passes

            yield Example(_name(shape, f"{passes} passes", "channels_last" if last else ""), make, exact=True)


def stitch(settings=STITCHED) -> Iterator[Example]:
    yield from _stitched(False, settings)


def stitch_backward(settings=STITCHED) -> Iterator[Example]:
    yield from _stitched(True, settings)


#: features and the dimension of their halves: rows of channels_last are the last dimension
GATED = (((ROWS, 6, 17, 15), 1), ((ROWS, 8, 8, 48), 3), ((ROWS, 2050), 1), ((ROWS, 5, 7, 14), 3))


def _features(dtype: torch.dtype, seed: int, shape: tuple[int, ...]) -> Tensor:
    return _normal(seed, *shape, scale=2.0).to(dtype)


def gated_elu(settings=GATED) -> Iterator[Example]:
    for shape, dim in settings:

        def make(dtype: torch.dtype, seed: int, shape=shape, dim=dim) -> tuple:
            return _features(dtype, seed, shape), dim

        yield Example(_name(shape, f"dim {dim}"), make, slack=16.0)


def gated_elu_backward(settings=GATED) -> Iterator[Example]:
    for shape, dim in settings:

        def make(dtype: torch.dtype, seed: int, shape=shape, dim=dim) -> tuple:
            half = [size // 2 if i == dim else size for i, size in enumerate(shape)]
            return _normal(seed + 100, *half).to(dtype), _features(dtype, seed, shape), dim

        yield Example(_name(shape, f"dim {dim}"), make, slack=16.0)


#: height and width of the grid of keys; channels
ATTENDED = ((8, 8, 6), (4, 7, 3), (9, 3, 5))


def _attended(dtype: torch.dtype, seed: int, height: int, width: int, channels: int) -> tuple:
    pixels = _normal(seed, ROWS, height * width, channels, scale=0.4)
    norms = pixels.square().sum(2).clamp_min(1e-4).rsqrt()  # any will do
    keep = (_uniform(seed + 100, ROWS, height * width) > 0.3).to(dtype)
    inner = _wide(dtype)  # between the products everything else is float32
    return (pixels @ pixels.mT).to(inner), norms.to(inner), keep, height, width, 1.0


def contextual_attention(sizes=ATTENDED) -> Iterator[Example]:
    for size in sizes:

        def make(dtype: torch.dtype, seed: int, size=size) -> tuple:
            return _attended(dtype, seed, *size)

        yield Example(_name(size), make)


def contextual_attention_backward(sizes=ATTENDED) -> Iterator[Example]:
    for size in sizes:

        def make(dtype: torch.dtype, seed: int, size=size) -> tuple:
            given = _attended(dtype, seed, *size)
            spread, weights = REGISTRY["contextual_attention"].reference(*given)
            grad = _normal(seed + 200, *spread.shape).to(dtype)
            return grad, *given[:2], weights, *given[3:]

        yield Example(_name(size), make, slack=32.0)  # sums of numbers of the largest output's size


#: layers of one call; the last has more numbers than one program takes
LAYERS = (((2, 5, 7),), ((64, 8, 8), (130,), (4, 1025)), ((9001,), (3,)))


def _layers(dtype: torch.dtype, seed: int, shapes: tuple) -> tuple[list[Tensor], list[Tensor]]:
    teacher = [_normal(seed + i, ROWS, *shape) for i, shape in enumerate(shapes)]
    student = [v + 0.5 * _normal(seed + 100 + i, *v.shape) for i, v in enumerate(teacher)]
    return [u.to(dtype) for u in student], [v.to(dtype) for v in teacher]


def representation_distance(layers=LAYERS, kinds=KINDS) -> Iterator[Example]:
    for kind, name in ((KINDS.index(name), name) for name in kinds):
        # a kernel's sums in another order err by ulps of the cosine, which is ten times as large as the distance
        slack = 0.0 if name == "l2" else 32.0
        for shapes in layers:

            def make(dtype: torch.dtype, seed: int, kind=kind, shapes=shapes) -> tuple:
                return *_layers(dtype, seed, shapes), kind

            several = "several" if len(shapes) > 1 else ""
            yield Example(f"{name} {len(shapes)} layers", make, slack=slack, variant=several)


def representation_distance_backward(layers=LAYERS, kinds=KINDS) -> Iterator[Example]:
    for kind, name in ((KINDS.index(name), name) for name in kinds):
        for shapes in layers:

            def make(dtype: torch.dtype, seed: int, kind=kind, shapes=shapes) -> tuple:
                student, teacher = _layers(dtype, seed, shapes)
                distance, slopes = REGISTRY["representation_distance"].reference(student, teacher, kind)
                return _normal(seed + 200, *distance.shape).to(distance.dtype), student, teacher, slopes

            yield Example(f"{name} {len(shapes)} layers", make, variant="several" if len(shapes) > 1 else "")


def noisy_replay(shapes=IMAGES) -> Iterator[Example]:
    for shape in shapes:

        def make(dtype: torch.dtype, seed: int, shape=shape) -> tuple:
            wide = _wide(dtype)
            x, adversarial = (_uniform(seed + i, *shape).to(dtype) for i in (0, 100))
            drift = torch.tensor([0.9, 0.1, 0.6], dtype=wide)
            radius = torch.full((ROWS,), 8 / 255, dtype=wide)
            return x, adversarial, drift, torch.tensor(0.5, dtype=wide), radius, *_stream(seed), 0.0, 1.0

        yield Example(_name(shape), make, exact=True)


#: First map, the convolutions (channels, kernel, stride, padding, height, width), samples, and the weights' dtype. In
#: the first two every product is tiled; the last two layers of the third are one launch.
DECODED = (
    (Geometry.of([12, 40, 3, 3, *(70, 3, 2, 1, 5, 6), *(3, 2, 1, 1, 4, 5)]), 3, torch.bfloat16),
    (Geometry.of([33, 96, 1, 2, *(5, 4, 2, 1, 2, 4)]), 5, torch.bfloat16),
    (Geometry.of([12, 40, 3, 3, *(24, 4, 2, 1, 6, 6), *(3, 3, 1, 1, 6, 6)]), 2, torch.bfloat16),
    (Geometry.of([12, 40, 3, 3, *(3, 4, 2, 1, 6, 6)]), 2, torch.float32),
)


def _decoded(seed: int, sizes: Geometry, samples: int, weight_dtype: torch.dtype, squash: bool) -> tuple:
    weights, biases, channels = [], [], sizes.start[0]
    for i, layer in enumerate(sizes.layers):
        shape = channels, layer.channels, layer.kernel, layer.kernel
        weights.append(_normal(seed + i, *shape, scale=(channels * layer.kernel) ** -0.5))
        biases.append(_normal(seed + 10 + i, layer.channels))
        channels = layer.channels
    first = _normal(seed + 20, *sizes.start, sizes.latent_dim, scale=sizes.latent_dim**-0.5)
    packed, shifts = pack(first, weights, biases)
    condition = _normal(seed + 30, ROWS, math.prod(sizes.start)).float()
    # parameters, since `tile` repeats what is none of them
    kept = Parameter(packed.to(weight_dtype), False), Parameter(shifts.float(), False)
    return condition, *_stream(seed), *kept, sizes.numbers(), samples, 0.2, squash


def decode_samples(settings=DECODED) -> Iterator[Example]:
    for sizes, samples, weight_dtype in settings:
        for squash, last in ((True, False), (False, True)):
            given = partial(_decoded, sizes=sizes, samples=samples, weight_dtype=weight_dtype, squash=squash)

            def make(dtype: torch.dtype, seed: int, given=given, last=last) -> tuple:
                return *given(seed), last, dtype

            words = _decoded_words(sizes, samples, weight_dtype, squash)
            name = _name(sizes.start, *words, "channels_last" if last else "")
            yield Example(name, make, (torch.float32, torch.bfloat16))


def _decoded_words(sizes: Geometry, samples: int, weight_dtype: torch.dtype, squash: bool) -> tuple[str, ...]:
    """What names an example of the decoder, beside its first map."""
    words = f"K {samples}", f"{len(sizes.layers)} layers", "float32" if weight_dtype == torch.float32 else ""
    return *words, "squashed" if squash else ""


def decode_samples_backward(settings=DECODED) -> Iterator[Example]:
    for sizes, samples, weight_dtype in settings:
        for squash in (True, False):
            given = partial(_decoded, sizes=sizes, samples=samples, weight_dtype=weight_dtype, squash=squash)

            def make(dtype: torch.dtype, seed: int, given=given) -> tuple:
                arguments = given(seed)
                image = REGISTRY["decode_samples"].reference(*arguments, False, dtype)
                return _normal(seed + 40, *image.shape).to(dtype), image, *arguments

            name = _name(sizes.start, *_decoded_words(sizes, samples, weight_dtype, squash))
            # the slope of a LeakyReLU is that of its input's sign
            yield Example(name, make, (torch.float32, torch.bfloat16), jumps=weight_dtype == torch.bfloat16)


#: The settings of the next list whose kernel works by tiles, with Winograd's algorithm.
_TILED = (
    ((ROWS, 17, 16, 40), 48, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((ROWS, 18, 23, 32), 40, (3, 3), (1, 1), (2, 0), (2, 1)),
)
#: The shape of the images with channels last, output channels, then kernel, stride, padding and dilation, each of rows
#: and of columns.
CONVOLVED = (
    ((ROWS, 9, 8, 24), 24, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((ROWS, 7, 10, 3), 40, (5, 5), (1, 1), (2, 2), (1, 1)),
    ((ROWS, 12, 11, 17), 6, (3, 2), (2, 1), (1, 0), (1, 2)),
    ((ROWS, 18, 16, 10), 96, (3, 3), (1, 1), (8, 8), (8, 8)),
    ((ROWS, 6, 5, 1), 1, (1, 1), (2, 2), (0, 0), (1, 1)),
    *_TILED,
)
_BFLOAT16 = (torch.bfloat16,)
#: The error that tiles are allowed beside rounding, in float32's eps: 2 ** -7 of the largest number. They round what
#: they multiply to bfloat16 once more. Results in bfloat16 would need no such allowance, since their own rounding is of
#: that size; the gradient of the weights needs it, which is in float32.
_ROUNDED = 2.0**16


def _convolved(dtype: torch.dtype, seed: int, setting: tuple) -> tuple:
    """Images, weights, bias, and random numbers in the shape of the result, which stand for its gradient."""
    shape, outputs, kernel, stride, padding, dilation = setting
    # scaled so that results are of the size of the images, as in a network
    scale = (math.prod(kernel) * shape[-1]) ** -0.5
    x, weight = _normal(seed, *shape).to(dtype), _normal(seed + 100, outputs, *kernel, shape[-1], scale=scale).to(dtype)
    sides = zip(shape[1:3], kernel, stride, padding, dilation, strict=True)
    size = [output_side(*one) for one in sides]
    bias = _normal(seed + 200, outputs).to(_wide(dtype))
    return x, Parameter(weight, False), Parameter(bias, False), _normal(seed + 300, ROWS, *size, outputs).to(dtype)


def _convolution(settings, arguments: Callable[..., tuple], summed: bool = False) -> Iterator[Example]:
    for setting in settings:

        def make(dtype: torch.dtype, seed: int, setting=setting) -> tuple:
            return *arguments(setting, *_convolved(dtype, seed, setting)), *map(list, setting[3:])

        words = (
            f"to {setting[1]}",
            *(f"{name} {one[0]}" for name, one in zip("ksd", setting[2:4] + setting[5:], strict=True)),
        )
        slack = _ROUNDED if setting in _TILED else 0.0
        variant = convolution_kind(setting[0][-1], setting[1], setting[3])
        yield Example(_name(setting[0], *words), make, _BFLOAT16, slack=slack, variant=variant, summed=summed)


def convolution(settings=CONVOLVED) -> Iterator[Example]:
    yield from _convolution(settings, lambda setting, x, weight, bias, grad: (x, weight, bias))


def convolution_input_gradient(settings=CONVOLVED) -> Iterator[Example]:
    yield from _convolution(settings, lambda setting, x, weight, bias, grad: (grad, weight, *x.shape[1:3]))


def convolution_weight_gradient(settings=CONVOLVED) -> Iterator[Example]:
    yield from _convolution(settings, lambda setting, x, weight, bias, grad: (grad, x, list(setting[2])), True)


#: Layers of DeepFillv2's generator: channels, side of the images, outputs, kernel, stride, dilation.
_LAYERS = tuple(
    ((ROWS, side, side, inputs), outputs, (kernel,) * 2, (stride,) * 2, (d * (kernel // 2),) * 2, (d, d))
    for inputs, side, outputs, kernel, stride, d in (
        (24, 8, 48, 3, 1, 1), (24, 32, 24, 3, 1, 1), (96, 32, 192, 3, 1, 1), (96, 32, 192, 3, 1, 8),
        (24, 64, 48, 3, 2, 1), (48, 32, 192, 3, 2, 1), (3, 32, 48, 5, 1, 1),
    )
)  # fmt: skip
_RGB = (((ROWS, 3, 32, 32),),)
_HIDDEN = (((ROWS, 3, 32, 32), 4, 0, 0.25, 1), ((ROWS, 3, 32, 32), 4, 4, 0.25, 1), ((ROWS, 3, 32, 32), 4, 0, 0.0, 1))
_LOGITS = (
    *((method, (ROWS, 8, 10), 3.0) for method in METHODS),
    *((method, (ROWS, 8, 100), 3.0) for method in ("lse", "peel")),
)
#: The decoder that CARSO has for images of 32 x 32.
_CIFAR = Geometry.of([128, 256, 3, 3, *(256, 3, 2, 1, 5, 5), *(128, 3, 2, 1, 9, 9), *(64, 3, 2, 1, 17, 17),
                      *(32, 3, 2, 1, 33, 33), *(3, 2, 1, 1, 32, 32)])  # fmt: skip
#: What generators take in place of their own shapes to make what is raced: a few samples as users have them, of which
#: `tile` makes as many as wanted.
RACED: dict[str, tuple] = {
    "philox": ((1024,),),
    "aggregate": (_LOGITS,),
    "sample_latent": (((ROWS, 128),),),
    "reconstruction_loss": _RGB,
    "pgd_step": _RGB,
    "apgd_step": _RGB,
    "square_proposal": ((((ROWS, 3, 32, 32), 1, 7), ((ROWS, 3, 32, 32), 8, 7)),),
    "noisy_replay": _RGB,
    "hyperplane_projection": _RGB,
    "random_transform": (_HIDDEN,),
    "stitch": ((((ROWS, 3, 32, 32), (4, 4), 4),),),
    "gated_elu": ((((ROWS, 96, 16, 16), 1), ((ROWS, 16, 16, 96), 3)),),
    "contextual_attention": (((8, 8, 96), (32, 32, 96)),),
    "representation_distance": ((((640, 8, 8),), ((64, 8, 8), (128, 4, 4), (256,))), ("abs_cosine", "l2")),
    "decode_samples": (((_CIFAR, 8, torch.bfloat16),),),
    **dict.fromkeys(("convolution", "convolution_input_gradient", "convolution_weight_gradient"), (_LAYERS,)),
}


def raced(op: str) -> list[Example]:
    """The examples of an op that are raced: at shapes that users have, or its own where it has no such shapes."""
    shapes = RACED.get(op.removesuffix("_backward"))
    return of(op) if shapes is None else list(globals()[op](*shapes))


def of(op: str) -> list[Example]:
    """The examples of an op; KeyError, saying where they belong, if it has none."""
    generator = globals().get(op)
    if op not in REGISTRY or generator is None:
        raise KeyError(f"{op} has no examples: write a generator of that name in purify_fast/ops/_examples.py")
    return list(generator())

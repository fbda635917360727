"""Define the inputs with which each op is measured. Their shapes are those of real uses.

A function with the name of an op makes a `Case` from a shape, a dtype and a variant of the op. The decorator `measured`
has the shapes, and the pairs of a dtype and a variant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from purify_fast import ops
from purify_fast.ops import REGISTRY, Stream
from purify_fast.ops.aggregate import METHODS
from purify_fast.ops.pgd_step import NORMS

DTYPES = (torch.float32, torch.bfloat16)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """The inputs of an op at one shape, and the bytes that the op must move.

    Attributes:
        inputs: function that makes the input tensors. In the style "graph" (see `timing`), the first input is
            multiplied by 2 before the call.
        call: public function of the op.
        moved: formula of the bytes, for "forward" and "backward". The bytes are those of reading every input once, and
            of writing every output once. A formula may use ``symbols``, the number n of elements, and the number s of
            bytes per element.
        differentiable: positions of the inputs that get a gradient.
        symbols: values of the symbols in the formulas.
        slack: factor by which the usual tolerance is multiplied when results are compared.
        shape: shape that the tables show. `registry` sets this field and the next two.
        dtype: dtype of the data.
        variant: name of the op's variant, or "" for an op without variants.
    """

    inputs: Callable[[], tuple[Tensor, ...]]
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    moved: Mapping[str, str]
    differentiable: tuple[int, ...] = ()
    symbols: Mapping[str, int] = field(default_factory=dict)
    slack: float = 1.0
    shape: Shape = ()
    dtype: torch.dtype = torch.float32
    variant: str = ""

    @property
    def named(self) -> dict[str, str]:
        """The columns that distinguish this case from the other cases of the op."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"variant": self.variant, "shape": "x".join(map(str, self.shape)), "dtype": dtype}

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.differentiable else ("forward",)

    def bytes(self, direction: str) -> int:
        """Return the number of bytes that the op must move in the direction "forward" or "backward"."""
        symbols = {"n": math.prod(self.shape), "s": self.dtype.itemsize, **self.symbols}
        return int(eval(self.moved[direction], {"__builtins__": {}}, symbols))


#: For each op, the function that makes the cases.
_MEASURED: dict[str, Callable[[], list[Case]]] = {}
#: A pair of a dtype and a variant of the op.
Kind = tuple[torch.dtype, str]


def kinds(*variants: str) -> tuple[Kind, ...]:
    """Return all pairs of a dtype in `DTYPES` and one of the variants."""
    return tuple((dtype, variant) for variant in variants for dtype in DTYPES)


def measured(
    shapes: Sequence[Shape],
    pairs: Sequence[Kind] = kinds(""),
    fits: Callable[[Shape, str], bool] = lambda shape, variant: True,
) -> Callable[[Callable[[Shape, torch.dtype, str], Case]], Callable]:
    """Return a decorator for a function that makes a case.

    Args:
        shapes: measured shapes.
        pairs: measured pairs of a dtype and a variant.
        fits: tells whether a variant is measured at a shape.
    """

    def decorate(make: Callable[[Shape, torch.dtype, str], Case]) -> Callable:
        def cases() -> list[Case]:
            every = [(shape, *pair) for pair in pairs for shape in shapes if fits(shape, pair[1])]
            return [replace(make(*one), shape=one[0], dtype=one[1], variant=one[2]) for one in every]

        _MEASURED[make.__name__] = cases
        return make

    return decorate


def registry() -> dict[str, Callable[[], list[Case]]]:
    """Return, for each op with a kernel on a CPU, a function that makes its cases."""
    return dict(_MEASURED)


def arranged(x: Tensor, layout: str) -> Tensor:
    """Return a tensor in the memory format channels_last if ``layout`` is "channels_last", and unchanged otherwise."""
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0, layout: str = "") -> Tensor:
    return arranged((torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale).to(dtype), layout)


def uniform(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def drawn(count: int) -> tuple[Tensor, Tensor]:
    """Return the seed and the ids of random numbers for a number of images."""
    return torch.tensor([1234567890123]), torch.arange(count)


def attacked(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return current images, their gradient, and clean images."""
    gradient = normal(*shape, dtype=dtype, scale=1e-3)
    return uniform(*shape, dtype=dtype), gradient, uniform(*shape, dtype=dtype, seed=1)


@measured(
    ((256, 8, 128), (64, 1, 3072)),
    ((torch.float32, "normal"), (torch.float32, "uniform"), (torch.int32, "bits")),
)
def philox(shape: Shape, dtype: torch.dtype, distribution: Any) -> Case:
    """A shape has the number of ids, the number of draws, and the number of values in a draw."""
    ids, draws, numel = shape
    return Case(
        lambda: drawn(ids)[::-1],
        lambda ids, seed: ops.philox(seed, ids, numel, stream=Stream.LATENT, distribution=distribution, draws=draws),
        {"forward": "4*n + 8*B"},
        symbols={"B": ids},
    )


@measured(
    ((32, 8, 10), (256, 8, 10), (256, 8, 100), (64, 64, 10), (512, 8, 200)),
    (*kinds("lse"), *((torch.float32, method) for method in METHODS if method != "lse")),
    lambda shape, method: method == "lse" or shape in ((256, 8, 10), (512, 8, 200)),
)
def aggregate(shape: Shape, dtype: torch.dtype, method: Any) -> Case:
    """A shape has B images, K samples of each image, and C classes."""
    b, k, c = shape
    return Case(
        lambda: (normal(b, k, c, dtype=dtype, scale=3.0),),
        lambda logits: ops.aggregate(logits, method),
        {"forward": "B*K*C*s + 4*B*C", "backward": "2*B*K*C*s + 4*B*C"},
        (0,) if method != "vote" else (),
        {"B": b, "K": k, "C": c},
    )


@measured(((256, 64), (640, 128), (4096, 192)))
def sample_latent(shape: Shape, dtype: torch.dtype, variant: str) -> Case:
    """A shape has the batch size and the dimension of the latent."""
    b, d = shape
    return Case(
        lambda: (normal(b, d, dtype=dtype), normal(b, d, dtype=dtype, scale=0.5), *drawn(b)),
        ops.sample_latent,
        {"forward": "3*B*D*s + 12*B", "backward": "5*B*D*s + 12*B"},
        differentiable=(0, 1),
        symbols={"B": b, "D": d},
    )


_IMAGES = ((128, 1, 16, 16), (640, 3, 32, 32), (128, 3, 64, 64))


@measured(_IMAGES)
def reconstruction_loss(shape: Shape, dtype: torch.dtype, variant: str) -> Case:
    """The inputs are image logits and target images."""
    return Case(
        lambda: (normal(*shape, dtype=dtype, scale=3.0), uniform(*shape, dtype=dtype)),
        ops.reconstruction_loss,
        {"forward": "2*n*s", "backward": "3*n*s"},
        differentiable=(0,),
    )


@measured(_IMAGES, kinds("linf", "l2", "l1"))
def pgd_step(shape: Shape, dtype: torch.dtype, norm: Any) -> Case:
    """The inputs are those of `attacked`."""
    alpha, eps = {"linf": (2 / 255, 8 / 255), "l2": (0.1, 0.5), "l1": (1.0, 12.0)}[norm]
    return Case(
        lambda: attacked(shape, dtype),
        lambda x, grad, nat: ops.pgd_step(x, grad, nat, alpha, eps, norm),
        {"forward": "4*n*s"},
    )


@measured(_IMAGES, kinds("linf", "l2"))
def apgd_step(shape: Shape, dtype: torch.dtype, norm: Any) -> Case:
    """The inputs are those of `attacked`, and images of the previous step."""
    alpha, eps = (2 / 255, 8 / 255) if norm == "linf" else (0.1, 0.5)
    return Case(
        lambda: (*attacked(shape, dtype), uniform(*shape, dtype=dtype, seed=2)),
        lambda x, grad, nat, previous: ops.apgd_step(x, grad, nat, previous, alpha, eps, 0.75, norm),
        {"forward": "5*n*s"},
    )


_ATOP_IMAGES = ((8, 3, 256, 256), (64, 3, 32, 32))


@measured(_ATOP_IMAGES, kinds("rt2", "rt3", "rt1"))
def random_transform(shape: Shape, dtype: torch.dtype, variant: str) -> Case:
    """The inputs are images that AToP transforms."""
    b, c, h, w = shape
    num_passes = 4 if variant == "rt3" else None
    sigma = 0.0 if variant == "rt1" else 0.25
    return Case(
        lambda: (uniform(*shape, dtype=torch.float32), *drawn(b)),
        # Use channels_last for bfloat16, as AToP's generator does.
        lambda x, seed, ids: ops.random_transform(
            x,
            seed,
            ids,
            sigma=sigma,
            block=h // 8,
            num_passes=num_passes,
            dtype=dtype,
            channels_last=dtype == torch.bfloat16,
        )[0],
        {"forward": "4*B*C*P + N*B*(C + 2)*P*s", "backward": "8*B*C*P + N*B*C*P*s"},
        differentiable=(0,),
        symbols={"B": b, "C": c, "P": h * w, "N": num_passes or 1},
    )


@measured(_ATOP_IMAGES, ((torch.float32, "contiguous_format"), (torch.bfloat16, "channels_last")))
def stitch(shape: Shape, dtype: torch.dtype, layout: str) -> Case:
    """The inputs are images of four passes, from whose blocks an image of the shape is assembled."""
    passes = 4

    def inputs() -> tuple[Tensor, ...]:
        b, *image = shape
        images = normal(b * passes, *image, dtype=dtype, layout=layout)
        x, (seed, ids) = torch.zeros(shape), drawn(b)
        return images, ops.random_transform(x, seed, ids, sigma=0.0, block=shape[2] // 8, num_passes=passes)[1]

    moved = {"forward": "2*n*s", "backward": "(1 + N)*n*s"}
    return Case(inputs, ops.stitch, moved, differentiable=(0,), symbols={"N": passes})


@measured(
    # For each size of images, the output of the first convolution in AToP's generator, and of one in its middle.
    (
        (1, 48, 256, 256),
        (1, 192, 64, 64),
        (4, 48, 256, 256),
        (4, 192, 64, 64),
        (1, 48, 128, 128),
        (4, 192, 32, 32),
        (64, 48, 32, 32),
        (64, 192, 8, 8),
    ),
    ((torch.float32, ""), *kinds("channels_last")),
)
def gated_elu(shape: Shape, dtype: torch.dtype, variant: str) -> Case:
    """The inputs are outputs of gated convolutions in AToP's generator, for images of 256, 128 and 32 px."""
    return Case(
        lambda: (normal(*shape, dtype=dtype, scale=2.0, layout=variant),),
        ops.gated_elu,
        {"forward": "3*n*s", "backward": "5*n*s"},
        (0,),
        {"n": math.prod(shape) // 2},
    )


# Only two kinds are measured, because each case takes minutes to compile.
@measured(
    ((4, 96, 64, 64), (4, 96, 32, 32), (64, 96, 8, 8)),
    ((torch.float32, ""), (torch.bfloat16, "channels_last")),
)
def contextual_attention(shape: Shape, dtype: torch.dtype, variant: str) -> Case:
    """The inputs are those of the attention branch of AToP's generator for images of 256, 128 and 32 px.

    The timed function includes matrix products, which PyTorch computes in every compared implementation.
    """
    batch, channels, height, width = shape
    cells = height * width // 4

    def inputs() -> tuple[Tensor, ...]:
        values = normal(*shape, dtype=dtype, scale=0.05, layout=variant)
        return values, uniform(batch, cells, dtype=torch.float32) > 0.25

    return Case(
        inputs,
        ops.contextual_attention,
        {"forward": "8*B*C*L*s", "backward": "12*B*C*L*s"},
        (0,),
        {"B": batch, "C": channels, "L": cells},
    )


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not REGISTRY["representation_distance"].uses_reference(
        student.device, student.numel()
    ):
        return ops.representation_distance(student, teacher)
    return 1 - F.cosine_similarity(student.flatten(1).float(), teacher.flatten(1).float()).abs()


@measured(
    ((128, 512), (128, 512, 4, 4), (128, 640, 8, 8), (64, 128, 7, 7)),
    kinds("", "channels_last"),
    lambda shape, layout: layout == "" or len(shape) == 4,
)
def representation_distance(shape: Shape, dtype: torch.dtype, layout: str) -> Case:
    """The inputs are features of a student and of its teacher.

    The features are those of ResNet-18, WRN-34-10 and a small CNN, after pooling or before it. For eager calls the
    reference is ``F.cosine_similarity``, which users would write. In compiled code it is the formula of the op.
    """

    def inputs() -> tuple[Tensor, ...]:
        teacher = normal(*shape, dtype=torch.float32)
        student = teacher + 0.5 * teacher.flip(0)
        return tuple(arranged(x.to(dtype), layout) for x in (student, teacher))

    return Case(inputs, _distance, {"forward": "2*n*s", "backward": "3*n*s"}, differentiable=(0,))


@measured(((128, 3, 32, 32), (128, 1, 28, 28), (256, 3, 64, 64)), kinds("quarter", "all"))
def noisy_replay(shape: Shape, dtype: torch.dtype, variant: str) -> Case:
    """The inputs are images and their adversarial examples."""
    batch = shape[0]
    # The drifts are evenly spaced in [0, 1), so about a quarter of them are above 0.75.
    threshold = 0.75 if variant == "quarter" else -1.0

    def inputs() -> tuple[Tensor, ...]:
        x, adv = (uniform(*shape, dtype=dtype, seed=seed) for seed in (0, 1))
        return x, adv, torch.arange(batch) / batch, *drawn(batch)

    return Case(
        inputs,
        lambda x, adv, drift, seed, ids: ops.noisy_replay(x, adv, drift, threshold, 8 / 255, seed, ids),
        # At each position, the op reads an element of only one of the two images.
        {"forward": "2*n*s"},
    )


@measured(_IMAGES, kinds(*NORMS))
def hyperplane_projection(shape: Shape, dtype: torch.dtype, norm: Any) -> Case:
    """The inputs are images, gradients of a margin, and offsets of planes."""

    def inputs() -> tuple[Tensor, ...]:
        x, w = uniform(*shape, dtype=dtype), normal(*shape, dtype=dtype, scale=1e-3)
        flat, size = x.flatten(1).float(), w.flatten(1).float()
        # These are the L-inf distances from the images to the planes, if the box [0, 1] is ignored.
        distance = torch.linspace(-0.05, 0.05, shape[0])
        return x, w, (flat * size).sum(1) + distance * size.abs().sum(1)

    return Case(
        inputs,
        lambda x, w, b: ops.hyperplane_projection(x, w, b, norm),
        {"forward": "3*n*s"},
        # In l1 a single coordinate gets the rounding error of the sum over all coordinates.
        slack=300.0 if norm == "l1" and dtype == torch.float32 else 1.0,
    )


#: A DDPM step that clips the image. The last two are the bounds of the logarithm of a learned variance.
_COEFFICIENTS = (1.25, -0.75, 1.0, 0.4, 0.6, 0.3, -4.0, -2.0)


@measured(((128, 3, 32, 32), (8, 3, 256, 256)), kinds("fixed", "learned", "noiseless"))
def diffusion_step(shape: Shape, dtype: torch.dtype, variant: str) -> Case:
    """The inputs are a sampler's states in float32 and a denoiser's predictions."""
    b, c, *sides = shape
    halves = 2 if variant == "learned" else 1
    return Case(
        lambda: (
            normal(*shape, dtype=torch.float32),
            normal(b, halves * c, *sides, dtype=dtype),
            torch.tensor(_COEFFICIENTS),
            drawn(b)[0],
            torch.arange(b) // 2,
            torch.arange(b) % 2,
            torch.tensor([7]),
        ),
        lambda x, prediction, coefficients, seed, ids, draws, step: ops.diffusion_step(
            x,
            prediction,
            coefficients=coefficients,
            seed=seed,
            sample_ids=ids,
            draws=draws,
            step=step,
            noisy=variant != "noiseless",
        ),
        {"forward": "(8 + N*s)*n", "backward": "(12 + 2*N*s)*n"},
        differentiable=(0, 1),
        symbols={"N": halves},
    )


@measured(((1, 10), (128, 10), (256, 1000)), kinds("ce", "margin", "dlr"))
def attack_loss(shape: Shape, dtype: torch.dtype, kind: str) -> Case:
    """The inputs are logits and true classes. The outputs are the loss, its gradient and the decisions."""
    batch, classes = shape
    return Case(
        lambda: (normal(*shape, dtype=dtype, scale=3.0), torch.arange(batch) % classes),
        lambda logits, labels: ops.attack_loss(logits, labels, kind),
        {"forward": "2*n*s"},
    )

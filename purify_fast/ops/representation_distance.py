"""Distance between a student's representation u and a frozen teacher's v, per sample and layer, u and v flattened.

    c = u . v / (|u| |v|)
    abs_cosine    d = 1 - |c|             dd/dc = -sign(c)
    cosine        d = 1 - c               dd/dc = -1
    angular       d = arccos(c) / pi      dd/dc = -1 / (pi sqrt(max(1 - c^2, 1e-4)))
    l2            d = |u - v|             dd/du = (u - v) / d, 0 at u = v

``abs_cosine`` is ARREST's distance (arXiv 2308.16454), from Mao et al. (NeurIPS 2019). The gradient reaches the student
only, and in this form it is exactly 0 at u = v, where fine-tuning starts:

    dd/du = dd/dc (v - (u . v / |u|^2) u) / (|u| |v|)

The slope of arccos is infinite at parallel vectors, where the direction of its gradient is undefined. With the bound
1e-4 the gradient is the exact one, of length 1 / (pi |u|), for angles whose sine is 0.01 (0.57 degrees) or more, and
falls linearly to 0 below. For |u| |v| < 1e-30, zero vectors among them, c and its gradient are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .._tensors import check_one_device, last_channels, per_image
from .dispatch.examples import ROWS, examples, normal
from .dispatch.gradient import SCALED_ROWS, cpu_kernel, differentiable, needs_gradient, saves
from .dispatch.registry import Launcher, define_backward, define_op, wide

KINDS = ("abs_cosine", "cosine", "angular", "l2")
LEAST_NORMS = 1e-30
LEAST_SQUARE_SINE = 1e-4


def _measure(student: Tensor, teacher: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(d, scale, along) of one layer, [B] each: dd/du = scale (v - along u). Sums as wide as the student, then float64.

    float64 costs nothing for B numbers, and without it c would not be exactly 1 at u = v.
    """
    u = wide(student)
    v, dims = teacher.to(u.dtype), list(range(1, u.dim()))
    if kind == "l2":
        d = (u - v).square().sum(dims).double().sqrt()
        return d, torch.where(d > 0, -1 / d, 0 * d), torch.ones_like(d)
    dot, uu, vv = ((a * b).sum(dims).double() for a, b in ((u, v), (u, u), (v, v)))
    norms = (uu * vv).sqrt()
    nothing = norms < LEAST_NORMS  # not NaN
    c = torch.where(norms < math.inf, dot / norms, math.nan)  # squares that overflowed would make it 0
    c = torch.where(nothing, 0.0, c.clamp(-1, 1))
    if kind == "abs_cosine":
        d, slope = (1 - c.abs()).clamp_min(0), -c.sign()
        slope = torch.where(c.isnan(), c, slope)  # the sign of NaN is 0 on some devices
    elif kind == "cosine":
        d, slope = (1 - c).clamp_min(0), 0 * c - 1
    else:
        d = torch.arccos(c) / math.pi
        slope = -1 / (math.pi * (1 - c * c).clamp_min(LEAST_SQUARE_SINE).sqrt())
    return d, torch.where(nothing, 0.0, slope / norms), torch.where(nothing, 0.0, dot / uu)


def _result_dtype(layers: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (x.dtype for x in layers), torch.float32)


def reference(student: list[Tensor], teacher: list[Tensor], kind: int) -> tuple[Tensor, Tensor]:
    """The definition: layers [B, ...] -> distance [B, L] and slopes [B, L, 2], float32 (float64 if a layer is).

    Float32 arithmetic for half types, slopes = (scale, along) for the backward: dd/du = scale (v - along u).
    """
    measured = [_measure(u, v, KINDS[kind]) for u, v in zip(student, teacher, strict=True)]
    dtype = _result_dtype(student)
    slopes = torch.stack([torch.stack(rest, 1) for _, *rest in measured], 1).detach()
    return torch.stack([d for d, *_ in measured], 1).to(dtype), slopes.to(dtype)


def reference_backward(grad: Tensor, student: list[Tensor], teacher: list[Tensor], slopes: Tensor) -> list[Tensor]:
    """grad [B, L] times dd/dstudent, each layer in its dtype and shape."""
    out = []
    for layer, (x, v) in enumerate(zip(student, teacher, strict=True)):
        u = wide(x)
        scale, along = slopes[:, layer].unbind(1)
        weight = per_image((grad[:, layer] * scale).to(u.dtype), x)
        slope = v.to(u.dtype) - per_image(along.to(u.dtype), x) * u
        out.append((weight * slope).to(x.dtype).contiguous())
    return out


def _fake(student: Sequence[Tensor], teacher: Sequence[Tensor], kind: int) -> tuple[Tensor, Tensor]:
    batch, layers, dtype = student[0].shape[0], len(student), _result_dtype(student)
    return student[0].new_empty((batch, layers), dtype=dtype), student[0].new_empty((batch, layers, 2), dtype=dtype)


def _size_key(student: list[Tensor], *_: object) -> tuple[torch.dtype, int]:
    """The dtype and size of the student's first layer."""
    return student[0].dtype, student[0].numel()


def _variant(layers: int) -> str:
    """Race one layer and several layers separately: the reference launches its operators for each layer."""
    return "several" if layers > 1 else ""


#: Layers of one call. The last ones have more numbers than one program takes.
ONE, TWO, THREE = ((2, 5, 7),), ((9001,), (3,)), ((64, 8, 8), (130,), (4, 1025))
#: The kind and the layers, with the dtypes that stand for it on a GPU.
EXAMPLES = {(kind, layers): "f" if layers == ONE else "" for kind in KINDS for layers in (ONE, THREE, TWO)} | {
    ("l2", ONE): "",
    ("abs_cosine", TWO): "h",
    ("l2", TWO): "b",
}
RACED = tuple(
    (kind, layers) for kind in ("abs_cosine", "l2") for layers in (((640, 8, 8),), ((64, 8, 8), (128, 4, 4), (256,)))
)


def _raced_apart(kind: str, layers: tuple[tuple[int, ...], ...]) -> str:
    return _variant(len(layers))


def _arguments(
    kind: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, seed: int
) -> tuple[list[Tensor], list[Tensor], int]:
    teacher = [normal(seed + i, ROWS, *shape) for i, shape in enumerate(shapes)]
    student = [v + 0.5 * normal(seed + 100 + i, *v.shape) for i, v in enumerate(teacher)]
    return [u.to(dtype) for u in student], [v.to(dtype) for v in teacher], KINDS.index(kind)


OP = define_op(
    "representation_distance",
    "(Tensor[] student, Tensor[] teacher, int kind) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    # sums in another order err by ulps of the cosine, which is ten times as large as the distance
    examples=examples(_arguments, EXAMPLES, variant=_raced_apart, slack=lambda kind, _: 0.0 if kind == "l2" else 32.0),
    raced=examples(_arguments, RACED, variant=_raced_apart),
    triton=Launcher("representation_distance", "forward"),
    replaces_many=("", "several"),
    compiler_fuses=("",),
    size_key=_size_key,
)
BACKWARD = define_backward(
    OP,
    "(Tensor grad, Tensor[] student, Tensor[] teacher, Tensor slopes) -> Tensor[]",
    reference=reference_backward,
    fake=lambda grad, student, teacher, slopes: [x.new_empty(x.shape) for x in student],
    saved=lambda inputs, outputs: (*inputs[:2], outputs[1]),
    constants=1,
    changes={"slack": 0.0},
    size_key=lambda grad, student, *_: _size_key(student),
)


#: The distances of one layer [B], and dd/du in the student's shape and the arithmetic's dtype: of a 16-bit student as
#: many bytes as the two layers that backward would read.
SAVING = cpu_kernel("representation_distance_keeping", "(Tensor student, Tensor teacher, int kind) -> (Tensor, Tensor)")


_with_saved = differentiable(SAVING, SCALED_ROWS, lambda inputs, outputs: (outputs[1], inputs[0].dtype), constants=1)


def _forward(kind: int, layers: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    plain = OP.uses_reference(tensors[0].device, tensors[0].dtype, tensors[0].numel(), _variant(layers))
    call = reference if plain else OP.handle
    return call(list(tensors[:layers]), list(tensors[layers:]), kind)


def _backward(grad: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    *tensors, slopes, layers = saved
    return None, None, *BACKWARD(grad, tensors[:layers], tensors[layers:], slopes, variant=_variant(layers))


# Around the reference too: the gradient that autograd computes for it is rounding at u = v, and NaN at 0.
_distance = differentiable(
    _forward, _backward, lambda inputs, outputs: (*inputs[2:], outputs[1], inputs[1]), constants=1
)


def _check(student: Sequence[Tensor], teacher: Sequence[Tensor], kind: str) -> None:
    """ValueError unless the layers are as `representation_distance` documents them."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not student or len(student) != len(teacher):
        raise ValueError(f"student and teacher need as many layers, at least one, got {len(student)}, {len(teacher)}")
    for u, v in zip(student, teacher, strict=True):
        if u.shape != v.shape or u.dim() < 2 or u.shape[0] != student[0].shape[0]:
            got = f"{list(u.shape)}, {list(v.shape)}"
            raise ValueError(f"student and teacher need one shape [B, ...], and layers one batch size, got {got}")
        if not (u.is_floating_point() and v.is_floating_point()):
            raise ValueError(f"student and teacher must be floating point, got {u.dtype} and {v.dtype}")
        check_one_device(first=student[0], student=u, teacher=v)


def representation_distance(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], kind: str = "abs_cosine"
) -> Tensor:
    """Distance between representations, one number per sample and layer.

    Args:
        student: ``[B, ...]``, or a sequence of such layers, whose shapes and dtypes may differ; float16, bfloat16,
            float32 or float64; the gradient flows here.
        teacher: the same shapes, on the same device, in any of these dtypes; no gradient, even if it requires one.
        kind: ``abs_cosine`` (0 parallel or antiparallel, 1 orthogonal), ``cosine`` (0 to 2), ``angular`` (0 to 1, in
            half turns) or ``l2`` (Euclidean, in the features' unit).

    Returns:
        ``[B]`` for one tensor, ``[B, L]`` for L layers; never negative; float32 (float64 if a layer of the student
        is), also under autocast. At u = v: 0 with gradient 0. A zero vector is at 1 (``angular``: 0.5) from all
        others, with gradient 0.

    Raises:
        ValueError: shapes, batch sizes, devices or numbers of layers differ, fewer than 2 dimensions, not floating
            point, or an unknown kind.

    NaN and infinities in either make the distance NaN (``l2`` of an infinity: infinite). In float32 that begins where
    squares overflow, at norms of 1.8e19; below norms of 1e-15 precision is lost; ``angular`` is within 2e-4 next to 0
    and 1, where the cosine's rounding is the angle. The memory order does not matter: the
    gradient has the student's, and two channels_last maps are read as they are. First-order gradients only;
    deterministic; ``vmap`` is not supported.
    """
    single = isinstance(student, Tensor)
    if single != isinstance(teacher, Tensor):
        raise ValueError("student and teacher must both be tensors, or both sequences of tensors")
    us = [student] if isinstance(student, Tensor) else list(student)
    vs = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    _check(us, vs, kind)
    for layer, (u, v) in enumerate(zip(us, vs, strict=True)):
        if last_channels(u):  # the op sees dense rows, whatever the layout
            us[layer], vs[layer] = u.permute(0, 2, 3, 1), v.permute(0, 2, 3, 1)
    gradient = needs_gradient(*us)
    serves = not OP.uses_reference(us[0].device, us[0].dtype, us[0].numel())
    if gradient and single and serves and saves(BACKWARD, us[0]):
        return _with_saved(us[0], vs[0].detach(), KINDS.index(kind))[0]
    tensors = (*us, *(v.detach() for v in vs))
    # the compiler refuses a Function with any number of tensors if none needs a gradient
    call = _distance if gradient else _forward
    distance, _ = call(KINDS.index(kind), len(us), *tensors)
    return distance.squeeze(1) if single else distance

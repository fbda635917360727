"""Measure frozen copies of twenty networks: the dtype that "auto" chooses, and the time of an attack's gradient.

The rows show whether the rule of `purify_fast.speed.precision` separates the networks that are faster in bfloat16.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer, get_model
from tqdm import tqdm

from purify_fast import frozen_copy
from purify_fast.speed.folding.inference_copy import DTYPES
from purify_fast.speed.precision import PER_VALUE, PRODUCTS, Counter

from .. import sheets, timing

FILE = "elsewhere_copies.csv"
#: The model itself, and its copies by their dtypes.
TIMED = "model", "float32", "bfloat16"
#: The numbers of images in a batch.
IMAGES = 8, 32
#: The least and the most rounds of a row, and the seconds after which no round begins that is not needed.
LEAST, MOST, SECONDS = 5, 15, 5.0


_NAMES = """
resnet18 resnet50 wide_resnet50_2 resnext50_32x4d densenet121 vgg11_bn mobilenet_v2 mobilenet_v3_small
mobilenet_v3_large shufflenet_v2_x1_0 mnasnet0_5 efficientnet_b0 regnet_y_400mf regnet_x_400mf convnext_tiny swin_t
VisionTransformer
"""
#: The height and width of the images of each network.
SIDES = dict.fromkeys(_NAMES.split(), 32) | dict.fromkeys(("alexnet", "squeezenet1_1", "googlenet"), 64)


def network(name: str) -> nn.Module:
    """Return a network with random weights, which require no gradient."""
    torch.manual_seed(0)
    if name == "VisionTransformer":
        model = VisionTransformer(32, 4, 6, 4, 128, 256, num_classes=10)
        # torchvision starts it at 0, where no gradient passes.
        nn.init.normal_(model.heads.head.weight)
    else:
        options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        model = get_model(name, num_classes=10, **options)
    return model.eval().requires_grad_(False)


def _seconds(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the processor time of the gradient of the images."""
    leaf = x.clone().requires_grad_()
    began = time.process_time()
    torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
    return time.process_time() - began


def measured(name: str, images: int, quick: bool) -> dict[str, Any]:
    """Measure a row, and return its line of the results file."""
    model = network(name)
    x, y = torch.rand(images, 3, SIDES[name], SIDES[name]), torch.randint(10, (images,))
    with torch.no_grad(), Counter() as counted:
        model(x[:1])
    automatic: Any = frozen_copy(model, x)
    copies = {automatic.compute_dtype: automatic}
    for dtype in DTYPES:
        other: Any = copies.get(dtype) or frozen_copy(model, x, dtype=dtype)
        # A copy that was asked for in bfloat16 is in float32 if bfloat16 gave other logits.
        copies.setdefault(other.compute_dtype, other)
    contestants = {"model": model} | {str(dtype).removeprefix("torch."): copy for dtype, copy in copies.items()}
    rounds = list[dict[str, float]]()
    began, least, most = time.monotonic(), *((1, 1) if quick else (LEAST, MOST))
    while len(rounds) < least or (len(rounds) < most and time.monotonic() < began + SECONDS):
        rounds.append({who: _seconds(contestant, x, y) for who, contestant in contestants.items()})
    best = {f"{who}_ms": f"{1e3 * min(one[who] for one in rounds):.2f}" if who in rounds[0] else "" for who in TIMED}
    found = {"row": name, "images": images, "rounds": len(rounds), "products": counted.products}
    found |= {"values": counted.values, "auto": str(automatic.compute_dtype).removeprefix("torch.")}
    return found | best | timing.environment(torch.device("cpu"))


def run(names: list[str], quick: bool, out: Path, resume: bool) -> None:
    """Measure networks, and write the file after every row."""
    rows = {(row["row"], int(row["images"])): row for row in sheets.rows_of(out / FILE)}
    order = [(name, images) for name in SIDES for images in IMAGES]
    left = [key for key in order if key[0] in names and not (resume and key in rows)]
    for key in tqdm(left, desc="copies", unit=" rows"):
        rows[key] = measured(*key, quick)
        sheets.write_csv(out / FILE, [rows[each] for each in order if each in rows])


def _ratio(row: dict[str, str], one: str, other: str) -> float:
    return float(row[one]) / float(row[other])


def sentences(folder: Path) -> list[str]:
    """Return sentences about a folder's file: the rule, and the rows that are nearest to a wrong choice."""
    rows = sheets.rows_of(folder / FILE)
    if not rows:
        return ["Nothing has been measured yet."]
    text = (
        f"{sheets.measured_on(rows, 'row')} On a processor that is faster in bfloat16, `auto` chooses it for at least "
        f"{PER_VALUE} dense products per computed value and at least {PRODUCTS / 1e6:.0f} million in the batch."
    )
    for dtype, worst, words in (("bfloat16", min, "at least"), ("float32", max, "at most")):
        if chosen := [row for row in rows if row["auto"] == dtype and row["bfloat16_ms"]]:
            row = worst(chosen, key=lambda row: _ratio(row, "float32_ms", "bfloat16_ms"))
            gain = f"{words} {_ratio(row, 'float32_ms', 'bfloat16_ms'):.2f} times as fast as the copy in float32"
            text += f" Where it chose {dtype}, the copy in bfloat16 was {gain} ({row['row']}, {row['images']} images)."
    return [text]

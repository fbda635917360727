"""Memory of the gradient through a diffusion process of five and of a hundred steps, each in its own process."""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from purify_fast._memory import peak_resident_memory
from purify_fast.methods.diffusion import DiffusionPurifier
from purify_fast.models.classifiers import PreActResNet18

from .. import RESULTS, options
from . import sheets, timing
from .pipelines.diffusion import T_STAR, denoiser, loss

FILE = "cpu/memory.csv"
IMAGES, STEPS = 8, (5, 100)
SMALL, LARGE = "U-Net of width 32", "UNet2DModel of google/ddpm-cifar10-32's shape"
PLAIN, CHECKPOINTED, OURS, OURS_BFLOAT16 = "plain autograd", "checkpointed steps", "ours", "ours, bfloat16"
#: For the other networks, the activations of all steps would not fit into a usual machine's memory.
MEASURED = [
    (network, form, steps)
    for network in (SMALL, LARGE)
    for form in (PLAIN, CHECKPOINTED, OURS, OURS_BFLOAT16)
    for steps in STEPS
    if form != PLAIN or steps == STEPS[0]
]
GIGABYTE = 1e9


def network(name: str) -> nn.Module:
    """A denoiser for CIFAR-10's images with random weights, by its name in the table."""
    if name == SMALL:
        return denoiser(32)
    torch.manual_seed(0)
    return import_module("diffusers").UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def plain(made: DiffusionPurifier, x: Tensor, kept: bool) -> Tensor:
    """The logits of a plain loop: DDPM's steps, noise by `torch.randn_like`.

    Args:
        made: defence whose parts and coefficients are used.
        x: images ``[B, C, H, W]``.
        kept: whether autograd keeps all activations; else each step is computed again backward.
    """
    table, noises = made.process.table()
    numbers, times = table.coefficients.tolist(), table.times.long().tolist()

    def step(x: Tensor, i: int) -> Tensor:
        p, q, _, image, state, noise, _, _ = numbers[i]
        predicted = made.denoiser(x, torch.full((len(x),), times[i]))
        return image * (p * x + q * predicted).clamp(-1, 1) + state * x + noise * torch.randn_like(x)

    x = numbers[0][4] * (2 * x - 1) + numbers[0][5] * torch.randn_like(x)
    for i in range(1, len(noises)):
        x = step(x, i) if kept else checkpoint(step, x, i, use_reentrant=False)
    return made.classifier((x + 1) / 2)


def measured(name: str, form: str, steps: int, images: int) -> dict[str, Any]:
    """A row: the peak memory of this process above that with only the networks.

    Args:
        name: name of the network.
        form: form of the gradient.
        steps: number of steps of the process.
        images: number of images of the batch.
    """
    made = DiffusionPurifier(
        network(name),
        PreActResNet18(width=16),
        (3, 32, 32),
        {"t_star": T_STAR, "steps": steps, "solver": "ddpm"},
        keep=0,
    ).eval()
    if form == OURS_BFLOAT16:
        made.accelerate()
    x = torch.rand(images, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    run = partial(plain, made, kept=form == PLAIN) if form in (PLAIN, CHECKPOINTED) else made
    before = peak_resident_memory() / GIGABYTE
    torch.autograd.grad(loss(run(x).float()), x)
    peak = peak_resident_memory() / GIGABYTE
    return {
        "network": name,
        "parameters": sum(p.numel() for p in made.denoiser.parameters()),
        "images": images,
        "form": form,
        "steps": steps,
        "gigabytes": round(peak - before, 3),
        "of_process": round(peak, 3),
        **timing.environment(torch.device("cpu")),
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks memory``."""
    parser.add_argument("--images", type=options.at_least_one, default=IMAGES, help=f"of the batch; {IMAGES}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")


def main(chosen: argparse.Namespace) -> Path:
    """``python -m benchmarks memory``: write the file after each row, and resume earlier runs."""
    path = chosen.out / FILE
    rows: list[dict[str, Any]] = list(sheets.read_csv(path)) if path.exists() else []
    done = {(row["network"], row["form"], int(row["steps"])) for row in rows}
    for name, form, steps in tqdm([one for one in MEASURED if one not in done], desc="memory", unit=" rows"):
        # The peak memory of a process never falls.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(measured, name, form, steps, chosen.images).result())
        sheets.write_csv(path, rows)
    return path


def table(results: Path) -> list[str]:
    """The lines of docs/diffusion.md.

    Args:
        results: the folder.
    """
    cells = {(row["network"], row["form"], row["steps"]): row for row in sheets.read_csv(results / FILE)}
    body = []
    for name in (SMALL, LARGE):
        for form in (PLAIN, CHECKPOINTED, OURS, OURS_BFLOAT16):
            found = [cells.get((name, form, str(steps)), {}) for steps in STEPS]
            shown = [[f"{float(row[one]):.2f}" for one in ("gigabytes", "of_process") if row] for row in found]
            body.append([name, form, *("{} ({})".format(*each) if each else "-" for each in shown)])
    return sheets.table(["denoiser", "gradient", *(f"GB, {steps} steps" for steps in STEPS)], body)

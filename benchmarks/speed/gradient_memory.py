"""Measure the memory of the gradient through a diffusion process of 5 and of 100 steps."""

from __future__ import annotations

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

from .. import RESULTS
from . import sheets, timing
from .pipelines.diffusion import T_STAR, denoiser, loss

FILE = "cpu/memory.csv"
IMAGES, STEPS = 8, (5, 100)
SMALL, LARGE = "U-Net of width 32", "UNet2DModel of google/ddpm-cifar10-32's shape"
PLAIN, CHECKPOINTED, OURS, OURS_BFLOAT16 = "plain autograd", "checkpointed steps", "ours", "ours, bfloat16"
#: The measured networks, forms of the gradient and numbers of steps. Plain autograd is measured with few steps only,
#: because the activations of 100 steps would not fit into the memory of a usual machine.
MEASURED = [
    (network, form, steps)
    for network in (SMALL, LARGE)
    for form in (PLAIN, CHECKPOINTED, OURS, OURS_BFLOAT16)
    for steps in STEPS
    if form != PLAIN or steps == STEPS[0]
]


def network(name: str) -> nn.Module:
    """Return a denoiser for images of CIFAR-10, with random weights, by its name in the table."""
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
    """Return the logits of a plain loop over the steps of DDPM, with noise from `torch.randn_like`."""
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


def measured(name: str, form: str, steps: int) -> dict[str, Any]:
    """Measure how much the gradient raises the peak memory of this process. Return one row of the results file.

    The memory of the networks themselves is not included.
    """
    process = {"t_star": T_STAR, "steps": steps, "solver": "ddpm"}
    made = DiffusionPurifier(network(name), PreActResNet18(width=16), (3, 32, 32), process, keep=0).eval()
    if form == OURS_BFLOAT16:
        made.accelerate()
    x = torch.rand(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    run = partial(plain, made, kept=form == PLAIN) if form in (PLAIN, CHECKPOINTED) else made
    before = peak_resident_memory() / 1e9
    torch.autograd.grad(loss(run(x).float()), x)
    peak = peak_resident_memory() / 1e9
    row = {"network": name, "parameters": sum(p.numel() for p in made.denoiser.parameters()), "images": IMAGES}
    row |= {"form": form, "steps": steps, "gigabytes": round(peak - before, 3), "of_process": round(peak, 3)}
    return row | timing.environment(torch.device("cpu"))


def main(_: object) -> Path:
    """Run ``python -m benchmarks memory``. Rows that an earlier run has written are not measured again."""
    path = RESULTS / FILE
    rows: list[dict[str, Any]] = list(sheets.read_csv(path)) if path.exists() else []
    done = {(row["network"], row["form"], int(row["steps"])) for row in rows}
    for name, form, steps in tqdm([one for one in MEASURED if one not in done], desc="memory", unit=" rows"):
        # Use a new process for each row, because the recorded peak memory of a process never falls.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(measured, name, form, steps).result())
        sheets.write_csv(path, rows)
    return path


def table(results: Path) -> list[str]:
    """Return the table of docs/diffusion.md, with the memory of each network and form of the gradient."""
    cells = {(row["network"], row["form"], row["steps"]): row for row in sheets.read_csv(results / FILE)}
    body = []
    for name in (SMALL, LARGE):
        for form in (PLAIN, CHECKPOINTED, OURS, OURS_BFLOAT16):
            found = [cells.get((name, form, str(steps)), {}) for steps in STEPS]
            shown = [[f"{float(row[one]):.2f}" for one in ("gigabytes", "of_process") if row] for row in found]
            body.append([name, form, *("{} ({})".format(*each) if each else "-" for each in shown)])
    return sheets.table(["denoiser", "gradient", *(f"GB, {steps} steps" for steps in STEPS)], body)

"""The training loop the methods share: resumable at any kill, logged, with throughput.

Every step is a function of (seed, step) and of the state in the checkpoint: the order of the images, the attack's
starts and torch's global generator are all seeded per step. So a run that was killed and resumed ends with the same
weights, to the bit on the same CPU, as one that was not.

Several processes (`purify_fast.training.distributed`) share each batch, and end with the weights of one up to floating
point. What a step exchanges: gradients and metrics, in one mean after the backward pass, and BatchNorm's statistics.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .._files import atomic
from .._fingerprint import digest
from .._process import processes
from ..data import StreamedImages, batches, crop_flip, read_ahead, to_float
from ..models.layers import BatchNorm1d, BatchNorm2d
from ..speed.precision import whole_float32_by_default
from .checkpoint import read_tree, write_tree
from .config import FitConfig
from .distributed import average_, from_first, gathered
from .lookahead import Lookahead


@dataclass(frozen=True)
class Batch:
    """One step's input: images [B, C, H, W] in [0, 1], labels, global sample indices, and where in the run it is.

    B is this process's share of the batch; the seed is one for all processes.
    """

    x: Tensor
    y: Tensor
    sample_ids: Tensor
    seed: int
    epoch: int = 0
    epochs: int = 1


class Task(Protocol):
    """What a method brings to `fit`."""

    @property
    def model(self) -> nn.Module:
        """What is trained; all of it is saved and restored."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Its optimiser."""

    def training_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and detached scalars to log."""

    def learning_rate(self, progress: float, epoch: int, epochs: int) -> float:
        """The learning rate of a step, at ``progress`` in [0, 1) of the run and in ``epoch`` of 0 .. epochs - 1."""

    def describe(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be resumed; JSON values."""


def step_seed(seed: int, step: int) -> int:
    """The seed of one step's randomness; torch's CPU generator reads 32 bits, so both are mixed into them."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def _differences(saved: dict, wanted: dict, there: str, here: str) -> str:
    wanted = json.loads(json.dumps(wanted))
    different = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    return "; ".join(f"{key}: {saved.get(key)!r} {there}, {wanted.get(key)!r} {here}" for key in different)


def _check_batchnorm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        everywhere = isinstance(module, (BatchNorm1d, BatchNorm2d, nn.SyncBatchNorm))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and not everywhere:
            raise ValueError(
                f"{name} is a BatchNorm of one process's images: torch.nn.SyncBatchNorm.convert_sync_batchnorm makes "
                "it one of all (GPUs only), or use purify_fast.models.layers.BatchNorm2d"
            )


class _Log:
    """A JSONL file that holds exactly the steps the checkpoint has seen."""

    def __init__(self, path: Path | None, step: int):
        self.path = path
        if path is not None:
            old = path.read_text().splitlines() if path.is_file() else []
            kept = [line for line in old if line.endswith("}") and json.loads(line)["step"] <= step]
            with atomic(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))

    def write(self, row: dict) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


@whole_float32_by_default()
def fit(
    task: Task,
    x: Tensor | StreamedImages,
    y: Tensor,
    config: FitConfig,
    folder: str | Path | None = None,
    title: str = "train",
    progress: bool = True,
) -> dict:
    """Train ``task`` on ``x`` and ``y``, resuming from ``folder`` if it holds a checkpoint of the same run.

    Args:
        task: the method: model, optimiser, step.
        x: uint8 ``[N, C, H, W]``, on the device to train on; y: int64 ``[N]`` there. Images streamed from a file give
            the same weights to the bit, and either form resumes the other's run. Every process gives all of them.
        config: how long and how.
        folder: for ``checkpoint.safetensors`` and ``log.jsonl``; None keeps nothing.
        title: of the progress bar. progress: whether there is one.

    In a process group of several (the command line makes it under torchrun, elsewhere
    ``torch.distributed.init_process_group`` does) every process calls this alike. They start from the weights of the
    first, which alone reads and writes the folder; a run may be resumed by another number of them. The weights are
    those of one process up to floating point, but where a model draws otherwise than by `purify_fast` (torch's dropout:
    the same masks in every process), and where the published training's attacks cannot be shared out evenly
    (`purify_fast.methods.carso.task.balanced_batch`). A task's loss is the mean over its share, or scaled to be so.

    Returns:
        The last epoch's mean metrics.

    Raises:
        ValueError: fewer images than a batch, a checkpoint of a run with other settings; with several processes, a
            batch they cannot share evenly, other data or settings than the first one's, or a model in training mode
            with a BatchNorm that is not synchronised.
        FloatingPointError: the loss is not finite at the end of an epoch; the last checkpoint stays.
    """
    rank, world = processes()
    if config.batch_size % world:
        raise ValueError(f"batch_size {config.batch_size} must be a multiple of the {world} processes")
    steps = len(x) // config.batch_size
    if steps == 0:
        raise ValueError(f"batch_size {config.batch_size} is larger than the {len(x)} training images")
    total, step = steps * config.epochs, 0
    sums: dict[str, Tensor] = {}
    last: dict[str, float] = {}
    facts = {"data": f"{len(x)} images, {digest(x, y)}", **asdict(config), **task.describe()}
    del facts["checkpoint_seconds"]
    path = None if folder is None else Path(folder) / "checkpoint.safetensors"

    def state() -> dict:
        states = {"model": task.model.state_dict(), "optimizer": task.optimizer.state_dict()}
        return {**states, "facts": facts, "step": step, "last": last, "sums": sums}

    def begin() -> dict | None:
        if path is not None:
            for stale in path.parent.glob(f".{path.stem}-*"):  # of a run killed while it wrote
                stale.unlink()
        if path is None or not path.is_file():
            return None if world == 1 else state()
        saved = read_tree(path)
        if found := _differences(saved["facts"], facts, "there", "now"):
            raise ValueError(
                f"{path.parent} holds a run with other settings ({found}): give another folder, or remove it"
            )
        return saved

    if world > 1:
        task.model.train()
        _check_batchnorm(task.model)
    saved = from_first(begin)
    if saved is not None:
        differences = gathered(_differences(saved["facts"], facts, "in the first", "there"))
        for other, found in enumerate(differences):
            if found:
                raise ValueError(f"process {other} trains on other data or settings than the first ({found})")
        task.model.load_state_dict(saved["model"])
        task.optimizer.load_state_dict(saved["optimizer"])
        step, last = saved["step"], saved["last"]
        sums = {key: value.to(x.device) for key, value in saved["sums"].items()}
    log = _Log(None if path is None or rank else path.parent / "log.jsonl", step)

    def save() -> None:
        if path is not None and rank == 0:  # without the others, so that they need not agree on when
            write_tree(path, state())

    devices = [x.device] if x.device.type == "cuda" else []
    bar = tqdm(
        total=total * config.batch_size,
        initial=step * config.batch_size,
        unit="img",
        desc=title,
        smoothing=0.05,
        disable=rank > 0 or not progress,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file wants a line now and then
    )
    saved_at = began = time.monotonic()
    with bar, torch.random.fork_rng(devices):
        while step < total:
            epoch = step // steps
            order = batches(len(x), config.batch_size, config.seed, epoch, rank=rank, world=world, device=x.device)
            resumed_at = step % steps
            for ids, raw in read_ahead(x, order[resumed_at:]):
                seed = step_seed(config.seed, step)
                torch.manual_seed(seed)
                images = to_float(raw)
                if config.padding or config.flip:
                    images = crop_flip(images, config.seed, ids, config.padding, config.flip, epoch=epoch)
                for group in task.optimizer.param_groups:
                    group["lr"] = task.learning_rate(step / total, epoch, config.epochs)
                task.model.train()
                loss, metrics = task.training_step(Batch(images, y[ids], ids, seed, epoch, config.epochs))
                task.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                measured = {"loss": loss.detach(), **metrics}
                weights = (p for group in task.optimizer.param_groups for p in group["params"])
                average_([*(p.grad for p in weights if p.grad is not None), *measured.values()])
                task.optimizer.step()
                for key, value in measured.items():
                    sums[key] = sums.get(key, torch.zeros((), device=x.device)) + value
                step += 1
                bar.update(config.batch_size)
                if step % steps and time.monotonic() - saved_at >= config.checkpoint_seconds:
                    save()
                    saved_at = time.monotonic()
            last = {key: float(value) / steps for key, value in sums.items()}  # the epoch's one sync
            if not all(torch.isfinite(torch.tensor(value)) for value in last.values()):
                raise FloatingPointError(f"epoch {epoch}: training diverged, {last}; the last checkpoint is kept")
            sums = {}
            rate = task.optimizer.param_groups[0]["lr"]
            seconds, began = time.monotonic() - began, time.monotonic()
            speed = (steps - resumed_at) * config.batch_size / max(seconds, 1e-9)
            log.write(
                {"epoch": epoch, "step": step, **last, "learning_rate": rate, "images_per_second": round(speed, 1)}
            )
            bar.set_postfix({key: f"{value:.3g}" for key, value in last.items()}, refresh=False)
            save()
            saved_at = time.monotonic()
    if isinstance(task.optimizer, Lookahead):
        task.optimizer.load_slow()
    task.model.eval()
    return last

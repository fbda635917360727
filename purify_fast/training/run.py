"""`Run` holds the state of a run: its position, checkpoints, validations, and the means of its losses and metrics."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._files import CHECKPOINT, MODEL, read_sealed, what_is, write_sealed, write_text
from .._process import processes
from .._settings import text_hash
from .._version import __version__
from ..data import crop_flip, to_float
from ..model_state import GENERATORS, describe
from ..models.layers import evaluation_mode
from ..speed.agreement import FLOAT32, differ
from ..speed.copying import memo_of
from ..speed.draws import own_generators, same_draws
from ..speed.memory import peak_so_far
from .config import FitConfig
from .distributed import from_first
from .optimizers import RELATIVE, load_state, relative_rates, set_modes, state_of, weights_of
from .sources import InMemory, Loader, RawBatch, Sources, seed_draws, step_seed
from .task import Batch, Metrics, RunLength, Task

#: The key of a saved model's values of ``get_extra_state`` that are no tensors.
_EXTRA = "extra_state"

#: In a checkpoint's JSON, an object with this single key stands for a tensor.
_TENSOR = "tensor of purify_fast"


# -- checkpoints ------------------------------------------------------------------------------------------------------


def write_tree(path: Path, tree: Any) -> None:
    """Write nested dicts and lists of tensors, numbers, strings and None as one file, atomically."""
    write_sealed(path, *_encoded(tree))


def read_tree(path: Path) -> Any:
    """Read a file of `write_tree`."""
    try:
        tree, tensors = read_sealed(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no checkpoint ({error}): remove it to start anew") from error
    return _decoded(tree, tensors)


def _encoded(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return a tree as a JSON value with references to tensors, and the tensors; TypeError if it has other values."""
    tensors: dict[str, Tensor] = {}

    def reference(tensor: Any) -> dict[str, str]:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"a {type(tensor).__name__} cannot be written")
        number = str(len(tensors))
        tensors[number] = tensor
        return {_TENSOR: number}

    return json.loads(json.dumps(tree, default=reference)), tensors


def _decoded(value: Any, tensors: dict[str, Tensor], numbered: bool = False) -> Any:
    """Return the tree that `_encoded` turned into a JSON value and tensors."""
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return tensors[value[_TENSOR]]
    # JSON turns the numbers by which an optimizer names its weights into texts. A model's names are texts.
    pairs = ((key, _decoded(item, tensors, numbered or key in ("optimizers", "state"))) for key, item in value.items())
    return {int(key) if numbered and key.isdecimal() else key: item for key, item in pairs}


# -- saved models -----------------------------------------------------------------------------------------------------


def save_model(
    folder: str | Path, kind: str, arguments: dict[str, Any], state: dict[str, Tensor], **extra: Any
) -> None:
    """Write ``model.safetensors``, with the weights, and with a description of the model in the file's metadata."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if others := {name: value for name, value in state.items() if name not in tensors}:
        extra = {**extra, _EXTRA: _encoded(others)[0]}
    facts = {"kind": kind, "arguments": arguments, **extra, "version": __version__}
    write_sealed(Path(folder) / MODEL, facts, tensors)


def read_model(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a model that `save_model` wrote."""
    path = Path(folder) / MODEL
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a saved model: it {what_is(folder)}")
    try:
        facts, state = read_sealed(path)
        if "kind" not in facts:
            raise ValueError("the file's metadata has no kind of model")
    except ValueError as error:
        raise ValueError(f"{folder} holds a model that cannot be loaded: {path}: {error}") from error
    return facts, state | _decoded(facts.pop(_EXTRA, {}), {})


# -- run ---------------------------------------------------------------------------------------------------------------

logger = logging.getLogger("purify_fast")

#: Settings that do not change the result of a run, and may therefore differ when the run is resumed.
_NO_FACTS = ("checkpoint_seconds", "compile", "cuda_graphs", "cudnn_benchmark")
#: The attributes of `Run` that a checkpoint restores as they are.
_PROGRESS = ("step", "last", "best", "rows", "counts")
#: The names, without suffix, of the files that a run writes. A half-written file is called ``.<name>-...``.
_WRITTEN = (Path(CHECKPOINT).stem, "log", "model", "run")


class Run:
    """The state of a run. With several processes, only the first writes the run's files.

    If the source of the training images is not reproducible, the run can be resumed only at the end of an epoch.

    Attributes:
        facts: the settings that must be equal for a checkpoint to be resumed.
        terms: the terms of the loss, each with the first step in which it acts.
        step: number of steps that were taken so far.
        sums: sums of the epoch's losses and metrics so far, by name.
        counts: number of steps of the epoch that measured each loss and metric, by name.
        last: the last epoch's means.
        best: the best validation so far: its ``score``, its ``step`` and the ``model``'s state; empty before the first.
        rows: one entry of ``log.jsonl`` for each epoch that has ended.
    """

    def __init__(self, task: Task, config: FitConfig, sources: Sources, folder: Path | None):
        self.task, self.config, self.folder = task, config, folder
        self.source, self.held_out = source, held_out = sources
        self.steps = source.steps
        loop = {name: value for name, value in asdict(config).items() if name not in _NO_FACTS}
        self.facts = {"data": source.description, **loop, **task.describe()}
        if held_out is not None:
            self.facts["validation"] = held_out.description
        #: The shape of an image; empty until a loader has given a batch.
        self.shape: list[int] = list(source.x.shape[1:]) if isinstance(source, InMemory) else []
        self.length = RunLength(config.epochs, source.steps, source.batch_size, source.images)
        self.terms = task.terms(self.length)
        self.total, self.step, self.saved_at = self.length.steps, 0, time.monotonic()
        self.sums, self.counts = dict[str, Tensor](), dict[str, int]()
        self.last, self.best, self.rows = dict[str, float](), dict[str, Any](), list[dict[str, Any]]()
        #: The generators from which the model draws, besides the global ones.
        self.own = self.generators()
        #: True if the folder has the log of a run without a checkpoint.
        self.begins_anew = False
        self._began, self._spent = time.monotonic(), 0.0

    def generators(self) -> list[Any]:
        """Return the random generators that the model or an object in it holds, and those of the task."""
        held = [item for item in describe(self.task.model).items if isinstance(item, GENERATORS)]
        return [*held, *own_generators([self.task])]

    @property
    def epoch(self) -> int:
        """The epoch of the next step."""
        return self.step // self.steps

    @property
    def seconds(self) -> float:
        """The time of the run so far. After an interruption, the time up to the last checkpoint counts."""
        return self._spent + time.monotonic() - self._began

    def batch(self, raw: RawBatch, step: int, seed: int, augment: bool = True) -> Batch:
        """Make a step's input from a batch; ``augment=False`` (held-out) omits crops and mirroring."""
        images, labels, ids = raw
        config, epoch = self.config, step // self.steps
        x = to_float(images) if images.dtype == torch.uint8 else images
        if augment and (config.padding or config.flip):
            x = crop_flip(x, config.seed, ids, config.padding, config.flip, epoch=epoch)
        before, place = self.length.images_before(step), (epoch, config.epochs, step)
        return Batch(x, labels, ids, seed, *place, images_before=before, whole=not augment)

    def add(self, measured: Mapping[str, Tensor]) -> None:
        """Add a step's losses and metrics to the sums of its epoch. A delayed term of the loss may still be missing."""
        for key, value in measured.items():
            self.sums[key] = self.sums.get(key, torch.zeros((), device=self.source.device)) + value
            self.counts[key] = self.counts.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        """Return the mean of each loss and metric over the epoch's steps that measured it. This waits for the GPU."""
        return {key: float(value) / self.counts[key] for key, value in self.sums.items()}

    def check_finite(self) -> None:
        """Raise FloatingPointError if a loss of the epoch or a weight is not finite. This waits for the device."""
        if not self.is_finite():
            where = f"epoch {(self.step - 1) // self.steps}: training diverged before step {self.step}"
            advice = "Lower the learning rate, raise eps_warmup, or use float32 if the precision is bfloat16"
            raise FloatingPointError(f"{where}, a loss or a weight is not finite. {advice}")

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Return True if this epoch's losses so far and the trained weights are finite."""
        every = [weight for optimizer in self.task.optimizers.values() for weight in weights_of(optimizer)]
        # A weight without a gradient may be a mask, whose infinite values are no divergence.
        weights = [weight for weight in every if weight.requires_grad]
        running = ("running_mean", "running_var")
        statistics = [buffer for name, buffer in self.task.model.named_buffers() if name.endswith(running)]
        checks = [value.isfinite().all() for value in (*self.sums.values(), *weights, *statistics)]
        return bool(torch.stack(checks).all())

    # -- checkpoints

    def state(self) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        optimizers = {name: state_of(optimizer) for name, optimizer in self.task.optimizers.items()}
        progress = {name: getattr(self, name) for name in (*_PROGRESS, "facts", "sums", "seconds")}
        progress |= {"compile": self.config.compile, "first_batch": self.source.first_batch}
        progress["network"] = self.network(self.shape)
        progress["frozen"] = [name for name, weight in self.task.model.named_parameters() if not weight.requires_grad]
        progress["attacked"] = None if self.task.attacked is None else self.task.attacked.decision
        return {"model": self.task.model.state_dict(), "optimizers": optimizers, **progress}

    def network(self, shape: list[int]) -> dict[str, Any]:
        """Describe what the network computes: a hash of its parts, and its answer for two fixed images of a shape."""
        # An address in memory is no part of the network.
        task, text = self.task, re.sub(r" at 0x[0-9a-f]+", "", repr(self.task.model))
        facts: dict[str, Any] = {"parts": text_hash(text).hexdigest(), "shape": shape, "answer": None}
        if not shape:
            return facts
        images = torch.linspace(0, 1, 2 * math.prod(shape), device="cpu").view(2, *shape).to(self.source.device)
        try:
            answers, copied = [], with_copied_model(task)
            for _ in "12":
                with evaluation_mode(copied.model), torch.no_grad(), same_draws(copied.model):
                    seed_draws(0, self.own)
                    answers.append(copied.answer(images).float().flatten(1)[:, :64])
        except Exception:
            # A user's network may refuse these images, or have no answer. The training does not need it.
            return facts
        # A network that draws from elsewhere has no answer to compare.
        return facts if differ(*answers) else {**facts, "answer": answers[0]}

    def _compare(self, before: dict[str, Any]) -> None:
        if processes()[0] > 0:
            return
        now, old, other = self.network(before["shape"]), before["answer"], False
        if old is not None and now["answer"] is not None:
            new, old = now["answer"].cpu(), old.cpu()
            size = FLOAT32 * float(old.nan_to_num(0.0, 0.0, 0.0).abs().median())
            other = new.shape != old.shape or not torch.allclose(new, old, FLOAT32, size, equal_nan=True)
        if other or now["parts"] != before["parts"]:
            what = "gives other outputs" if other else "has other parts or settings"
            text = "the network %s than when the checkpoint of %s was written: was its code edited since?"
            logger.warning(text, what, self.folder)

    def resume(self) -> None:
        """Resume from the checkpoint, if there is one."""
        saved = from_first(self._read)
        if saved is None:
            return
        by_process = [differences(saved["facts"], self.facts)] * processes()[1]
        if processes()[1] > 1:
            dist.all_gather_object(by_process, by_process[0])
        for rank, difference in enumerate(by_process):
            if difference:
                raise ValueError(f"process {rank} trains on other data or settings than the first ({difference})")
        self.task.model.load_state_dict(saved["model"])
        for name, weight in self.task.model.named_parameters():
            weight.requires_grad_(name not in saved["frozen"])
        for name, optimizer in self.task.optimizers.items():
            # The present code decides the relative rates of the groups, also in a run that is resumed.
            shares = relative_rates(optimizer)
            load_state(optimizer, saved["optimizers"][name])
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group[RELATIVE] = share
        for name in _PROGRESS:
            setattr(self, name, saved[name])
        self.sums = {key: value.to(self.source.device) for key, value in saved["sums"].items()}
        self._spent = saved["seconds"]
        if self.task.attacked is not None:
            self.task.attacked.decision = saved["attacked"]
        if saved["compile"] != self.config.compile and processes()[0] == 0:
            text = "the run in %s goes on with compile=%s: compiled code rounds otherwise, so it ends with other bits"
            logger.warning(text, self.folder, self.config.compile)
        self._compare(saved["network"])

    def _read(self) -> dict[str, Any] | None:
        saved = None
        if self.folder is not None:
            # Remove half-written files of a run that was killed. The folder is locked, so no other run writes them.
            for stem in _WRITTEN:
                for stale in self.folder.glob(f".{stem}-*"):
                    stale.unlink()
            path = self.folder / CHECKPOINT
            saved = read_tree(path) if path.is_file() else None
            self.begins_anew = saved is None and (self.folder / "log.jsonl").is_file()
        if self.folder is None or saved is None:
            return None if processes()[1] == 1 else self.state()
        advice = "pass another folder, or remove this one"
        if difference := differences(saved["facts"], self.facts):
            raise ValueError(f"{self.folder} holds a run with other images or settings ({difference}): {advice}")
        if isinstance(self.source, Loader) and not self.source.begins_with(saved["first_batch"]):
            raise ValueError(f"{self.folder} holds a run with other images (the first batch of x): {advice}")
        return saved

    def save(self) -> None:
        """Write the checkpoint."""
        # The processes need not save at the same moment, because only the first writes.
        if self.folder is not None and processes()[0] == 0:
            write_tree(self.folder / CHECKPOINT, self.state())
        self.saved_at = time.monotonic()

    def save_if_due(self) -> None:
        """Write a checkpoint within an epoch if the last is checkpoint_seconds old, and all values are finite."""
        due = time.monotonic() - self.saved_at >= self.config.checkpoint_seconds
        # If a value is not finite, `check_finite` raises the error later, in all processes at the same step.
        if self.folder is not None and due and self.source.reproducible and self.is_finite():
            self.save()

    def add_row(self, epoch: int, learning_rate: float, images_per_second: float) -> None:
        """Add a line for the epoch that has ended to ``log.jsonl``."""
        row: dict[str, Any] = {"epoch": epoch, "step": self.step, **self.last, "learning_rate": learning_rate}
        row["images_per_second"] = round(images_per_second, 1)
        row |= {"seconds": round(self.seconds, 1), "peak_memory": peak_so_far(self.source.device)}
        row |= self.task.graphs.facts if self.task.graphs is not None else {}
        if self.terms:
            row["acts_from_step"] = self.terms
        self.rows.append(row)
        self.write_log()

    def write_log(self) -> None:
        """Write the whole ``log.jsonl`` again, so that a kill cannot cut a line in half."""
        if self.folder is not None and processes()[0] == 0:
            write_text(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))

    # -- held-out images

    def validate(self) -> None:
        """Add the means over the held-out images to ``last``, and keep the weights if they are the best so far."""
        model, graphs, world = self.task.model, self.task.graphs, processes()[1]
        before = copy.deepcopy(model.state_dict())
        self.task.finish()
        model.eval()
        # The graphs of the training may have left no memory for a validation.
        if graphs is None or world > 1:
            measured = self._measured()
        else:
            measured = graphs.retry_without_graphs(self._measured, self.source.device)
        # The host waits for the device only here.
        parts = [[(count, {name: float(value) for name, value in part.items()}) for count, part in measured]] * world
        if world > 1:
            dist.all_gather_object(parts, parts[0])
        # All processes add the same numbers in the order of the batches: they must agree on the best.
        ordered = [part for together in zip_longest(*parts) for part in together if part is not None]
        images = sum(count for count, _ in ordered)
        names = dict.fromkeys(name for _, part in ordered for name in part)
        means = {name: sum(count * part.get(name, 0.0) for count, part in ordered) / images for name in names}
        self.last = {**self.last, **{f"validation_{name}": value for name, value in means.items()}}
        self._keep_best(means)
        set_modes(self.task.optimizers.values(), training=True)
        model.load_state_dict(before)

    def _measured(self) -> list[tuple[int, Metrics]]:
        """Return the number of images and the metrics of each batch of this process's held-out images."""
        assert self.held_out is not None
        batches = list[tuple[int, Metrics]]()
        for raw in self.held_out.epoch(0, *processes()):
            # Every validation has the same draws and the attack of the last epoch.
            seed = step_seed(self.config.seed, 2**31)
            seed_draws(seed, self.own)
            measured = self.task.validate(self.batch(raw, self.total - 1, seed, augment=False))
            batches.append((len(raw[0]), measured))
        return batches

    def _keep_best(self, means: dict[str, float]) -> None:
        """Keep the model's present weights if the means over the held-out images are the best so far."""
        chosen = self.config.keep_best
        if chosen == "off":
            return
        if chosen not in means:
            raise ValueError(f"keep_best must be one of off, {', '.join(means)} for this training, got {chosen!r}")
        score = -means["loss"] if chosen == "loss" else means[chosen]
        if not math.isnan(score) and (not self.best or score > self.best["score"]):
            state = self.task.model.state_dict()
            best = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
            self.best = {"score": score, "step": self.step, "model": copy.deepcopy(best)}


def with_copied_model(task: Task) -> Task:
    """Return a task with a copy of the model, whose calls leave no trace in the training, such as a count of calls."""
    other, memo, parts = copy.copy(task), memo_of(task.model.modules()), set(task.model.modules())
    for name, value in vars(task).items():
        if isinstance(value, nn.Module) and value in parts:
            setattr(other, name, copy.deepcopy(value, memo))
    return other


def differences(saved: dict[str, Any], current: dict[str, Any]) -> str:
    """Describe the differences between the facts of two runs, in a text that is empty if there are none."""
    # JSON turns a checkpoint's tuples into lists.
    return "; ".join(_different(*(json.loads(json.dumps(facts)) for facts in (saved, current))))


def _different(saved: Any, current: Any, name: str = "") -> Iterator[str]:
    """Yield the differences of two JSON values, such as ``defence.samples: 8, now 4``."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in sorted(saved.keys() | current.keys()):
            yield from _different(saved.get(key), current.get(key), f"{name}.{key}" if name else key)
    elif saved != current:
        yield f"{name}: {saved!r}, now {current!r}"

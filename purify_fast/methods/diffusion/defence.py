"""Purification by diffusion: noise is added to an image, and a denoiser removes it step by step.

    x_T = alpha x + sigma z                           forward process, to the time t*
    x_s = step(x_t, denoiser(x_t, t), z_t)            reverse process, from t* to the image
    logits = classifier(x_0)                          aggregated over K such purifications

One round is DiffPure (Nie et al., ICML 2022, arXiv 2205.07460), rounds of increasing t* are the gradual noise of Lee &
Kim (ICCV 2023, arXiv 2303.09051), and a single step is one-shot denoising (Carlini et al., ICLR 2023, arXiv
2206.10550).

The gradient is exact. The backward pass computes steps again, with the same noise (`checkpointed_steps`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..._settings import dtype_of
from ..._validation import check_counts, check_literal
from ...attacks.checkpointed_steps import Keep, check_keep, checkpointed_steps
from ...defences.base import Defence, refuse_wrapped
from ...defences.stochastic import WithAggregation
from ...ops.diffusion_step import COEFFICIENTS, STEPS, diffusion_step
from ...speed.draws import same_draws
from ..recipes import Recipe, read_recipes
from ..saving import save_defence
from .denoiser import Denoiser, described_denoiser, read_pretrained, rebuilt_denoiser
from .process import Process, Schedule, StepTable

DiffusionAggregation = Literal["mean", "mean_softmax", "lse", "vote"]
#: Surrogates have fewer steps, or fewer steps with a gradient of the denoiser: the number is divided by this factor.
FEWER = 4


class DiffusionPurifier(Defence):
    """A classifier behind a diffusion process. The module maps images in [0, 1] to finite logits.

    Every call draws a fresh seed from torch's global generator. Within `fixed_noise` the seed is the caller's. Within
    `deterministic` no noise is added anywhere, and there is one prediction per image.

    Args:
        denoiser: any module ``(x_t [B, C, H, W], t [B]) -> prediction``, with x_t in [-1, 1] apart from the noise. The
            prediction may have twice the channels (learned variances), or be an object with a tensor ``sample``, as in
            diffusers. The defence uses a frozen copy; ``defence.denoiser.requires_grad_(True)`` makes it trainable.
        classifier: any module from images ``[B, C, H, W]`` in [0, 1] to logits ``[B, classes]``. The defence uses a
            frozen copy in evaluation mode.
        image_shape: (C, H, W).
        process: a `Process` or its fields, the settings by which images are noised and denoised.
        samples: K, number of purifications per prediction.
        aggregation: aggregation of the K predictions: ``mean`` of the logits; ``mean_softmax``, the log of the mean
            softmax; ``lse``, logsumexp; or ``vote``, the majority (`purify_fast.defences.MajorityVote`).
        max_forward_batch: largest batch of the denoiser, where each draw of an image counts as one image. None means no
            limit.
        last_time: last time for which the denoiser was trained, as a share of the process.
        keep: number of steps, counted back from the last step, whose activations are stored for the gradient and not
            computed again. "auto" stores as many as fit into a quarter of the free memory. It changes no result.

    Raises:
        ValueError: a setting is out of range, t_star is after ``last_time``, or the denoiser or the classifier is
            wrapped or does not fit image_shape or process.
    """

    draws_for_each_image = True
    _rows: Tensor

    def __init__(
        self,
        denoiser: nn.Module,
        classifier: nn.Module,
        image_shape: tuple[int, int, int],
        process: Process | Mapping[str, Any] = Process(),
        *,
        samples: int = 1,
        aggregation: DiffusionAggregation = "mean",
        max_forward_batch: int | None = None,
        last_time: float = 1.0,
        keep: Keep = "auto",
    ):
        super().__init__(classifier, image_shape)
        check_keep(keep)
        refuse_wrapped("denoiser", denoiser)
        check_literal("aggregation", aggregation, DiffusionAggregation)
        check_counts(samples=samples, max_forward_batch=1 if max_forward_batch is None else max_forward_batch)
        self.process = process if isinstance(process, Process) else Process(**process)
        self.last_time, self.keep = last_time, keep
        self.samples, self.aggregation, self.max_forward_batch = samples, aggregation, max_forward_batch
        # The copy is frozen, because predictions and attacks need no gradients of its weights.
        module = copy.deepcopy(denoiser).requires_grad_(False)
        self.denoiser = Denoiser(module, self.image_shape, whole_times=self.process.time_units == "index")
        if self.process.learns_variances and not self.denoiser.learns_variances:
            channels = self.image_shape[0]
            raise ValueError(f"variance 'learned' needs a denoiser of {2 * channels} channels, got {channels}")
        self._make_table()
        self.arguments: dict[str, Any] = {
            "image_shape": list(self.image_shape),
            "process": json.loads(json.dumps(asdict(self.process))),
            "samples": samples,
            "aggregation": aggregation,
            "max_forward_batch": max_forward_batch,
            "last_time": last_time,
            "denoiser": described_denoiser(denoiser),
        }
        self._ready()
        blank, times = self._blank_images(), self.get_buffer("_times").view(torch.float64)
        # The denoiser may draw random numbers itself, such as for dropout in evaluation mode.
        with torch.no_grad(), same_draws(self.denoiser) as drew:
            self._predict(blank, times[-1].expand(len(blank)))
            self._denoiser_draws = drew()

    @classmethod
    def rebuilt_arguments(cls, arguments: dict[str, Any], purifier: nn.Module | None, folder: object) -> dict[str, Any]:
        return {**arguments, "denoiser": rebuilt_denoiser(arguments["denoiser"], purifier, folder)}

    def _make_table(self) -> None:
        """Compute the table of the process as buffers, and let every step have a gradient of the denoiser."""
        if (latest := max(start for start, _ in self.process.rounds)) > self.last_time:
            raise ValueError(f"t_star must be at most {self.last_time}, the last time of the training, got {latest}")
        table, self.begins = self.process.table()
        self.adds_noise: list[bool] = (table.coefficients[:, COEFFICIENTS.index("noise")] != 0).tolist()
        rows = {"_rows": torch.arange(len(self.begins), device="cpu")}
        # Each float64 number is stored as an int64 number with the same bits, because floats would be rounded when a
        # user converts the defence to another dtype.
        rows |= {f"_{name}": numbers.view(torch.int64) for name, numbers in table._asdict().items()}
        for name, tensor in rows.items():
            self.register_buffer(name, tensor.to(self._noise_seed.device), persistent=False)
        #: For each row of the table: True if the gradient passes through the denoiser; else its prediction is constant.
        self.followed: list[bool] = [True] * len(self.begins)

    # -- a prediction: noise -> denoise -> classify -> aggregate -------------------------------------------------------

    def purify(self, x: Tensor, draws: int = 1) -> Tensor:
        """Return images ``[B, draws * K, C, H, W]``, in [0, 1] if the process clips, from at most 65,536 draws."""
        self.check_images(x)
        if draws * self.samples > STEPS:
            raise ValueError(f"draws must be at most {STEPS // self.samples} with {self.samples} samples, got {draws}")
        noisy = not self.noise_is_off
        count = draws * self.samples if noisy else 1
        seed, ids = self.noise(len(x), x.device) if noisy else (self._noise_seed, self._rows[:1])
        images = 2 * x.to(torch.promote_types(self.purifier_dtype, torch.float32)) - 1
        # Each draw of each image is a row of the batch.
        rows = images.repeat_interleave(count, 0)
        names = ids.expand(len(x)).repeat_interleave(count), torch.arange(count, device=x.device).repeat(len(x))
        most = self.max_forward_batch or max(1, len(rows))
        parts = zip(*(tensor.split(most) for tensor in (rows, *names)), strict=True)
        purified = torch.cat([self._denoised(part, noisy, seed, key, draw) for part, key, draw in parts])
        return self._as_images(purified).unflatten(0, (len(x), count))

    def _as_images(self, state: Tensor) -> Tensor:
        """Convert the last state to images. The SDE and its probability flow may exceed [-1, 1]."""
        if self.process.clip:
            # Values of exactly -1 and 1 must have a gradient; with torch.clamp of some versions, they have none.
            state = torch.where(state.abs() <= 1, state, state.detach().clamp(-1, 1))
        return (state + 1) / 2

    def _denoised(self, images: Tensor, noisy: bool, seed: Tensor, ids: Tensor, draws: Tensor) -> Tensor:
        """Run the whole process on images ``[B, C, H, W]`` in [-1, 1]."""
        table = StepTable(*(getattr(self, f"_{name}").view(torch.float64) for name in StepTable._fields))
        coefficients = table.coefficients.to(images.dtype)

        def step(x: Tensor, j: int) -> Tensor:
            prediction = x
            if not self.begins[j]:
                prediction = self._predict(x if self.followed[j] else x.detach(), table.times[j].expand(len(x)))
            names = {"seed": seed, "sample_ids": ids, "draws": draws, "step": self._rows[j : j + 1]}
            return diffusion_step(x, prediction, coefficients[j], noisy=noisy and self.adds_noise[j], **names)

        return checkpointed_steps(
            step,
            images,
            len(self.begins),
            parameters=[parameter for parameter in self.denoiser.parameters() if parameter.requires_grad],
            # The process draws its noise from a seed. torch's generators are used only by dropout in training mode, or
            # by a denoiser that draws random numbers itself.
            preserve_rng_state=self.training or self._denoiser_draws,
            keep=self.keep,
        )

    def _predict(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the denoiser's prediction for states at the times ``t [B]``, for `diffusion_step`."""
        with self._products(x.device, self.denoiser.module):
            prediction = self.denoiser(x.to(self.purifier_dtype), t)
        return prediction if self.process.learns_variances else prediction[:, : x.shape[1]]

    def with_process(self, process: Process) -> DiffusionPurifier:
        """Return a defence with another process. It shares denoiser and classifier."""
        other = copy.copy(self)
        other._modules, other._buffers, other._kept_ids = dict(self._modules), dict(self._buffers), {}
        other.process, other.arguments = process, {**self.arguments, "process": asdict(process)}
        other._make_table()
        return other

    def _one_step(self, t_star: float | tuple[float, ...]) -> Process:
        """The settings with which the image that is predicted at t* is the purified image."""
        return replace(self.process, t_star=t_star, solver="one_shot", steps=None, eta=0.0, variance="small")

    def one_shot(self, sigma: float) -> WithAggregation:
        """Make a deterministic model that denoises and classifies images with Gaussian noise, in a single step.

        The noise that an image has takes the place of the noise that the purifier would add (Carlini et al., ICLR 2023,
        arXiv 2206.10550, section 3). `purify_fast.evaluation.certify` adds such noise.

        Args:
            sigma: standard deviation of the noise, in units of images in [0, 1].

        Raises:
            ValueError: the denoiser was not trained for so much noise.
        """
        process = self._one_step(self.process.schedule.time_of(sigma))
        return WithAggregation(self.with_process(process), "mean", deterministic=True).eval()

    # -- attacks ------------------------------------------------------------------------------------------------------

    def attack_surrogates(self) -> list[tuple[str, DiffusionPurifier]]:
        """Return purifiers with fewer steps, whose gradients may be better (Lee & Kim, arXiv 2303.09051, 4.2)."""
        ends = [j for j, begins in enumerate(self.begins) if begins] + [len(self.begins)]
        counts = [after - before - 1 for before, after in pairwise(ends)]
        if max(counts) == 1:
            return []
        short = tuple(-(-count // FEWER) for count in counts)
        single = ("one step in place of its process", self.with_process(self._one_step(self.process.t_star)))
        skipping = self.with_process(self.process)
        skipping.followed = [min(end - j for end in ends if end > j) % FEWER == 1 for j in range(len(self.begins))]
        few = ("a process of fewer steps", self.with_process(replace(self.process, steps=short)))
        skips = (f"a process whose denoiser has a gradient at every step in {FEWER}", skipping)
        # `few` is left out if it has a single step, because it is then nearly the same as `one`, for every solver
        return [few, skips, single] if max(short) > 1 else [skips, single]

    def strong_attacks(self, norm: str, eps: float) -> list[tuple[str, dict[str, Any]]]:
        """Return attacks for purifiers by diffusion, as pairs that the evaluation makes into an `AttackSpec`."""
        # The length of a step of Lee and Kim's attack is for L-inf.
        return [("lee_kim_2023", {"eps": eps, "leave": True})] if norm == "linf" else []

    # -- speed --------------------------------------------------------------------------------------------------------

    @property
    def purifier_dtype(self) -> torch.dtype:
        """The dtype of the denoiser's inputs. The states are float32, or float64 if the weights are float64."""
        return torch.float32 if self.compute_dtype is not None else dtype_of(self.denoiser)

    def make_frozen_copy(self, dtype: torch.dtype, **how: Any) -> DiffusionPurifier:
        other = super().make_frozen_copy(dtype, **how)
        if dtype == torch.bfloat16:
            other.denoiser.convert_to_bfloat16()
        return other

    # -- files --------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, classifier: nn.Module, process: Mapping[str, Any] | None = None, **options: Any
    ) -> DiffusionPurifier:
        """Build a purifier from a denoiser of diffusers and its schedule.

        Args:
            folder: folder of a pipeline, such as a copy of google/ddpm-cifar10-32; nothing is downloaded.
            classifier: classifier for images of the denoiser's size.
            process: further fields of `Process`; they replace those of the folder.
            options: further arguments of `DiffusionPurifier`.

        Raises:
            ImportError: diffusers is not installed.
            FileNotFoundError: the folder, the network or the scheduler is missing.
            ValueError: this package does not support the schedule or prediction.
        """
        denoiser, image_shape, facts = read_pretrained(folder)
        return cls(denoiser, classifier, image_shape, {**facts, **(process or {})}, **options)

    save = save_defence


# -- the published purifications: ``recipes.yaml`` has every value and its source --------------------------------------
#
# A source is a file and its lines in NVlabs/DiffPure at commit 985703f, JinyiW/GuidedDiffusionPur at 6ee8b1a,
# ml-postech/robust-evaluation-of-diffusion-based-purification at 3b98b01 or ethz-spylab/diffusion_denoised_smoothing at
# 699e7a5. The authors did not train the denoisers themselves, so these recipes have no training.


@dataclass(frozen=True)
class DiffusionRecipe(Recipe):
    """A published purification. Values with ``schedule.`` and ``process.`` are fields of `Schedule` and `Process`."""

    def process(self) -> Process:
        """Return the recipe's process. If the recipe states the noise as sigma, t* is the time with this noise."""
        schedule, fields = Schedule(**self.part("schedule")), self.part("process")
        if "noise.sigma" in self.values:
            fields["t_star"] = schedule.time_of(self["noise.sigma"])
        return Process(schedule=schedule, **fields)

    def defence(self, denoiser: nn.Module, classifier: nn.Module, **changes: Any) -> DiffusionPurifier:
        """Build the defence with a denoiser for images in [-1, 1]. ``changes`` replace the recipe's arguments."""
        options = {"image_shape": self.image_shape, "process": self.process(), **self.part("defence"), **changes}
        return DiffusionPurifier(denoiser, classifier, **options)


RECIPES = read_recipes(DiffusionRecipe, "diffusion")

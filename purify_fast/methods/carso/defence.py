"""CARSO: purification conditioned on the classifier's own internal representation.

    c = condition(representation(x));   x_k = sigmoid(decoder(z_k, c)),  z_k ~ N(0, I),  k = 1 .. K
    logits_i = logsumexp_k classifier(x_k)_i

Ballarin, Ansuini, Bortolussi: "Blending adversarial training and representation-conditional purification via
aggregation improves adversarial robustness", arXiv 2306.06081. The paper's head (PeeL) returns +-inf and stops gradient
attacks by NaN; the logsumexp taken here makes the same decisions with finite logits and usable gradients.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...defences.base import Defence
from ...models.layers import normalization
from ...models.representation import Representation
from ...ops import REGISTRY
from ...ops.decode_samples import decode_samples, latents
from ...speed.inference_copy import inside, quicken
from .networks import ConditionEncoder, Decoder, Deconvolution, PosteriorEncoder, decoder_plan
from .networks_v1 import ConditionEncoderV1, DecoderV1, PosteriorEncoderV1, decoder_plan_v1
from .packed_decoder import PackedDecoder

if TYPE_CHECKING:
    from ...training.loop import Batch
    from .config import CarsoConfig

FORMS = ("v4", "v1")
DecoderPlan = tuple[Sequence[int], Sequence[Deconvolution | Mapping]]


def _packs(device: torch.device) -> bool:
    """Whether a kernel of our own decodes on ``device``; in a compiled graph the layers do, fused with the rest."""
    chosen = REGISTRY["decode_samples"].choice(device)
    return chosen not in (None, "reference") and not torch.compiler.is_compiling()


class Carso(Defence):
    """A classifier behind CARSO's purifier. Images in [0, 1] in, finite logits out.

    Args:
        classifier: any module, images ``[B, C, H, W]`` in [0, 1] to logits ``[B, classes]``. It is copied, frozen and
            kept in evaluation mode; the caller's own is left untouched.
        layers: module paths whose outputs form the representation, maps ``[B, C, H, W]``, tokens
            ``[B, T, D]`` or vectors ``[B, F]``.
        image_shape: (C, H, W).
        cond_dim, latent_dim: sizes of the condition and of the latent.
        samples: K, reconstructions per prediction.
        decoder_width: channels of the decoder's last hidden layer; they double inwards.
        encoder_depth: blocks per pre-encoder.
        mean, std: normalization of the posterior encoder's input, numbers or one per channel.
        decoder: (start, layers) of the decoder, layers as `Deconvolution` or their fields; None has `decoder_plan` make
            them from image_shape and decoder_width. `published_decoder` has the paper's.
        form: ``v4``, the paper's versions 4 to 6, or ``v1``, its first, made for 28 x 28 images; decoder_width and
            encoder_depth have no effect on v1.

    `Carso.from_preset` builds the published systems, `Carso.from_official` reads the published files.

    Raises:
        ValueError: sizes below 1, a std that is not above 0, unknown layers, or a classifier that does not fit
            image_shape.

    One forward pass at a time: not for several threads or ``nn.DataParallel`` (one process per GPU does it).

    Randomness: a fresh seed per call from torch's global generator, or `fixed_noise`; `deterministic` takes z = 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        classifier: nn.Module,
        layers: Sequence[str],
        image_shape: tuple[int, int, int],
        cond_dim: int = 512,
        latent_dim: int = 128,
        samples: int = 8,
        *,
        decoder_width: int = 32,
        encoder_depth: int = 3,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        decoder: DecoderPlan | None = None,
        form: str = "v4",
    ):
        super().__init__(classifier, image_shape)
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        # a frozen copy of the reader; a tuple, as the classifier's
        self._reader: tuple[Representation] | None = None
        self._packed: tuple[tuple, PackedDecoder] | None = None  # and the weights it was made of
        image_shape = self.image_shape
        sizes = {"cond_dim": cond_dim, "latent_dim": latent_dim, "samples": samples, "decoder_width": decoder_width}
        for name, value in {**sizes, "encoder_depth": encoder_depth}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        channels = image_shape[0]
        statistics = normalization(mean, std, channels)
        if decoder is not None:
            start, h, w = decoder[0]
            plan = (
                (start, h, w),
                [layer if isinstance(layer, Deconvolution) else Deconvolution(**layer) for layer in decoder[1]],
            )
        elif form == "v1":
            plan = decoder_plan_v1(channels, latent_dim + cond_dim)
        else:
            plan = decoder_plan(image_shape, decoder_width)
        self.arguments: dict[str, Any] = {
            "layers": list(layers),
            "image_shape": list(image_shape),
            **sizes,
            "encoder_depth": encoder_depth,
            **statistics,
            "decoder": None if decoder is None else json.loads(json.dumps([plan[0], [asdict(x) for x in plan[1]]])),
            "form": form,
        }
        self.latent_dim, self.samples = latent_dim, samples
        self.representation = Representation(self.classifier, tuple(layers), image_shape)
        self.num_classes = self.representation.num_classes
        shapes = self.representation.shapes
        if form == "v1":
            self.condition_encoder: nn.Module = ConditionEncoderV1(shapes, cond_dim)
            self.posterior_encoder: nn.Module = PosteriorEncoderV1(image_shape, cond_dim, latent_dim)
            self.decoder: nn.Module = DecoderV1(latent_dim, cond_dim, image_shape, *plan)
        else:
            self.condition_encoder = ConditionEncoder(shapes, cond_dim, encoder_depth)
            self.posterior_encoder = PosteriorEncoder(image_shape, cond_dim, latent_dim)
            self.decoder = Decoder(latent_dim, cond_dim, image_shape, *plan)
        for name, values in statistics.items():
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)
        # the whole pipeline runs about twice as fast in this layout on a CPU, its transposed convolutions three times
        for part in (self.condition_encoder, self.posterior_encoder, self.decoder):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._ready()

    def _purifier(self) -> tuple[nn.Module, ...]:
        return self.condition_encoder, self.posterior_encoder, self.decoder

    def _compiled_parts(self) -> tuple[Callable[..., Tensor], ...]:
        return self._condition, self._decode

    @torch.inference_mode(False)  # its copies are to be differentiated, wherever they are made
    def _prepare(self) -> None:
        reader = None
        if self.accelerated is not None:
            reader = copy.deepcopy(self.representation)
            quicken(reader.model, self.image_shape, self.accelerated["dtype"], self.accelerated["fold"])
        super()._prepare()
        self._reader = None if reader is None else (reader,)
        self._packed = None

    # -- the parts ----------------------------------------------------------------------------------------------------

    def prior_latents(self, batch: int, device: torch.device, draws: int = 1) -> Tensor:
        """Latents ``[batch, draws * K, latent_dim]`` as the current mode draws them; K = 1 without noise."""
        if self.silent:
            return torch.zeros((batch, 1, self.latent_dim), device=device)
        return latents(*self.noise(batch, device), draws * self.samples, self.latent_dim).expand(batch, -1, -1)

    def read(self, x: Tensor) -> list[Tensor]:
        """The classifier's representation of ``x [B, C, H, W]``, layer by layer, as the purifier takes it."""
        x = x if self._channels_last else x.contiguous()
        if self._fast is None or self._reader is None:
            layers = self.representation(x.to(self._classifier_dtype))
        else:
            with inside(x.device, self._fast[0].dtype):
                layers = self._reader[0](x.float())
            if self._purifier_dtype == torch.float32:
                return layers  # `encode` multiplies in their precision
        return [layer.to(self._purifier_dtype) for layer in layers]

    def encode(self, representation: Sequence[Tensor]) -> Tensor:
        """The condition ``[B, cond_dim]`` of what `read` returned."""
        with self._inside(representation[0].device):
            return self.condition_encoder(representation).to(self._purifier_dtype)

    def condition(self, x: Tensor) -> Tensor:
        """c(x) ``[B, cond_dim]`` of images ``x [B, C, H, W]``; differentiable to x."""
        self._check(x)
        return self._run(self._condition, x)

    def _condition(self, x: Tensor) -> Tensor:
        return self.encode(self.read(x))

    def posterior(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance ``[B, latent_dim]`` of q(z | x, c); training only."""
        normalized = (x.to(self._purifier_dtype) - self.mean) / self.std
        with self._inside(x.device):
            mean, log_variance = self.posterior_encoder(normalized, condition)
        return mean.to(self._purifier_dtype), log_variance.to(self._purifier_dtype)

    def decode(self, z: Tensor, condition: Tensor) -> Tensor:
        """Image logits ``[B, K, C, H, W]`` of latents ``[B, K, latent_dim]`` under conditions ``[B, cond_dim]``."""
        return self._run(self._decode, z, condition)

    def _decode(self, z: Tensor, condition: Tensor) -> Tensor:
        with self._inside(z.device):
            return decode_samples(self.decoder, condition, z).to(self._purifier_dtype)

    def reconstruction_logits(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Reconstructions before the sigmoid, ``[B, K, C, H, W]``; arguments as in `reconstruct`."""
        condition = self.condition(x)
        if z is None:
            z = self.prior_latents(x.shape[0], x.device)
        elif z.dim() != 3 or z.shape[0] not in (1, x.shape[0]) or z.shape[2] != self.latent_dim:
            raise ValueError(f"z must be [B, K, {self.latent_dim}] with B = {x.shape[0]} or 1, got {list(z.shape)}")
        return self.decode(z.expand(x.shape[0], -1, -1).to(condition.dtype), condition)

    def _packed_decoder(self, device: torch.device) -> PackedDecoder | None:
        """The decoder as one op: where a kernel serves it, and none of its weights may want a gradient."""
        narrow = self._fast is not None and self._fast[0].dtype == torch.bfloat16
        if self.training or not narrow or self._purifier_dtype != torch.float32 or not _packs(device):
            return None
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.decoder.parameters()):
            return None
        tensors = (*self.decoder.parameters(), *self.decoder.buffers())
        state = tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
        if self._packed is None or self._packed[0] != state:
            with torch.inference_mode(False):  # to be differentiated through, wherever it is made
                self._packed = state, PackedDecoder(self.decoder)
        return self._packed[1]

    def _images(self, x: Tensor, z: Tensor | None, draws: int = 1) -> Tensor:
        """`reconstruct`, with ``draws * K`` latents if none are given."""
        packed = None if z is not None or self.silent else self._packed_decoder(x.device)
        if packed is not None:
            seed, ids = self.noise(x.shape[0], x.device)
            return packed(self.condition(x), seed, ids.expand(x.shape[0]), draws * self.samples)
        if z is None and draws > 1:
            z = self.prior_latents(x.shape[0], x.device, draws)
        return torch.sigmoid(self.reconstruction_logits(x, z))

    def reconstruct(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Purified images in (0, 1).

        Args:
            x: ``[B, C, H, W]`` in [0, 1].
            z: latents ``[B, K, latent_dim]`` or ``[1, K, latent_dim]``; drawn from the prior if None.

        Returns:
            ``[B, K, C, H, W]``; differentiable to x.
        """
        return self._images(x, z)

    def purify(self, x: Tensor) -> Tensor:
        """`reconstruct`, by the name that attacks and evaluations know a purifier by; BPDA's gradient skips c(x)."""
        return self.reconstruct(x)

    def sample_logits(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Logits of the K reconstructions, ``[B, K, classes]``; aggregate them with `purify_fast.ops.aggregate`."""
        batch = x.shape[0]
        if torch.compiler.is_compiling() and x.device.type == "cpu" and z is None:
            # torch's choice of CPU convolution asks whether the batch reaches 16, which would cost a graph of its own
            missing = torch.sym_max(16 - batch, 0)
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 0, missing))  # type: ignore[arg-type]  # a SymInt
        return self.classify(self.reconstruct(x, z))[:batch]

    def draw_sample_logits(self, x: Tensor, draws: int) -> Tensor:
        """`sample_logits` of ``draws`` independent calls, ``[draws, B, K, classes]``: the noise enters after c(x)."""
        if self._noise != "fresh":  # every call gives the same
            return self.sample_logits(x).expand(draws, -1, -1, -1)
        return self.classify(self._images(x, None, draws)).unflatten(1, (draws, -1)).transpose(0, 1)

    # -- the published systems ----------------------------------------------------------------------------------------

    @classmethod
    def from_preset(cls, name: str, classifier: nn.Module, **changes: Any) -> Carso:
        """A published system with a fresh purifier.

        Args:
            name: of `purify_fast.methods.carso.PRESETS`: cifar10, cifar100, tiny_imagenet or mnist_v1.
            classifier: as the preset's ``build_classifier`` makes it, with weights of yours.
            changes: arguments of this class that take the place of the preset's.

        Raises:
            ValueError: an unknown name, or a classifier with other layers or another number of classes.
        """
        from .presets import preset

        made = preset(name)
        defence = cls(classifier, **{**made.arguments(), **changes})
        if defence.num_classes != made.num_classes:
            raise ValueError(
                f"classifier: it has {defence.num_classes} classes, {name} ({made.data}) has {made.num_classes}"
            )
        return defence

    @classmethod
    def from_official(
        cls,
        classifier: nn.Module,
        directory: str | Path,
        stem: str | None = None,
        *,
        layers: Sequence[str] | None = None,
        samples: int = 8,
    ) -> Carso:
        """A system from the three safetensors files of the official code, in evaluation mode.

        Args:
            classifier: the one the files were trained for; a `purify_fast.models.WideResNet` brings its layers.
            directory: where ``{stem}_repr_compressors``, ``{stem}_repr_fcn_compressor`` and ``{stem}_decoder`` are.
            stem: their common name; None if there is one system in the directory.
            layers: the representation's modules. samples: K.

        Every size is the files'. They hold no posterior encoder: it is fresh, which matters to training only.

        Raises:
            FileNotFoundError: a file is missing. ValueError: it names the tensors that are missing, unknown or of
                another shape, and their file.
        """
        from .official import load_official

        return load_official(classifier, directory, stem, layers=layers, samples=samples)

    def save_official(self, directory: str | Path, stem: str) -> None:
        """Write the three files that `from_official` reads; ValueError if they cannot hold this defence."""
        from .official import save_official

        save_official(self, directory, stem)

    # -- training and files -------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, config: CarsoConfig | None = None) -> Tensor:
        """The loss of one batch, for a loop of your own; backward and the optimiser's step are yours.

        Args:
            batch: images in [0, 1], labels, sample indices, seed, epoch and epochs (`purify_fast.training.Batch`); left
                out, the last two say that the first epoch of the schedule never ends, without a KL term.
            config: `CarsoConfig`; its attack_target chooses the published training or the one through the pipeline.
        """
        from .config import CarsoConfig
        from .task import training_loss

        return training_loss(self, batch, config or CarsoConfig())[0]

    def save(self, folder: str | Path) -> None:
        """Write the purifier, and a classifier trained with it, to ``folder`` for `purify_fast.load_defence`."""
        from ...training.defences import save_defence

        save_defence(self, folder)

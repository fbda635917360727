"""CARSO: purification conditioned on the classifier's internal representation of the image.

    c = condition(x) = encode(read(x));   x_k = sigmoid(decode(z_k, c)),  z_k ~ N(0, I),  k = 1 .. K
    logits_i = logsumexp_k classify(x_k)_i

Ballarin, Ansuini, Bortolussi: "Blending adversarial training and representation-conditional purification via
aggregation improves adversarial robustness", arXiv 2306.06081. logsumexp makes the same decisions as the paper's
aggregation (PeeL), whose logits can be infinite and whose gradients can be NaN.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..._settings import dtype_of
from ..._validation import check_counts
from ...defences.base import Defence
from ...models.layers import Representation, normalization
from ...ops.decode_samples import latents
from ...speed.decoding import PackedDecoder, kernel_decodes
from ...speed.watch import Watch
from ..saving import save_defence
from .networks import ConditionEncoder, Decoder, Deconvolution, Plan, PosteriorEncoder, decoder_plan

DecoderPlan = tuple[Sequence[int], Sequence[Deconvolution | Mapping[str, Any]]]


class Carso(Defence):
    """A classifier behind CARSO's purifier. The module maps images in [0, 1] to finite logits.

    `purify_fast.methods.recipes` builds the published systems, and `load_official` reads the published files. Every
    call draws a fresh seed from torch's global generator. Within `fixed_noise` the seed is the caller's, and within
    `deterministic` z is 0.

    Args:
        classifier: any module from images ``[B, C, H, W]`` in [0, 1] to logits ``[B, classes]``. The defence uses a
            frozen copy in evaluation mode.
        layers: paths of the modules whose outputs form the representation: maps ``[B, C, H, W]``, tokens ``[B, T, D]``
            or vectors ``[B, F]``.
        image_shape: (C, H, W).
        cond_dim: size of the condition c.
        latent_dim: size of the latent z.
        samples: K, reconstructions per prediction.
        decoder_width: channels of the decoder's last hidden layer. They double from layer to layer towards the start,
            up to eight times this number.
        encoder_depth: blocks per pre-encoder.
        mean: mean by which the posterior encoder normalizes its input, a number or a list with a number per channel.
        std: standard deviation in the same form, above 0.
        decoder: (start, layers): the shape (C, h, w) of the decoder's first map, and the decoder's layers, each as a
            `Deconvolution` or as a dictionary of its fields. None means `decoder_plan` for image_shape and
            decoder_width. `published_decoder` returns the paper's decoders.

    Raises:
        ValueError: a setting is out of range, a layer is unknown, or the classifier does not accept the images.
    """

    draws_for_each_image = True
    not_dependencies = frozenset({"_packed_from"})
    decoder: Decoder
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
    ):
        super().__init__(classifier, image_shape)
        sizes = {"cond_dim": cond_dim, "latent_dim": latent_dim, "samples": samples, "decoder_width": decoder_width}
        sizes["encoder_depth"] = encoder_depth
        check_counts(**sizes)
        statistics = normalization(mean, std, self.image_shape[0])
        if decoder is not None:
            (channels, h, w), parts = decoder
            plan: Plan = (channels, h, w), [x if isinstance(x, Deconvolution) else Deconvolution(**x) for x in parts]
        else:
            plan = decoder_plan(self.image_shape, decoder_width)
        self.arguments: dict[str, Any] = {
            "layers": list(layers),
            "image_shape": list(self.image_shape),
            **sizes,
            **statistics,
            "decoder": None if decoder is None else json.loads(json.dumps([plan[0], [asdict(x) for x in plan[1]]])),
        }
        self.latent_dim, self.samples = latent_dim, samples
        self.representation = Representation(self.classifier, layers, self.image_shape)
        self.num_classes = self.representation.num_classes
        self.condition_encoder = ConditionEncoder(self.representation.shapes, cond_dim, encoder_depth)
        self.posterior_encoder = PosteriorEncoder(self.image_shape, cond_dim, latent_dim)
        self.decoder = Decoder(latent_dim, cond_dim, self.image_shape, *plan)
        for name, values in statistics.items():
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)
        # On a CPU, this layout makes the whole pipeline about 2 times as fast, and transposed convolutions 3 times.
        for part in (self.condition_encoder, self.posterior_encoder, self.decoder):
            part.to(memory_format=torch.channels_last)
        self._packed: PackedDecoder | None = None
        #: Watches the weights that were packed; None if they may have changed since.
        self._packed_from: Watch | None = None
        self._ready()

    # -- a prediction: condition -> decode -> classify -> aggregate ----------------------------------------------------

    def sample_logits(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Return the logits of the K purified images, ``[B, K, classes]``. None draws ``z`` (see `purify`)."""
        return self.classify(self.purify(x, z=z))

    def purify(self, x: Tensor, draws: int = 1, z: Tensor | None = None) -> Tensor:
        """Return purified images in (0, 1), ``[B, draws * K, C, H, W]``. The gradient reaches x.

        ``z`` is ``[B, K, latent_dim]`` or ``[1, K, latent_dim]``; None draws ``draws`` sets of K latents from the
        prior.
        """
        self.check_images(x)
        condition, count = self.condition(x), draws * self.samples
        if z is None and (packed := self._packed_decoder()) is not None:
            seed, ids = self.noise(len(x), x.device)
            # In the memory format of the classifier, so that no copy lies between decoder and classifier.
            return packed(condition, seed, ids.expand(len(x)), count, channels_last=self.classifier_uses_channels_last)
        z = self.prior_latents(len(x), count, x.device) if z is None else z
        return torch.sigmoid(self.decode(z.expand(x.shape[0], -1, -1), condition))

    # -- the parts of a prediction ------------------------------------------------------------------------------------

    def condition(self, x: Tensor) -> Tensor:
        """Return the condition c(x), ``[B, cond_dim]``, of images in [0, 1]. The gradient reaches x."""
        return self.encode(self.read(x))

    def encode(self, representation: list[Tensor]) -> Tensor:
        """Return the condition, ``[B, cond_dim]``, of the outputs of the classifier's ``layers`` (see `read`)."""
        with self._products(representation[0].device):
            return self.condition_encoder(representation).to(self.purifier_dtype)

    def read(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of the classifier's ``layers`` for images in [0, 1], in the purifier's dtype."""
        self._follow()
        x = x if self.classifier_uses_channels_last else x.contiguous()
        with self._products(x.device):
            layers = self.representation(x.to(self.classifier_dtype))
        # In a copy, the encoder computes in the dtype of the layers, so no cast is needed here.
        return layers if self.compute_dtype is not None else [layer.to(self.purifier_dtype) for layer in layers]

    def prior_latents(self, n: int, k: int, device: torch.device) -> Tensor:
        """Draw latents ``[n, k, latent_dim]`` in the current noise mode; without noise, k is 1 and z is 0."""
        if self.noise_is_off:
            return torch.zeros((n, 1, self.latent_dim), device=device)
        return latents(*self.noise(n, device), k, self.latent_dim).expand(n, -1, -1)

    def decode(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return the images before the sigmoid, ``[B, K, C, H, W]``, of latents ``[B, K, latent_dim]``."""
        with self._products(z.device):
            images = self.decoder(z.to(condition.dtype), condition)
        return images.unflatten(0, z.shape[:2]).to(self.purifier_dtype)

    def posterior(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of q(z | x, c), each ``[B, latent_dim]``, for the training."""
        normalized = (x.to(self.purifier_dtype) - self.mean) / self.std
        with self._products(x.device):
            mean, log_variance = self.posterior_encoder(normalized, condition)
        return mean.to(self.purifier_dtype), log_variance.to(self.purifier_dtype)

    # -- speed --------------------------------------------------------------------------------------------------------

    @property
    def purifier_dtype(self) -> torch.dtype:
        return dtype_of(self.decoder)

    @property
    def _packs(self) -> bool:
        bias = self.decoder.stack[-1].get_parameter("bias")
        return self.compute_dtype == torch.bfloat16 and not self.decoder.training and kernel_decodes(bias.device)

    def prepare_replay(self) -> None:
        """Follow the model, and pack the decoder's weights again if they may have changed."""
        super().prepare_replay()
        if self._packs and (self._packed_from is None or self._packed_from.changed()):
            # Attacks differentiate through the packed part, and autograd refuses tensors from inference mode.
            with torch.inference_mode(False), torch.no_grad():
                packed = PackedDecoder(self.decoder)
            # Captured steps read the memory of the earlier packed part, so it gets the new weights.
            for old, new in zip(() if self._packed is None else self._packed.buffers(), packed.buffers(), strict=False):
                old.data.copy_(new)
            self._packed, self._packed_from = self._packed or packed, Watch(self.decoder)

    def update(self, in_place: bool = True) -> None:
        super().update(in_place)
        self._packed_from = None

    def _packed_decoder(self) -> PackedDecoder | None:
        """The kernel that draws and decodes the latents; None without noise, or if the decoder needs gradients."""
        learns = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.decoder.parameters())
        return None if self.noise_is_off or learns or not self._packs else self._packed

    save = save_defence

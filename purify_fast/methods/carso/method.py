"""The description of CARSO, and the options of its training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...training import FitConfig
from ..trainings import FollowsRecipe, KeepsAttacks, Method, TrainPurifier, saved_start
from .config import CarsoConfig

if TYPE_CHECKING:
    from ...data import DataSet
    from ..publication import Recipe
    from . import CarsoTask

_SIZES = ("layers", "cond_dim", "latent_dim", "samples")


@dataclass(frozen=True)
class TrainCarso(KeepsAttacks, FollowsRecipe, TrainPurifier):
    """Train CARSO's purifier on a saved classifier, with the paper's objective or through the pipeline.

    An interrupted training continues if the same command is run again.

    Args:
        init: Folder of a saved CARSO from which the training starts, such as to fine-tune it. It sets the sizes.
        layers: Names of the classifier's layers whose outputs form the representation. Default, for small_cnn only:
            conv2, conv4 and hidden.
        cond_dim: Size of the condition, the vector to which the representation is compressed.
        latent_dim: Size of the random latent vector of each sample.
        samples: Number of reconstructions that are classified for each image.
        decoder_width: Number of channels in the decoder's last hidden layer. Earlier layers have up to 8 times as many.
    """

    called: ClassVar[str] = "train carso"
    no_effect: ClassVar = {
        ("beside", "init"): (*_SIZES, "decoder_width"),
        ("beside", "recipe"): ("init", "decoder_width"),
    }

    out: Path = Path("runs/carso")
    init: Path | None = None
    layers: tuple[str, ...] = ()
    cond_dim: int = 64
    latent_dim: int = 8
    samples: int = 8
    decoder_width: int = 8
    method: CarsoConfig = field(default_factory=CarsoConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=40, batch_size=64))

    @staticmethod
    def sizes_of(recipe: Recipe, official_code: bool) -> dict[str, Any]:
        return {name: recipe[f"defence.{name}"] for name in _SIZES}

    def task(self, images: DataSet, classifier: Any) -> CarsoTask:
        from ..._hashes import weights_fingerprint
        from ...data import statistics
        from ...models.classifiers import SmallCNN
        from ...models.layers import layers_missing
        from ..recipes import recipe
        from . import Carso, CarsoTask

        if self.init is not None:
            defence = saved_start(Carso, self.init, classifier)
            return CarsoTask(defence, self.method, weights_fingerprint(defence))
        sizes: dict[str, Any] = {name: getattr(self, name) for name in _SIZES}
        if not self.layers:
            if not isinstance(classifier, SmallCNN):
                advice = "name modules whose outputs form the representation"
                raise layers_missing(classifier, images.image_shape, advice)
            sizes["layers"] = ("conv2", "conv4", "hidden")
        if self.recipe is None:
            sizes |= {"image_shape": images.image_shape, "decoder_width": self.decoder_width}
            return CarsoTask(Carso(classifier, **sizes), self.method)
        published = recipe(self.recipe)
        same = images.name == published["data.name"] and images.image_shape[0] == published.image_shape[0]
        mean, std = (None, None) if same else statistics(images.x_train)
        own = published.for_data(images.image_shape, images.num_classes, mean=mean, std=std)
        return CarsoTask(own.defence(classifier, **sizes), self.method)


METHOD = Method((TrainCarso,), defence="Carso", recipes=True)

"""A training of each method that is killed in the middle of an epoch, and goes on, ends with the same weights."""

from functools import partial

import pytest
import torch
import torchvision
from small_models import atop as atop_defence, first_digits
from small_runs import StopAt, Stopped, arrest_task, atop_task, attack, carso_task
from torch.nn import functional as F

from purify_fast import Carso, data
from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.methods.atop import AtopConfig, AtopTask
from purify_fast.methods.carso import CarsoConfig, CarsoTask
from purify_fast.models import PreActResNet18
from purify_fast.training import Batch, ClassifierConfig, ClassifierTask, FitConfig, fit
from purify_fast.training.checkpoint import read_tree

arrest = partial(arrest_task, network=partial(PreActResNet18, in_channels=1))
atop = partial(atop_task, cls_delay=1, learning_rate=1e-3)
carso = partial(carso_task, kl_delay=0.0)
FINETUNED = {"optimizer": "adamw", "schedule": "one_cycle", "learning_rate": 1e-2, "ema_decay": 0.5}
TASKS = {
    "arrest": arrest,
    "arrest, average": partial(arrest, ema_decay=0.9),
    "arrest, bfloat16": partial(arrest, precision="bfloat16", drift_mode="train"),
    "arrest, AdamW": partial(arrest_task, **FINETUNED),
    "atop": atop,
    "atop, discriminator": partial(atop, gan_grad=True, discriminator_width=2),
    "carso": partial(carso, optimizer="radam_lookahead", lookahead_steps=2),
    "carso, pipeline": partial(carso, "pipeline"),
}


SHAPE = (3, 32, 32)
#: Networks of others, large enough for a frozen copy, each with a layer whose output a method reads.
OTHERS = {
    "resnet18": (torchvision.models.resnet18, "layer3"),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, "features.8"),
    "transformer": (
        partial(torchvision.models.VisionTransformer, 32, 8, 4, 2, hidden_dim=96, mlp_dim=384),
        "encoder.layers.encoder_layer_1",
    ),
}


def on_a_network_of_others(method, network):
    """A training of a method on a network of another package."""
    build, layer = OTHERS[network]
    net, options = build(num_classes=10), {"attack": attack(), "learning_rate": 1e-3}
    if method == "classifier":
        return ClassifierTask(net, ClassifierConfig(**options))
    if method == "arrest":
        return ArrestTask(net, ArrestConfig(**options), SHAPE, [layer])
    if method == "atop":
        return AtopTask(
            atop_defence(classifier=net.eval(), shape=SHAPE), AtopConfig(**options, attack_method="pgd", cls_delay=0)
        )
    return CarsoTask(Carso(net.eval(), [layer], SHAPE, 8, 4, 2, decoder_width=2), CarsoConfig(**options, kl_delay=0.0))


TASKS |= {
    f"{method}, {network}": partial(on_a_network_of_others, method, network)
    for method in ("classifier", "arrest", "carso", "atop")
    for network in OTHERS
}


def trained(name, folder, *callbacks):
    """The checkpoint and the result of six steps."""
    torch.manual_seed(0)
    task, config = TASKS[name](), FitConfig(2, 8, 3, checkpoint_seconds=0)
    x, y = first_digits(24)
    if name.endswith(tuple(OTHERS)):
        x = F.interpolate(x.float(), SHAPE[1:]).byte().expand(-1, 3, -1, -1)
    fit(task, x, y, config, folder, callbacks=callbacks)
    return read_tree(folder / "checkpoint.safetensors"), task.result.state_dict()


#: Their parts are those of other trainings here.
SLOW = (
    *("arrest, average", "arrest, AdamW", "atop, discriminator"),
    *(f"{method}, {network}" for method in ("carso", "atop") for network in OTHERS),
    *("classifier, resnet18", "arrest, resnet18", "classifier, mobilenet_v3_small"),
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TASKS])
@pytest.mark.filterwarnings("ignore:the frozen copy of")
def test_killed_and_resumed_training_is_the_same(name, tmp_path):
    one, whole = trained(name, tmp_path / "whole")
    with pytest.raises(Stopped):
        trained(name, tmp_path / "cut", StopAt(5))
    two, resumed = trained(name, tmp_path / "cut")
    assert one["step"] == two["step"] == 6 and one["last"] == two["last"]
    assert one["model"].keys() == two["model"].keys()
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_held_out_images_get_the_same_noise_from_any_number_of_processes(monkeypatch):
    made, digits = carso("pipeline"), data.load_dataset("digits")
    batch = Batch(digits.x_test[:8].float() / 255, digits.y_test[:8], torch.arange(8), seed=1, whole=True)
    torch.manual_seed(1)
    alone = made.validate(batch)
    torch.manual_seed(1)
    monkeypatch.setattr("purify_fast.methods.purifier_task.processes", lambda: (0, 2))
    assert made.validate(batch) == alone

"""What README of version 0.1.0 showed still runs, and each old name warns with the new one.

Today's page and the documentation are run by tests/docs/test_code_blocks.py.
"""

import dataclasses
import re
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import purify_fast
from purify_fast import cli
from purify_fast.methods.atop import DeepFillGenerator
from purify_fast.methods.carso import PRESETS, Carso
from purify_fast.models.wide_resnet import representation_layers

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_models import Halved, Linear

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).with_name("readme_0_1.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [
    line
    for block in re.findall(r"```\n(purify-fast.*?)```", PAGE, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
#: What takes long is made short; the names and the shapes stay.
SHORTER = {
    r"^classifier = \.\.\..*$": "",
    r"steps=100": "steps=2",
    r"epochs=20\b": "epochs=1",
    r"eps=8 / 255, base=classifier\)": "eps=8 / 255, base=classifier, attacks=[])",
}


def run(snippet, **names):
    """Run a snippet; its names, and the old names that warned with the new ones."""
    for long, short in SHORTER.items():
        snippet = re.sub(long, short, snippet, flags=re.MULTILINE)
    torch.manual_seed(0)
    scope = {
        "purify_fast": purify_fast,
        "torch": torch,
        "x": torch.rand(4, 3, 32, 32),
        "x_uint8": torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8),
        "y": torch.arange(4),
        **names,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecationWarning)
        exec(compile(snippet, "README", "exec"), scope)
    found = [str(w.message) for w in caught if "goes in the next release" in str(w.message)]
    return scope, dict.fromkeys(found)


def assert_warned(found, *pairs):
    """Each (old, new) is in one of the warnings."""
    for old, new in pairs:
        assert any(old in message.split(" is deprecated")[0] and new in message for message in found), (old, found)


class Layers(nn.Module):
    """A classifier whose layers are called as torchvision calls a ResNet's."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.layer3 = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.layer4 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.layer3(self.layer1(2 * x - 1).relu()).relu()
        return self.head(self.layer4(x).relu().mean((2, 3)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Layers().eval()


def test_all_snippets_are_held():
    assert len(PYTHON) == 6 and len(COMMANDS) == 12


def test_a_defence_is_made_attacked_and_evaluated(network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # compiling takes a minute, and is tested elsewhere
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    scope, found = run(PYTHON[0], classifier=network)
    assert scope["logits"].shape == scope["same"].shape == (4, 10) and (tmp_path / "report" / "report.md").is_file()
    assert_warned(found, ("'eot'", "eot_iter"))


def test_a_list_of_attacks_is_run(tmp_path):
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    defence = purify_fast.Atop(Linear(3 * 8 * 8), Halved(), (3, 8, 8))
    x, y = torch.rand(2, 3, 8, 8), torch.arange(2)
    # torchattacks is not needed to see that a function is a row; the evaluation of a loader repeats the default one
    snippet = PYTHON[1].replace("torchattacks.PGD(model, eps=8 / 255)(x, y)", "x")
    snippet = re.sub(r"^evaluate\(defence, loader.*$", "", snippet, flags=re.MULTILINE)
    _, found = run(snippet, defence=defence, x=x, y=y)
    assert_warned(found, ("Attack", "PGD"))


def test_the_published_systems(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"depth": 10, "width": 1, "cond_dim": 8, "latent_dim": 2, "layers": representation_layers(10)}
    monkeypatch.setitem(PRESETS, "cifar10", dataclasses.replace(PRESETS["cifar10"], **sizes))
    classifier = PRESETS["cifar10"].build_classifier()
    Carso.from_preset("cifar10", classifier).save_official("models", "wrn_28_10_cifar_10_cui_2023")
    scope, found = run(PYTHON[2])
    assert len(list(Path("models").glob("mine*"))) == 3 and scope["task"].config.reduction == "sum"
    for name in ("PRESETS", "Carso", "CarsoTask"):
        assert_warned(found, (f"purify_fast.carso.{name}", f"purify_fast.methods.carso.{name}"))


def test_atop_is_trained_saved_and_loaded(network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope, found = run(PYTHON[3], classifier=network, y=torch.arange(16) % 10, x=torch.rand(16, 3, 32, 32))
    assert scope["images"].shape == (16, 1, 3, 32, 32)
    assert_warned(
        found,
        ("purify_fast.atop.Atop", "purify_fast.methods.atop.Atop"),
        ("'missing'", "mask_ratio"),
        ("attack='pgd'", "attack_method"),
        ("warm_up", "cls_delay_epochs"),
        ("purify_fast.load", "purify_fast.load_defence"),
    )


def test_purifiers_of_ones_own(network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    DeepFillGenerator(5, 4).save_official("states_pt_places2.pth")
    names = {"DeepFillGenerator": DeepFillGenerator, "Atop": purify_fast.Atop}
    scope, found = run(PYTHON[4], classifier=network, classifier_256=Linear(3 * 256 * 256), **names)
    assert (tmp_path / "mine.pth").is_file() and scope["defence"].samples == 2
    assert_warned(found, ("'parts'", "num_passes"), ("purify_fast.load", "purify_fast.load_defence"))


def test_arrest_and_carso_on_it(network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippet = PYTHON[5].replace("flip=True)", "flip=True, batch_size=16)")
    scope, found = run(snippet, classifier=network, y=torch.arange(16) % 10)
    assert isinstance(scope["defence"], Carso)
    assert_warned(found, ("purify_fast.arrest.ArrestTask", "purify_fast.methods.arrest.ArrestTask"))


@pytest.mark.parametrize(
    ("statement", "old", "new"),
    [
        ("purify_fast.load", "purify_fast.load", "purify_fast.load_defence"),
        ("purify_fast.training.keep_memory", "purify_fast.training.keep_memory", "retain_freed_memory"),
        ("from purify_fast.nn import PackedDecoder", "purify_fast.nn.PackedDecoder", "purify_fast.methods.carso"),
        ("from purify_fast.evaluation import Attack; Attack('pgd')", "Attack", "PGD"),
        ("from purify_fast.carso import CarsoConfig; CarsoConfig(eps=0.3)", "attack's own settings", "TrainingAttack"),
        ("from purify_fast.carso import CarsoConfig; CarsoConfig(lag=0.3)", "lag", "kl_delay"),
    ],
)
def test_names_in_the_text_of_the_page(statement, old, new):
    _, found = run(statement)
    assert_warned(found, (old, new))


def test_a_name_that_never_was_is_an_error():
    for statement in ("purify_fast.loads", "purify_fast.training.nothing", "from purify_fast.nn import Nothing"):
        with pytest.raises((AttributeError, ImportError)):
            run(statement)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_is_read(line, monkeypatch, capsys):
    ran = []
    for command in (cli.Train, cli.Ablate, cli.Evaluate, cli.Info):
        monkeypatch.setattr(command, "run", lambda self: ran.append(self))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecationWarning)
        assert cli.main(shlex.split(line, comments=True)[1:]) == 0, capsys.readouterr().err
    assert len(ran) == 1
    found = [str(w.message) for w in caught]
    command = " ".join(shlex.split(line)[1:3])
    renamed = {"train atop": {"--attack": "--attack-method", "--warm-up": "--cls-delay-epochs"}}
    renamed |= {name: {"--warm-up": "--eps-warmup"} for name in ("train arrest", "ablate arrest")}
    for old, new in renamed.get(command, {}).items():
        if old in shlex.split(line):
            assert_warned(found, (f"the option {old} of", new))

"""Models are packed into the zoo by a command, with a card that says what two protocols left of them."""

import shutil

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks.robustness import pack_zoo, revisions
from purify_fast import zoo as packed
from purify_fast.attacks import APGD, PGD
from purify_fast.data import load_dataset
from purify_fast.defences import MajorityVote
from purify_fast.training.run import read_model
from purify_fast.zoo import Accuracy, read_card


def asked(*options):
    """What the command line reads."""
    parser = program.argparse.ArgumentParser()
    pack_zoo.arguments(parser)
    return parser.parse_args(list(options))


def test_a_model_is_packed_and_judged_by_both_protocols(tmp_path, monkeypatch):
    models, source = tmp_path / "models", tmp_path / "trained"
    shutil.copytree(packed.folder("digits-standard"), source)
    (source / "card.json").unlink()
    # the longer protocol takes a minute even on few images
    monkeypatch.setattr(pack_zoo, "PROTOCOLS", {"standard": 1.0, "fast": 0.5})
    chosen = asked(f"digits-standard={source}", "--images", "10", "--out", str(tmp_path / "out"))
    pack_zoo.main(chosen, models)
    folder = models / "digits-standard"
    card = read_card(folder)
    assert (folder / "model.safetensors").is_file()
    assert card.attacked["standard"].images == 10 and card.attacked["fast"].images == 5
    assert card.clean.images > 300 and card.clean.share > 0.9
    # a number of other attacks than today's is marked
    assert "†" not in "".join(pack_zoo.table([card]))
    monkeypatch.setattr(APGD, "revision", lambda self: "another")
    revisions.short.cache_clear()
    cells = pack_zoo.table([card])[4].split("|")
    assert [cell.strip().endswith("†") for cell in cells] == [False] * 5 + [True, True, False]
    monkeypatch.undo()
    revisions.short.cache_clear()
    monkeypatch.setattr(pack_zoo, "PROTOCOLS", {"standard": 1.0, "fast": 0.5})
    assert (tmp_path / "out" / "digits-standard" / "standard" / "report.html").is_file()
    # a card that is written again needs no training's folder, and takes the attacks that were done
    again = asked("digits-standard", "--images", "10", "--out", str(tmp_path / "out"))
    pack_zoo.main(again, models)
    assert read_card(folder) == card


@pytest.fixture
def small_zoo(tmp_path, monkeypatch):
    """A zoo of one classifier, and protocols that take a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pack_zoo, "PROTOCOLS", {"fast": 1.0})
    shutil.copytree(packed.folder("digits-pgd-at"), tmp_path / "models" / "digits-pgd-at")
    return tmp_path / "models"


@pytest.mark.slow
def test_a_defence_shares_its_classifier_and_is_judged_as_it_is_stored(small_zoo, monkeypatch):
    name = "digits-carso-pipeline"
    monkeypatch.setattr(pack_zoo, "LARGEST", (packed.folder(name) / "model.safetensors").stat().st_size - 1)
    judged = []
    monkeypatch.setattr(pack_zoo, "clean_accuracy", lambda model, _: judged.append(model) or Accuracy(0.5, 2))
    source = packed.folder(name)
    pack_zoo.main(asked(f"{name}={source}", "--images", "2"), small_zoo)
    card = read_card(small_zoo / name)
    assert card.classifier == "digits-pgd-at" and not (small_zoo / name / "classifier").exists()
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (small_zoo / name, source)]
    assert sizes[0] < 0.6 * sizes[1]
    assert card.size == sizes[0] and card.sha256 != packed.card(name).sha256
    weights = {key: value for key, value in judged[0].state_dict().items() if not key.startswith("classifier.")}
    exact = packed.load(name).state_dict()
    floats = {key: value for key, value in weights.items() if value.is_floating_point()}
    assert all(torch.equal(value, exact[key].bfloat16().float()) for key, value in floats.items())
    # the classifier is the one of the zoo
    assert torch.equal(judged[0].classifier.head.weight, packed.load("digits-pgd-at").head.weight)


@pytest.mark.slow
def test_a_diffusion_purifier_is_judged_by_draws_and_by_votes(tmp_path, monkeypatch):
    asked = {}

    def evaluate(model, x, y, out, **options):
        asked[out.name] = (
            len(x),
            tuple(options.get(name) for name in ("protocol", "n_eval")),
            isinstance(model, MajorityVote),
        )
        return real(
            model, x[:2], y[:2], eps=0.1, attacks=[PGD(steps=1)], name=options["name"], n_eval=options.get("n_eval")
        )

    real = pack_zoo.evaluate
    monkeypatch.setattr(pack_zoo, "evaluate", evaluate)
    monkeypatch.setattr(pack_zoo, "clean_accuracy", lambda *_: Accuracy(0.5, 2))
    name = "digits-diffpure"
    card = pack_zoo.judge(packed.card(name), packed.load(name), 8, load_dataset("digits"), tmp_path)
    votes = 2, ("rand", 1), True
    assert asked == {"rand": (8, ("rand", None), False), "strong": (2, ("strong", None), False), "votes": votes}
    assert list(card.attacked) == ["rand", "strong", "votes"]
    # the strictest number and the mean of one draw stand beside each other
    rand = card.attacked["rand"]
    assert rand.share <= rand.one_draw <= 1 and f"{100 * rand.one_draw:.1f} % in one draw" in str(card)
    assert any(f"one draw {100 * rand.one_draw:.1f}" in line for line in pack_zoo.table([card]))


def test_what_is_too_large_in_float32_is_stored_in_bfloat16():
    for name in packed.list():
        _, state = read_model(packed.folder(name))
        kinds = {value.dtype for value in state.values() if value.is_floating_point()}
        whole = sum(4 * value.numel() for value in state.values())
        assert kinds == {torch.bfloat16} or (kinds == {torch.float32} and whole <= pack_zoo.LARGEST), name

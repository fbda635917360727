"""Models are packed into the zoo by a command, with a card that says what two protocols left of them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from purify_fast import zoo as packed
from purify_fast.zoo.cards import read_card

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import __main__ as program  # noqa: E402
from benchmarks import zoo  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_model_is_packed_and_judged_by_both_protocols(tmp_path, monkeypatch):
    models, source = tmp_path / "models", tmp_path / "trained"
    shutil.copytree(packed.folder("digits-standard"), source)
    (source / "card.json").unlink()
    # the longer protocol takes a minute even on few images
    monkeypatch.setattr(zoo, "PROTOCOLS", {"standard": 1.0, "fast": 0.5})
    parser = program.argparse.ArgumentParser()
    zoo.add_arguments(parser)
    chosen = parser.parse_args([f"digits-standard={source}", "--images", "10", "--out", str(tmp_path / "out")])
    (card,) = zoo.main(chosen, models)
    folder = models / "digits-standard"
    assert read_card(folder) == card and (folder / "model.safetensors").is_file()
    assert card.attacked["standard"].images == 10 and card.attacked["fast"].images == 5
    assert card.clean.images > 300 and card.clean.share > 0.9
    assert (tmp_path / "out" / "digits-standard" / "standard" / "report.html").is_file()
    # a card that is written again needs no training's folder, and takes the attacks that were done
    again = parser.parse_args(["digits-standard", "--images", "10", "--out", str(tmp_path / "out")])
    assert zoo.main(again, models) == [card]


@pytest.mark.parametrize(
    "options, message",
    [
        (["digits-best"], "there is no model 'digits-best': there are digits-standard"),
        (["digits-standard=nowhere"], "nowhere holds no model: give NAME=FOLDER"),
        (["digits-standard", "--images", "0"], "--images must be at least 1, got 0"),
        (["mnist-arrest", "--data", "nowhere"], "no data set 'mnist'"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(options, message, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "judge", lambda *_: pytest.fail("it was judged"))
    with pytest.raises(SystemExit, match="2"):
        program.main(["zoo", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "limit, message", [("LARGEST", "a model of the zoo has at most 1,000"), ("ALL", "the zoo would have")]
)
def test_what_is_too_large_is_refused_before_any_work(limit, message, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, limit, 1000)
    monkeypatch.setattr(zoo, "judge", lambda *_: pytest.fail("it was judged"))
    parser = program.argparse.ArgumentParser()
    zoo.add_arguments(parser)
    with pytest.raises(ValueError, match=message):
        zoo.main(parser.parse_args([f"digits-standard={packed.folder('digits-standard')}"]), tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_every_model_of_the_zoo_has_an_entry_that_its_card_repeats():
    for name in packed.list():
        card, entry = packed.card(name), zoo.ENTRIES[name]
        assert (card.title, card.training, card.data, card.published) == (
            entry.title, entry.training, entry.data, entry.published,
        )  # fmt: skip

"""Models are packed into the zoo by a command, with a card that says what two protocols left of them."""

import shutil

import torch

from benchmarks import __main__ as program
from benchmarks.robustness import pack_zoo, revisions
from purify_fast import zoo as packed
from purify_fast.attacks import APGD
from purify_fast.training.run import read_model
from purify_fast.zoo import read_card


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


def test_what_is_too_large_in_float32_is_stored_in_bfloat16():
    for name in packed.list():
        _, state = read_model(packed.folder(name))
        kinds = {value.dtype for value in state.values() if value.is_floating_point()}
        whole = sum(4 * value.numel() for value in state.values())
        assert kinds == {torch.bfloat16} or (kinds == {torch.float32} and whole <= pack_zoo.LARGEST), name

"""Loops of other people: the contestants agree, and the table has the numbers of the results file."""

import csv
import importlib.util
import io
from argparse import Namespace

import pytest
import torch

from benchmarks import RESULTS
from benchmarks.speed import elsewhere, sheets
from benchmarks.speed.elsewhere import Frozen, architectures, measuring
from benchmarks.speed.elsewhere.loops import PKG_RESOURCES
from purify_fast.speed.products import PER_VALUE, PRODUCTS

#: These rows need no further package.
OWN = [name for name, row in elsewhere.registry().items() if not row.package]


def measured(folder, names, **options):
    measuring.main(Namespace(names=names, quick=True, out=folder, **{"resume": False} | options))
    (path,) = folder.iterdir()
    return {row["row"]: row for row in csv.DictReader(io.StringIO(path.read_text()))}


@pytest.mark.slow
def test_this_package_and_the_expert_compute_what_the_loops_of_others_compute(tmp_path):
    rows = measured(tmp_path, OWN)
    assert list(rows) == OWN
    for name, row in rows.items():
        assert float(row["loss_ours"]) < 1e-4 and float(row["logits_ours"]) < 1e-4, name
        assert float(row["theirs_ms"]) > 0 and float(row["loss_expert"]) < 1e-4, name
        # A sign of a vanishing gradient may differ in the expert's attack.
        assert float(row["gradients_ours"]) < 1e-2 and float(row["gradients_expert"] or 0) < 1e-2, name
        assert int(row["lines_ours"]) <= 6 < int(row["lines_expert"]), name


@pytest.mark.parametrize("name", [name for name in elsewhere.registry() if name not in OWN])
def test_attacks_of_packages_run(name, tmp_path):
    package = elsewhere.registry()[name].package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "robustbench" and not PKG_RESOURCES.is_dir():
        pytest.skip("robustbench is not installed with a setuptools that has pkg_resources")
    row = measured(tmp_path, [name])[name]
    assert float(row["theirs_ms"]) > 0 and float(row["loss_expert"]) < 1e-3


def test_a_frozen_copy_follows_the_weights():
    model = elsewhere.network(small=True)
    copy = Frozen(model, torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    copy.copy.refresh()
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(copy(x), model(x))


def test_changed_lines_are_those_that_a_person_adds_and_removes():
    def before(x):
        """Return something."""
        y = x + 1
        return y

    def after(x):
        # This is a comment.
        y = x + 2
        z = y
        return z

    forms = [elsewhere.Form(before, (one,)) for one in (before, after)]
    assert elsewhere.changed_lines(*forms) == 5
    assert elsewhere.changed_lines(forms[0], elsewhere.with_our_line(forms[0])) == 2


def test_rows_with_all_times_are_kept(tmp_path, monkeypatch):
    row = {"row": OWN[0], "images": 8, "rounds": 5}
    row |= {f"{who}_ms": 1000.0 for who in measuring.CONTESTANTS} | {"ours_ms": 400.0, "expert_ms": 500.0}
    row |= {f"{key}_ours": "1.00e-03" for key in measuring.COMPARED}
    row |= {"lines_ours": 2, "lines_expert": 60, "loss_expert": "2.00e-03"}
    row |= {"bfloat16": True, "expert_dtype": "float32", "device": "a processor", "threads": 1, "torch": "2"}
    row |= {"triton": ""}
    (tmp_path / "cpu").mkdir()
    sheets.write_csv(tmp_path / "cpu" / "elsewhere.csv", [row])
    monkeypatch.setattr(measuring, "measured", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    options = {"names": [OWN[0]], "quick": False, "out": tmp_path / "cpu", "resume": True}
    assert "| **2.50** | 1.25 | 2 | 60 | 5 |" in measuring.main(Namespace(**options))
    lines = measuring.table(tmp_path)
    machine = "Measured on a processor, 1 thread, torch 2, triton absent, with instructions for bfloat16; "
    assert lines[0] == machine + "the expert computes in float32."
    assert measuring.table(tmp_path / "cpu") == ["Nothing has been measured yet."]


def test_frozen_copies_have_complete_rows_which_are_kept(tmp_path, monkeypatch):
    names = ["one", "another"]
    monkeypatch.setattr(architectures, "SIDES", dict.fromkeys(names, 8))
    monkeypatch.setattr(architectures, "network", lambda name: elsewhere.network(small=True).requires_grad_(False))
    large = {8: torch.float32, 32: torch.bfloat16}
    monkeypatch.setattr("purify_fast.speed.frozen_copy.auto_dtype", lambda model, x: large[len(x)])
    architectures.run(names, True, tmp_path, resume=False)
    rows = sheets.read_csv(tmp_path / architectures.FILE)
    whole = [(name, *kind) for name in names for kind in (("8", "float32"), ("32", "bfloat16"))]
    assert [(row["row"], row["images"], row["auto"]) for row in rows] == whole
    for row in rows:
        assert list(row)[:6] == ["row", "images", "rounds", "products", "values", "auto"]
        assert all(cell for column, cell in row.items() if column != "triton")
        assert min(float(row[f"{who}_ms"]) for who in architectures.TIMED) > 0
        # Only the linear layer is dense, because a convolution with fewer than 16 channels is too thin.
        assert int(row["products"]) == 64 * 10 and int(row["values"]) > 8 * 4 * 4 + 16 * 2 * 2 + 10
    monkeypatch.setattr(architectures, "measured", lambda *_: pytest.fail("measured again"))
    architectures.run(names, True, tmp_path, resume=True)
    assert sheets.read_csv(tmp_path / architectures.FILE) == rows


def test_the_sentences_on_copies_name_the_rows_nearest_to_a_wrong_choice(tmp_path):
    assert architectures.sentences(tmp_path) == ["Nothing has been measured yet."]
    shared = {"values": 10, "device": "a processor", "threads": 1, "torch": "2", "triton": ""}
    rows = [
        {
            "row": name,
            "images": images,
            "auto": auto,
            "model_ms": 90,
            "float32_ms": 60,
            "bfloat16_ms": low,
            "products": some,
        }
        | shared
        for name, images, auto, low, some in [
            ("dense", 8, "bfloat16", 40, 900),
            ("dense", 32, "bfloat16", 30, 900),
            ("thin", 8, "float32", 120, 200),
            ("thin", 32, "float32", 80, 200),
            ("other", 8, "float32", "", 90),
        ]
    ]
    sheets.write_csv(tmp_path / architectures.FILE, rows)
    (text,) = architectures.sentences(tmp_path)
    assert text.startswith("Measured on a processor, 1 thread, torch 2, triton absent. On a processor")
    than = "times as fast as the copy in float32"
    assert f"chose bfloat16, the copy in bfloat16 was at least 1.50 {than} (dense, 8 images)" in text
    assert f"chose float32, the copy in bfloat16 was at most 0.75 {than} (thin, 32 images)" in text


def test_the_committed_rows_of_copies_are_complete_and_follow_the_present_rule():
    rows = sheets.read_csv(RESULTS / "cpu" / architectures.FILE)
    assert [(row["row"], int(row["images"])) for row in rows] == [
        (x, n) for x in architectures.SIDES for n in architectures.IMAGES
    ]
    for row in rows:
        products, values = int(row["products"]), int(row["values"])
        dense = products >= PER_VALUE * values and int(row["images"]) * products >= PRODUCTS
        assert row["auto"] == ("bfloat16" if dense else "float32"), row["row"]
        assert all(row[f"{who}_ms"] for who in architectures.TIMED)

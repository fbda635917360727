"""Defines the report of an evaluation. It has a row for each attack, computes numbers from rows, and writes files."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.special import stdtrit

from ..._files import atomic, check_folder, write_text
from ..._settings import digest, text_hash
from ..._validation import Range, check_counts
from ...attacks import frozen
from ...protocols import Classifier
from ...speed.precision import whole_float32_by_default
from ..alarms.signs import Finding
from ..estimates import REFUTED, Estimate, chance_of_at_most
from ..request.deadline import Subject
from ..request.fingerprint import state_digest
from ..results.rows import Row
from .text import html_page, latex_table, render, short_table

FILE = "adversarial.npz"
ARRAYS = ("images", "labels", "indices", "attacks")
#: The largest number of images that a text names.
NAMED = 10
#: The number of permutations in the test if a random model fits.
PERMUTED = 9999


@dataclass(frozen=True)
class Adversarial:
    """The worst attacked image of each image that fell, within each threat model.

    Args:
        images: the attacked images, exactly as the model got them, float32 ``[W, C, H, W]``.
        labels: the true classes, int64 ``[W]``.
        indices: the indices of the images in the data, int64 ``[W]``.
        attacks: the label of the row whose attack made each image, texts ``[W]``.
        about: how the report judged: ``random``, ``n_eval``, ``predict``, ``seed`` and ``precision``. For a random
            model also ``wrong``: of some further draws, each on all images, the numbers of wrong predictions.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    attacks: np.ndarray
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.labels)

    def facts(self) -> dict[str, Any]:
        """The facts that ``report.json`` stores: ``about``, and a hash of all images."""
        arrays = map(torch.from_numpy, (self.images, self.labels, self.indices))
        content = json.dumps([digest(*arrays), self.attacks.tolist()])
        return {"hash": text_hash(content).hexdigest(), "about": self.about}

    def save(self, folder: Path) -> None:
        """Write ``adversarial.npz`` atomically."""
        with atomic(folder / FILE) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{name: getattr(self, name) for name in ARRAYS})

    @classmethod
    def load(cls, folder: Path) -> Adversarial:
        """Read the file beside a report. Raises a ValueError if it is damaged or belongs to another report."""
        facts = json.loads((folder / "report.json").read_text(encoding="utf-8")).get("adversarial")
        if facts is None:
            raise ValueError(f"{folder / 'report.json'} has no adversarial images")
        if facts["about"]["random"] and "wrong" not in facts["about"]:
            raise ValueError(f"an earlier version wrote {folder}, without draws to compare: evaluate again")
        try:
            with np.load(folder / FILE) as arrays:
                adversarial = cls(**{name: arrays[name] for name in ARRAYS}, about=facts["about"])
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{folder / FILE} is damaged, or another program wrote it: {error}") from error
        if adversarial.facts() != facts:
            raise ValueError(f"{folder / FILE} has changed since the report was saved, or belongs to another report")
        return adversarial


def gathered(points: Sequence[tuple[int, str, np.ndarray]], subject: Subject, about: dict[str, Any]) -> Adversarial:
    """Gather attacked images, each with its index in the data and the attack's label, and draws of a random model."""
    indices = np.array([index for index, _, _ in points], dtype=np.int64)
    images = np.stack([image for _, _, image in points]) if points else subject.x[:0].cpu().numpy()
    if subject.is_random:
        # By the judging draws, chance has also chosen images. So they are no measure of the draws of a check.
        x, index = map(torch.from_numpy, (images, indices))
        about = about | {"wrong": (~subject.judge(x, "check", index).right).sum(1).tolist() if points else []}
    labels, names = subject.y.cpu().numpy()[indices], np.array([name for _, name, _ in points], str)
    return Adversarial(images, labels, indices, names, about)


@dataclass(frozen=True)
class CheckedAdversarial:
    """New predictions on the adversarial images of a report.

    Args:
        adversarial: the images.
        fooled: True for the images that the model still misclassifies, by the rule of the report, bool ``[W]``.
        wrong: the number of wrong predictions of each draw.
        same_weights: whether the model has the weights of the report's model.
    """

    adversarial: Adversarial = field(repr=False)
    fooled: np.ndarray
    wrong: list[int]
    same_weights: bool = True

    @property
    def fits(self) -> bool:
        """Return True if the model may be that of the report.

        Every image must fool it. If the model of the report is random, its further draws must not be wrong less often
        than those of the report: a permutation test of all draws refuses the same model once in a hundred checks.
        """
        if not self.adversarial.about["random"]:
            return bool(self.fooled.all())
        # All images may share a draw, so whole draws are permuted. The draws as they are count as a permutation too.
        draws = np.tile(self.adversarial.about["wrong"] + self.wrong, (PERMUTED, 1))
        drawn = np.random.default_rng(0).permuted(draws, axis=1)[:, : len(self.wrong)].sum(1)
        return bool(1 + (drawn <= sum(self.wrong)).sum() > REFUTED * (1 + PERMUTED))

    def to_text(self) -> str:
        """The result as text for a terminal."""
        verdict = "which fits the report" if self.fits else "which does not fit the report"
        verdict += "" if self.same_weights else ", whose model had other weights"
        withstood, images = np.flatnonzero(~self.fooled), self.adversarial
        if images.about["random"]:
            new, old = (f"{100 * np.mean(n) / len(images):.1f} %" for n in (self.wrong, images.about["wrong"]))
            verdict += f": {new} of its single predictions are wrong, in the report {old}"
        lines = [f"{self.fooled.sum()} of {len(images)} adversarial images still fool the model, {verdict}"]
        lines += [f"  classified correctly: image {images.indices[i]} ({images.attacks[i]})" for i in withstood[:NAMED]]
        return "\n".join([*lines, *([f"  and {len(withstood) - NAMED} more"] if len(withstood) > NAMED else [])])


@whole_float32_by_default()
@torch.inference_mode(False)
def check_adversarial(
    folder: str | Path, model: Classifier, *, batch_size: int = 250, seed: int | None = None
) -> CheckedAdversarial:
    """Give the adversarial images of a saved report to a model again.

    Args:
        folder: the folder of the report.
        model: the model of the report, or another model; it computes on its own device.
        batch_size: the largest number of images in a forward pass.
        seed: seed of a random model's draws. None: another seed than the report's.

    Returns:
        A `CheckedAdversarial`.

    Raises:
        FileNotFoundError: there is no report, or no file with adversarial images.
        ValueError: the file is damaged, it has no image, it belongs to another report, or the model does not accept the
            images.
    """
    check_counts(batch_size=batch_size)
    adversarial = Adversarial.load(Path(folder))
    about = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))["about"]
    judged, got = about.get("judged"), getattr(model, "judged_as", None)
    if judged != got:
        told = [f"judged {rule}" if rule else "judged as it is" for rule in (judged, got)]
        raise ValueError(f"model must be {told[0]}, as in the report, got a model {told[1]}: see purify_fast.defences")
    images, labels = torch.from_numpy(adversarial.images), torch.from_numpy(adversarial.labels)
    seed = adversarial.about["seed"] + 1 if seed is None else seed
    Range(0).check("seed", seed)
    if len(adversarial) == 0:
        raise ValueError(f"{folder} holds no adversarial image: no attack fooled the model, so nothing can be checked")
    with torch.random.fork_rng(), torch.no_grad(), frozen(model):
        n_eval = adversarial.about["n_eval"]
        subject = Subject(model, images, labels, batch_size=batch_size, n_eval=n_eval, seed=seed)
        wrong = ~subject.judge(images, "check" if adversarial.about["random"] else "judge").right
        fooled, same = np.asarray(wrong[:n_eval].any(0)), about.get("model", "") == state_digest(model)
        return CheckedAdversarial(adversarial, fooled, wrong.sum(1).tolist(), same)


# -- the test of a claim, and the difference of two accuracies ---------------------------------------------------------

#: A claim about a model whose images share draws is tested with at least this number of draws: with fewer, a skewed
#: draw makes more errors than `REFUTED` (simulated: 7 % with 10 draws, 2 % with 20).
CLAIM_DRAWS = 50


@dataclass(frozen=True)
class ClaimTest:
    """The result of the test if a row refutes a claimed robust accuracy.

    A random model is tested by the accuracy of one draw. ``chance`` is the probability of at most ``left`` robust
    images if the claim is true: the mean over several draws of each image varies less than a single draw, so the
    binomial test of the rounded up number is cautious. If images share draws, the accuracy must also be below the claim
    in a t test with the `Estimate` of the row; ``bound`` is then the largest accuracy that it leaves at the level
    `REFUTED`. ``reason`` tells why nothing was tested.
    """

    verdict: Literal["refuted", "not refuted", "not tested"]
    claim: float
    share: float
    left: int
    images: int
    chance: float
    bound: float | None = None
    reason: str = ""


def judge_claim(claim: float, row: Row, clean: Row | None) -> ClaimTest:
    """Test a claimed robust accuracy."""
    left = math.ceil(row.mean * row.n - 1e-9)
    chance, bound, reason = chance_of_at_most(left, row.n, claim), None, ""
    refuted = chance < REFUTED
    # Predictions without a class must not refute a claim, so they are also counted as right.
    nameless = math.ceil(row.nonfinite_predictions / row.n_eval)
    by_names = chance_of_at_most(min(row.n, left + nameless), row.n, claim) < REFUTED
    if row.nothing_to_attack or (clean is not None and clean.nonfinite_predictions) or by_names != refuted:
        reason = "the model fails without an attack already, or too many of its predictions name no class"
    elif row.images_share_draws:
        estimate = row.estimate
        bound = min(1.0, estimate.mean + float(stdtrit(estimate.freedom, 1 - REFUTED)) * estimate.error)
        refuted = refuted and bound < claim
        if row.n_eval < CLAIM_DRAWS:
            reason = f"images share draws, so the test needs n_eval={CLAIM_DRAWS} predictions of each, got {row.n_eval}"
    verdict: Literal["refuted", "not refuted", "not tested"] = "refuted" if refuted else "not refuted"
    verdict = "not tested" if reason else verdict
    return ClaimTest(verdict, claim, row.mean, left, images=row.n, chance=chance, bound=bound, reason=reason)


@dataclass(frozen=True)
class Paired:
    """The difference of two accuracies on the same images.

    Args:
        difference: the difference, between -1 and 1.
        standard_error: standard error of the mean of the paired differences.
        n: number of images.
    """

    difference: float
    standard_error: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} ± {100 * self.standard_error:.1f} points (n = {self.n}, paired)"


# -- report ------------------------------------------------------------------------------------------------------------

#: Format 3 has the rule for random models by which other draws judge a point than those that chose it.
FORMAT = 3


@dataclass(repr=False)
class Report:
    """The rows of a model, with notes and alarms.

    Args:
        rows: the rows, in the order in which they were made.
        notes: remarks, each a sentence, for example on attacks that could not be run.
        about: facts about all rows, if known: ``threat`` (such as ``L-inf 8/255``), ``dataset``, ``protocol``,
            ``changed`` (settings that change the protocol, such as ``steps 5``), ``judged`` (a majority vote, fixed or
            no noise), ``seed``, ``version`` (of this package, PyTorch and Python), ``predict``, ``precision`` (if not
            float32), ``claim`` (in percent), ``date`` of the first `save`, ``command``, ``model`` (a hash of weights),
            ``processor``, ``captured`` (the CUDA graphs of attack steps, and why some steps have none), and the costs
            ``passes`` (forwards and gradients per image), ``seconds`` and ``peak_memory``.
        findings: the results of the alarms, which test whether the numbers are reliable.
        curves: the curves of accuracy over the steps and the draws of the probes, for the page.
        adversarial: the attacked images of the images that fell; None in a report that was read.
        stored: the facts about these images in a report that was read, by which `check_adversarial` knows their file.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    adversarial: Adversarial | None = field(default=None, compare=False)
    stored: dict[str, Any] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        row = self.lowest.get(None)
        lowest = "no attack" if row is None else f"{100 * row.accuracy:.1f} % under {row.attack}"
        return f"Report({len(self.rows)} rows of {self.model}; lowest: {lowest})"

    @property
    def model(self) -> str:
        """The name of the model, empty without rows; ValueError if the rows are of several models."""
        names = list(dict.fromkeys(row.model for row in self.rows))
        if len(names) > 1:
            raise ValueError(f"a report must have the rows of one model, got those of {', '.join(names)}")
        return "".join(names)

    @property
    def attacks(self) -> list[str]:
        """Return the labels of the rows, ordered: clean images, attacks, ``worst``, other threat models."""
        order = {"clean": 0, "worst": 2}
        ordered = sorted(self.rows, key=lambda row: 3 if row.threat is not None else order.get(row.kind, 1))
        return list(dict.fromkeys(row.attack for row in ordered))

    def row(self, attack: str) -> Row:
        """The row of an attack, by its label.

        Raises:
            KeyError: there is no such row, or there are several; the message lists the rows.
        """
        rows = [row for row in self.rows if row.attack == attack]
        if len(rows) != 1:
            have = ", ".join(row.attack for row in self.rows)
            raise KeyError(f"{attack!r} must name one row, and names {len(rows)}; the report has {have}")
        return rows[0]

    def claim_test(self, row: Row | None = None) -> ClaimTest | None:
        """Test the claim of the report; None if there is no claim.

        Args:
            row: the row that tests it; None for the `headline`.
        """
        if (claim := self.about.get("claim")) is None:
            return None
        clean = next((other for other in self.rows if other.kind == "clean"), None)
        return judge_claim(float(claim) / 100, self.headline if row is None else row, clean)

    @property
    def lowest(self) -> dict[str | None, Row]:
        """Return, for each threat model (None: the report's), the attack row of lowest accuracy on the most images.

        Usually this is the row ``worst`` without a number. Rows of several models raise a ValueError, because the
        lowest of them would hide the other models.
        """

        def order(row: Row) -> tuple[int, float, bool, bool]:
            # The lowest of numbers over different images, or of draws that judge a random model, is partly luck. So
            # rows on fewer images and these draws choose no row. Among equal accuracies, prefer the row over all
            # attacks, then a reliable row.
            accuracy = 1 - float(row.share_wrong.mean())
            return -row.n, accuracy, row.kind != "worst", not row.reliable

        _ = self.model
        rows = [row for row in self.rows if row.kind != "clean"]
        threats = dict.fromkeys(sorted((row.threat for row in rows), key=bool))
        return {threat: min((row for row in rows if row.threat == threat), key=order) for threat in threats}

    @property
    def headline(self) -> Row:
        """The row of `lowest` in the report's threat model; ValueError without an attack."""
        if (row := self.lowest.get(None)) is None:
            within = f", within {self.about['threat']}" if "threat" in self.about else ""
            other = "an attack with its own eps or norm is in another ball"
            raise ValueError(f"headline needs an attack on the model{within}, got none ({other}): use row(NAME)")
        return row

    def attacks_like(self, row: Row) -> list[Row]:
        """Return the attacks on which a ``worst`` row is based; for any other row, return the row itself.

        Args:
            row: a row of this report.
        """
        same = [other for other in self.rows if other.is_attack and other.threat == row.threat and other.n >= row.n]
        return same if row.kind == "worst" else [row]

    def paired(self, other: Report, row: str = "worst", other_row: str | None = None) -> Paired:
        """The accuracy of this report's model minus the accuracy of another model, on their common images.

        Of a random model, it is the accuracy of a single prediction (`Row.mean`), and a draw is paired with the draw of
        the same number.

        Args:
            other: a report on the same data, in the same threat model.
            row: the attack's label.
            other_row: the attack's label in the other report; None takes the same label.

        Returns:
            The difference with its standard error.

        Raises:
            KeyError: there is no such row, or there are several.
            ValueError: the rows have different data, or are attacks in different threat models.
        """
        first, second = self.row(row), other.row(row if other_row is None else other_row)
        if first.data != second.data:
            raise ValueError(f"paired needs the same images, but those of {first.model} and {second.model} differ")
        threats = first.threat or self.about.get("threat"), second.threat or other.about.get("threat")
        # A report without a threat model is assumed to have the threat model of the other report.
        if "clean" not in (first.kind, second.kind) and None not in threats and threats[0] != threats[1]:
            raise ValueError(f"paired needs the same threat model, got {threats[0]} and {threats[1]}")
        n = min(first.n, second.n)
        # A deterministic model, which is judged once, is paired with every draw of the other model.
        draws = min((row.n_eval for row in (first, second) if row.n_eval > 1), default=1)
        difference = Estimate.of(first.right[:draws, :n].astype(float) - second.right[:draws, :n])
        return Paired(difference.mean, difference.error, n)

    def to_json(self) -> str:
        """The report as JSON, with all rows and the headline."""
        row = self.lowest.get(None)
        content: dict[str, Any] = {"format": FORMAT, "about": self.about}
        content["headlines"] = {} if row is None else {row.model: {"attack": row.attack, "accuracy": row.accuracy}}
        content |= {"notes": self.notes, "findings": [asdict(finding) for finding in self.findings]}
        content["curves"] = {self.model: self.curves} if self.curves else {}
        content["rows"] = [row.to_dict() for row in self.rows]
        if (facts := self.stored if self.adversarial is None else self.adversarial.facts()) is not None:
            content["adversarial"] = facts
        return json.dumps(content, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report from the result of `to_json`; ValueError for another format, or for several models."""
        content = json.loads(text)
        if content.get("format") != FORMAT:
            raise ValueError(f"the report must have format {FORMAT}, got {content.get('format')!r}: evaluate again")
        rows, findings = map(Row.from_dict, content["rows"]), [Finding(**values) for values in content["findings"]]
        curves: dict[str, Any] = next(iter(content["curves"].values()), {})
        notes, about, stored = content["notes"], content["about"], content.get("adversarial")
        report = cls([*rows], notes, about, findings=findings, curves=curves, stored=stored)
        # Earlier versions wrote reports on several models, whose numbers must not be taken for those of one.
        _ = report.model
        return report

    def to_markdown(self) -> str:
        """The report as Markdown: the headline, and all rows."""
        return render("report.md.jinja", report=self)

    def to_latex(self) -> str:
        """The rows as a table in LaTeX, with the rules of booktabs: attack, images, accuracy and gradients."""
        head, body = short_table(self.rows)
        return latex_table([dict(zip(head, cells, strict=True)) for cells in body])

    def to_html(self, defence: Classifier | None = None) -> str:
        """The report as a HTML page that loads no other files.

        Args:
            defence: the model, which makes predictions and purified images for the pictures; None: no such pictures.
        """
        return html_page(self, defence)

    @property
    def title(self) -> list[str]:
        """The known words of the title: threat model, data set, protocol, prediction rule, precision and versions."""
        changed = f", changed: {self.about['changed']}" if "changed" in self.about else ""
        values = self.about | {"protocol": self.about.get("protocol", "") + changed}
        words = {"threat": "", "dataset": "", "protocol": "protocol ", "judged": "judged ", "predict": "predict "}
        words["precision"] = "precision "
        return [word + values[name] for name, word in (words | {"version": ""}).items() if values.get(name)]

    def to_text(self) -> str:
        """Return the report as text for a terminal: title and table."""
        return render("report.txt.jinja", report=self).rstrip()

    def save(self, folder: str | Path, defence: Classifier | None = None) -> None:
        """Write ``report.html``, ``report.json``, ``report.md`` and ``adversarial.npz``.

        The last file has the arrays of `Adversarial`; a report that was read does not write it. Each file is written
        atomically. A report that is in the folder is replaced.

        Args:
            folder: folder of the report; it is made if it is missing.
            defence: the model for the pictures, see `to_html`.
        """
        folder = Path(folder)
        check_folder("folder", folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Before the report that names the file, so that no report is without its images.
        if self.adversarial is not None:
            self.adversarial.save(folder)
        self.about.setdefault("date", datetime.now().astimezone().isoformat(" ", "minutes"))
        write_text(folder / "report.json", self.to_json())
        write_text(folder / "report.md", self.to_markdown())
        # The page is written last, because the defence may raise an error on the pictures. The other files then exist.
        write_text(folder / "report.html", self.to_html(defence))

"""Claims of the K-FAC curvature edit (Merullo et al., 2025, arXiv:2510.24256).

Settings are chosen on one half of the memorised passages and on calibration text; what is said of them is measured on
the other half and on held-out text. For the bundled model, general loss leaves the memorised passages out of the text
(a fiftieth of its documents): to lose those is the aim. The curvature is that of the calibration text as it is, the
passages of both halves included at their rate in the training text, since the edit is not to know which they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...anatomy import Matrix
from ...data import Batches, Passage, Specimen, load, load_passages
from ...editing import Journal, edit
from ...editing.catalog.kfac_edit.kfac_edit import chosen_matrices, keep_share
from ...editing.catalog.kfac_edit.recitation import Recitation, recitation
from ...evaluation import evaluate_loss
from ...organism.corpus import corpus
from ...organism.tasks import evaluate as evaluate_skills
from ...probes.curvature import Curvature, curvature
from ..context import Context
from ..registry import NotApplicable, Result, Verdict, claim

PAPER = edit("kfac-edit").paper
RHOS = (0.98, 0.95, 0.9, 0.8, 0.6)
ROLES = ("gate,up", "down")
SKILLS = ("open_book", "facts", "sums")
BLOCKS = 8  # tried on their own, evenly spaced
MOST_LOSS, CHOSEN_LOSS = 1.10, 1.05  # of the unedited loss: what the claim allows, and what a choice may use up
HURT = 0.95  # of a skill's accuracy
ASKED = 400  # questions of each skill
SEQUENCES = 24  # of calibration text, on which a choice measures its loss


class Setting(NamedTuple):
    """Settings of the edit."""

    layers: str
    roles: str
    rho: float


@dataclass
class Study:
    """One model, the curvature of its MLPs, the text and the passages to choose by, and those to judge by."""

    specimen: Specimen
    bundled: bool
    choosing: Sequence[Passage]
    judging: Sequence[Passage]
    calibration: Batches
    held_out: Batches

    @cached_property
    def curvatures(self) -> dict[str, Curvature]:
        """Of every MLP matrix."""
        return curvature(self.specimen, self.specimen.anatomy.matrices(["gate", "up", "down"]))

    def weights(self, setting: Setting) -> dict[Matrix, Tensor]:
        """The matrices that a setting changes, as it leaves them."""
        matrices = chosen_matrices(self.specimen, setting.layers, setting.roles)
        return {one: keep_share(one.weight, self.curvatures[one.name], setting.rho)[0] for one in matrices}

    @contextmanager
    def changed(self, weights: Mapping[Matrix, Tensor]) -> Iterator[None]:
        """The model with other weights inside the `with`."""
        journal = Journal(self.specimen.model)
        try:
            for matrix, weight in weights.items():
                journal.write(matrix, weight)
            yield
        finally:
            journal.undo()

    def recited(self, passages: Sequence[Passage]) -> Recitation:
        return recitation(self.specimen, passages)

    def loss(self, text: Batches) -> float:
        return evaluate_loss(self.specimen.model, text).loss

    def skills(self) -> dict[str, float]:
        """Shares of right answers. Raises NotApplicable for another model than the bundled one."""
        if not self.bundled:
            raise NotApplicable("its facts, sums and open-book questions are those of the bundled model")
        return evaluate_skills(self.specimen.model, self.specimen.tokenizer, SKILLS, ASKED)

    @cached_property
    def sweep(self) -> dict[Setting, tuple[Recitation, float]]:
        """Recitation of the choosing half and loss on calibration text, by setting."""
        count = self.specimen.layers
        single = dict.fromkeys(str(number * count // min(count, BLOCKS)) for number in range(min(count, BLOCKS)))
        found = {}
        for layers in (*single, "all"):
            for roles in ROLES:
                for rho in RHOS:
                    setting = Setting(layers, roles, rho)
                    with self.changed(self.weights(setting)):
                        found[setting] = self.recited(self.choosing), self.loss(self.calibration)
        return found

    @cached_property
    def chosen(self) -> Setting:
        """The least recitation at a loss of at most `CHOSEN_LOSS` times the unedited one; of equals, the least loss."""
        limit = CHOSEN_LOSS * self.loss(self.calibration)
        allowed = {key: (said.strict, loss) for key, (said, loss) in self.sweep.items() if loss <= limit}
        if not allowed:
            raise NotApplicable(f"every edit of the sweep costs more than {CHOSEN_LOSS - 1:.0%} of general loss")
        return min(allowed, key=lambda key: allowed[key])


@lru_cache(maxsize=1)
def study_of(context: Context) -> Study:
    """Everything that the claims share. Raises NotApplicable without passages, or if the model does not recite them."""
    specimen = context.fresh()
    specimen.require_causal()
    passages = specimen.passages
    bundled = list(passages) == load_passages("organism:passages")
    calibration, held_out = specimen.text.take(SEQUENCES), context.evaluation
    if bundled:
        calibration = without_passages("calibration", SEQUENCES, specimen)
        held_out = without_passages("heldout", context.evaluation.examples, specimen)
    known = recitation(specimen, passages).strict
    if known < 0.5 or len(passages) < 4:
        raise NotApplicable(f"the model recites {known:.0%} of {len(passages)} passages: too few were memorised")
    return Study(specimen, bundled, passages[::2], passages[1::2], calibration, held_out)


def without_passages(split: str, sequences: int, specimen: Specimen) -> Batches:
    """Text of the bundled world without its memorised passages."""
    length = specimen.anatomy.config.max_position_embeddings
    lines = corpus(split, 2 * sequences * length)
    kept = [line for line in lines if not line.startswith("Record ")]
    return load(kept, specimen.model, specimen.tokenizer, sequences=sequences, full_only=True)


def _row(text: str, setting: Setting | None, said: Recitation, loss: float) -> dict[str, Any]:
    layers, roles, rho = setting or Setting("none", "none", 1.0)
    return {
        "measured": text, "layers": layers, "roles": roles, "rho": rho,
        "recited": said.strict, "likeness": said.likeness, "loss": loss,
    }  # fmt: skip


@claim(
    "kfac-edit/forgets-passages",
    method="kfac-edit",
    paper=PAPER,
    statement="Recitation of memorised passages falls under a quarter, while general loss rises by less than 10 % and "
    "open-book questions keep at least 90 % of their accuracy.",
)
def forgets_passages(context: Context) -> Result:
    """With the layers and rho that one half of the passages asks for, on the other half."""
    study = study_of(context)
    paper = Setting("paper", *(edit("kfac-edit").settings({})[name] for name in ("roles", "rho")))
    rows = [_row("chosen by", setting, *found) for setting, found in study.sweep.items()]
    measured = {}
    for name, setting in (("unedited", None), ("chosen", study.chosen), ("paper", paper)):
        with study.changed({} if setting is None else study.weights(setting)):
            said, loss = study.recited(study.judging), study.loss(study.held_out)
            measured[name] = said.strict, loss, study.skills()["open_book"] if study.bundled else float("nan")
            whole = study.loss(context.evaluation)
        rows.append(_row("judged by", setting, said, loss))
        measured[name] += (whole,)
    (_, loss, book, _), (said, edited_loss, edited_book, whole) = measured["unedited"], measured["chosen"]
    holds = said < 0.25 and edited_loss < MOST_LOSS * loss and not edited_book < 0.9 * book
    layers, roles, rho = study.chosen
    told = (
        f"Chosen on one half of the passages: rho {rho:g} in {roles} of blocks {layers}. On the other half, "
        f"{measured['unedited'][0]:.1%} recited before and {said:.1%} after; loss on held-out text"
        f"{' without passages' if study.bundled else ''} {loss:.4f} before and {edited_loss:.4f} after "
        f"({edited_loss / loss - 1:+.1%})"
        + (f", with passages {measured['unedited'][3]:.4f} and {whole:.4f}" if study.bundled else "")
        + (f"; open-book accuracy {book:.1%} before and {edited_book:.1%} after" if study.bundled else "")
        + f". The paper's choice, carried over by depth (rho {paper.rho:g} in {paper.roles}): "
        f"{measured['paper'][0]:.1%} recited at a loss of {measured['paper'][1]:.4f} "
        f"({measured['paper'][1] / loss - 1:+.1%})"
    )
    if not study.bundled:
        told += ". Open-book accuracy was not measured: there are no such questions for this model"
    return Result(Verdict.of(holds), told, rows)


@claim(
    "kfac-edit/beats-svd",
    method="kfac-edit",
    paper=PAPER,
    statement="At equal general loss, the edit leaves less recitation than truncating the SVD of the same matrices.",
)
def beats_svd(context: Context) -> Result:
    """At every rho of the sweep, in the matrices that were chosen; the SVD's rank is the one of the nearest loss."""
    study = study_of(context)
    layers, roles, _ = study.chosen
    matrices = chosen_matrices(study.specimen, layers, roles)
    spectra = {one: torch.linalg.svd(one.weight.double(), full_matrices=False) for one in matrices}

    def truncated(rank: int) -> dict[Matrix, Tensor]:
        return {one: (u[:, :rank] * s[:rank]) @ v[:rank] for one, (u, s, v) in spectra.items()}

    @cache
    def svd_loss(rank: int) -> float:
        with study.changed(truncated(rank)):
            return study.loss(study.held_out)

    @cache
    def svd_recited(rank: int) -> float:
        with study.changed(truncated(rank)):
            return study.recited(study.judging).strict

    rows, better, worse = [], 0, 0
    for rho in RHOS:
        with study.changed(study.weights(Setting(layers, roles, rho))):
            said, loss = study.recited(study.judging).strict, study.loss(study.held_out)
        below, above = 0, min(len(s) for _, s, _ in spectra.values())  # ranks that lose more and no more than the edit
        while above - below > 1:
            middle = (below + above) // 2
            below, above = (below, middle) if svd_loss(middle) <= loss else (middle, above)
        losses = svd_loss(below), svd_loss(above)
        share = min(max((loss - losses[1]) / max(losses[0] - losses[1], 1e-12), 0.0), 1.0)
        svd = share * svd_recited(below) + (1 - share) * svd_recited(above)
        rows.append({"rho": rho, "loss": loss, "recited": said, "svd_rank": above, "svd_loss": losses[1],
                     "svd_recited": svd_recited(above), "svd_at_equal_loss": svd})  # fmt: skip
        better, worse = better + (said < svd), worse + (said > svd)
    told = (
        f"In {roles} of blocks {layers}, less recitation than the SVD at equal loss at {better} of {len(RHOS)} rho, "
        f"more at {worse}. Between two ranks, the SVD's recitation is interpolated in the loss"
    )
    return Result(Verdict.of(better and not worse), told, rows)


@claim(
    "kfac-edit/what-suffers",
    method="kfac-edit",
    paper=PAPER,
    statement="Closed-book facts and arithmetic lose more of their accuracy than open-book questions.",
)
def what_suffers(context: Context) -> Result:
    """In the matrices that were chosen, at every rho of the sweep that takes a skill below `HURT` of its accuracy."""
    study = study_of(context)
    layers, roles, _ = study.chosen
    before, rows, hurt = study.skills(), [], []
    for rho in RHOS:
        with study.changed(study.weights(Setting(layers, roles, rho))):
            kept = {name: value / before[name] for name, value in study.skills().items()}
            rows.append({"rho": rho, **kept, "loss": study.loss(study.held_out)})
        if min(kept.values()) < HURT:
            hurt.append((rho, kept))
    if not hurt:
        raise NotApplicable(f"no rho of the sweep took a skill below {HURT:.0%} of its accuracy")
    holds = all(max(kept["facts"], kept["sums"]) < kept["open_book"] for _, kept in hurt)
    told = "; ".join(
        f"at rho {rho:g} open-book questions keep {kept['open_book']:.1%} of their accuracy, facts "
        f"{kept['facts']:.1%}, sums {kept['sums']:.1%}"
        for rho, kept in hurt
    )
    told = (
        f"In {roles} of blocks {layers}, with {ASKED} questions of each kind (standard errors up to 2.5 points), {told}"
    )
    return Result(Verdict.of(holds), told, rows)

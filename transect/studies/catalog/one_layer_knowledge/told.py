"""What the numbers of the study say, in sentences."""

from __future__ import annotations

from torch import Tensor

from ....probes import Result

COVERED = 0.95  # share of the templates that counts as nearly all


def findings(found: Result) -> list[str]:
    """A few sentences, from the result's arrays and labels alone."""
    told = [stored(found), *reached(found), wrong(found), covered(found), ranks(found), gradient(found), late(found),
            ablated(found)]  # fmt: skip
    return [sentence for sentence in told if sentence]


def names(found: Result, axis: str) -> list[str]:
    """The names of an axis's entries."""
    return list(found.labels[axis])


def spread(values: Tensor, digits: int) -> str:
    """The smallest and the largest, or one number where they look alike."""
    low, high = (f"{float(one):.{digits}f}" for one in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def stored(found: Result) -> str:
    """What pretraining achieves."""
    right, loss = found["stored"][0].mean(-1), found["pretraining_loss"].mean(-1)
    return (
        f"After pretraining a fact is told right behind its own template in {spread(right, 2)} of the cases, by "
        f"multiplicity (mean loss {spread(loss, 4)} nats)."
    )


def reached(found: Result) -> list[str]:
    """Questions about the others, and what is stored and not reached, by the way of fine-tuning."""
    before, after = found["before"][0].mean((0, -1)), found["after"][0].mean((1, -1))  # (K), (rank, K)
    lost, multiplicity = found["unreachable"].mean((1, -1)), names(found, "multiplicity")
    said = []
    for rank, name in enumerate(names(found, "rank")):
        by = ", ".join(
            f"{float(after[rank, k]):.2f} at multiplicity {one} (before {float(before[k]):.2f}; stored and not reached "
            f"{float(lost[rank, k]):.2f})"
            for k, one in enumerate(multiplicity)
        )
        said.append(f"With {name} fine-tuned, the share of other subjects' facts that a question reaches is {by}.")
    return said


def wrong(found: Result) -> str:
    """What stands in place of the right answer where it is missing most."""
    after = found["after"].mean((1, 2, -1))  # (kind, K)
    worst = int(after[0].argmin())
    right, attribute, subject, none = (float(share) for share in after[:, worst])
    if right == 1:
        return ""
    return (
        f"At multiplicity {names(found, 'multiplicity')[worst]} {attribute:.2f} of the questions get the answer of "
        f"another attribute of the same subject, {subject:.2f} that of another subject, {none:.2f} no answer."
    )


def covered(found: Result) -> str:
    """Whether coverage goes with what is reached."""
    coverage, after = found["coverage"], found["after"][0].mean(0)  # (tuned, K, S)
    if coverage.numel() < 3 or coverage.max() == coverage.min():
        return ""
    whole = coverage.mean(-1) >= COVERED
    reach = after.mean(-1)[whole]
    among = f" Where they cover {COVERED} or more, a question reaches {spread(reach, 2)}." if whole.any() else ""
    return (
        f"The fine-tuned subjects cover {spread(coverage.mean(-1), 2)} of an attribute's templates; over all cells and "
        f"seeds the correlation of coverage and reach is {_correlation(coverage, after, (0, 1, 2)):.2f}, and within a "
        f"multiplicity {_correlation(coverage, after, (0, 2)):.2f}.{among}"
    )


def _correlation(first: Tensor, second: Tensor, over: tuple[int, ...]) -> float:
    """Of what is left when the means over some dimensions were taken away; 0 where nothing varies."""
    a, b = (one - one.mean(over, keepdim=True) for one in (first, second))
    size = float(a.norm() * b.norm())
    return float((a * b).sum()) / size if size > 0 else 0.0


def ranks(found: Result) -> str:
    """Which way of fine-tuning reaches more."""
    after, known = found["after"][0].mean((1, 2, 3)), names(found, "rank")
    if len(known) < 2:
        return ""
    by = ", ".join(f"{float(share):.2f} with {name}" for share, name in zip(after, known, strict=True))
    return f"Over all cells a question reaches {by}."


def gradient(found: Result) -> str:
    """How much of the first fine-tuning step is one direction."""
    share, multiplicity = found["gradient_share"].mean((1, -1)), names(found, "multiplicity")  # (matrix, K)
    by = "; ".join(
        f"{name} {', '.join(f'{float(one):.2f}' for one in row)}"
        for name, row in zip(names(found, "matrix"), share, strict=True)
    )
    return (
        f"Of the energy of the first fine-tuning step's gradient, the top direction has, at multiplicity "
        f"{', '.join(multiplicity)}: {by}."
    )


def late(found: Result) -> str:
    """Where questions reached more before the budget was used up."""
    course = found["course"].mean((1, -1))  # (rank, point, K)
    said = []
    for rank, name in enumerate(names(found, "rank")):
        over = course[rank].mean(-1)
        best, end = int(over.argmax()), float(over[-1])
        if over[best] - end > 0.02:
            point = names(found, "point")[best]
            said.append(f"{name}: {float(over[best]):.2f} after {point} of the steps, {end:.2f} at the end")
    return f"More steps made the reach smaller ({'; '.join(said)})." if said else ""


def ablated(found: Result) -> str:
    """What is left without a part."""
    stored_parts, after = found["stored"].mean((1, 2)), found["parts"].mean((1, 2, 3, 4))
    left = [
        f"{name} {float(stored_parts[part]):.2f} and {float(after[part]):.2f}"
        for part, name in enumerate(names(found, "part"))
    ]
    return f"Right answers behind own templates (pretrained) and to questions (fine-tuned): {', '.join(left)}."

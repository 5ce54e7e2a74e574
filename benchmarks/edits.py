"""Facts of a real model edited, one at a time and many together: what it says afterwards, beside the probabilities.

The facts are some of `common` that the model, asked alone, says by itself, in a random order that `--seed` fixes; each
brings the new answer, which is another fact's answer to the same question, its paraphrases and its neighbours. Size 1
stands for the first `--alone` facts, each edited alone and taken back; a larger size for the first so many, edited
together. Efficacy is how papers count: the new answer is more probable than the true one, teacher-forced. Written is
what the model writes in greedy generation. `other facts` are up to 50 that were not edited and that it knew.

With `--after-another` the facts are edited one after the other instead, each in the model as the last left it: a row
after 1 and after every ten, where it collapses being what is looked for. Loss is on held-out text.

No target: the columns say what an edit is worth.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import Kept, parser, show

from transect.checkpoint import Opened, open_model
from transect.claims.fact_editing import Bench, row
from transect.data import Fact, Specimen
from transect.editing.catalog.memit import chosen as layers_of_memit
from transect.editing.places import usual_layer
from transect.evaluation import says
from transect.verbs.common import held_out_of, specimen_of

OTHERS = 50
COLUMNS = {
    "efficacy": "new above true",
    "written": "new generated",
    "efficacy, paraphrases": "above on paraphrases",
    "written, paraphrases": "generated on paraphrases",
    "neighbours before": "neighbours generated before",
    "neighbours": "neighbours generated",
    "neighbourhood score": "neighbourhood score",
    "other facts": "other facts answered",
}  # of the table, and what claims call them


def known_facts(specimen: Specimen, facts: Sequence[Fact], seed: int) -> list[Fact]:
    """Those that the model says by itself and that say what to put in, in a random order."""
    able = [fact for fact in facts if fact.new_answer and fact.new_answer != fact.answer]
    known = [fact for fact, said in zip(able, says(specimen, able), strict=True) if said]
    random.Random(seed).shuffle(known)
    return known


def measured(bench: Bench, method: str, groups: Sequence[Sequence[Fact]], others: Sequence[Fact]) -> dict[str, Any]:
    """A row: each group of facts edited together, and taken back. The first of a method collects its statistics."""
    specimen = bench.specimen
    layers = layers_of_memit(specimen, "") if method == "memit" else [usual_layer(specimen)]
    started = time.perf_counter()
    bench.moments(layers)
    statistics = time.perf_counter() - started
    started = time.perf_counter()
    found = row(method, [bench.edited(method, group, others) for group in groups])
    seconds = (time.perf_counter() - started) / len(groups)
    where = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
    return (
        {"method": method, "layers": where, "facts": len(groups[0]), "edits": len(groups)}
        | {heading: found[key] for heading, key in COLUMNS.items()}
        | {"statistics, s": statistics, "an edit, s": seconds}
    )


def one_after_another(bench: Bench, methods: Sequence[str], count: int, text: Any, name: str) -> list[dict[str, Any]]:
    """A table a method, and its rows."""
    edited, others = bench.facts[:count], bench.facts[count:][:OTHERS]
    rows = []
    for method in methods:
        found = []
        for one in bench.one_after_another(method, edited, others, text):
            found.append({heading: "-" if value != value else value for heading, value in one.items()})
            told = f"written {one['all written']:.3f}, other facts {one['other facts']:.3f}, loss {one['loss']:.4f}"
            print(f"{method}, {one['edits']} edits: {told}", file=sys.stderr, flush=True)
        rows += [{"method": method, **row} for row in found]
        title = f"{name}: {len(edited)} facts, {method} one after another; {len(others)} others"
        show(title, list(found[0]), [list(row.values()) for row in found])
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Edit, print the table, and return its rows."""
    options = parser(__doc__)
    options.add_argument("--model", help="default smollm2")
    options.add_argument("--facts", help="default common")
    options.add_argument("--data", help="text for statistics; default pydoc:calibration")
    options.add_argument("--sequences", type=int, help="of the text; default 32")
    options.add_argument("--length", type=int, help="tokens in a sequence; default 512")
    options.add_argument("--methods", default="rome,memit")
    options.add_argument("--sizes", help="facts edited together; default 1,10,50")
    options.add_argument("--alone", type=int, help="facts that are edited one at a time; default 10")
    options.add_argument("--after-another", type=int, metavar="N", help="edit N facts on top of one another")
    options.add_argument("--heldout", help="text for the loss; default pydoc:heldout")
    options.add_argument("--heldout-sequences", type=int, help="of it; default 16")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="folder that keeps each row; the same command goes on there")
    given = options.parse_args(argv)
    name = given.model or ("organism" if given.quick else "smollm2")
    own = name == "organism"
    sizes = [int(size) for size in (given.sizes or ("1,2" if given.quick else "1,10,50")).split(",")]
    specimen = specimen_of(
        open_model(name, dtype="float32"),
        given.data or ("organism:calibration" if own else "pydoc:calibration"),
        facts=given.facts or ("organism:facts" if own else "common"),
        length=given.length or (128 if own else 512),
        sequences=given.sequences or 32,
    )  # fmt: skip
    asked = specimen.facts[:40] if given.quick else specimen.facts
    known = known_facts(specimen, asked, given.seed)
    bench = Bench(specimen, known)
    if given.after_another:
        opened = Opened(specimen.model, specimen.tokenizer, specimen.tokenizer, name, None)
        text = held_out_of(
            given.heldout or ("organism:heldout" if own else "pydoc:heldout"), opened,
            given.length or (128 if own else 512), given.heldout_sequences or 16, 8, 0, "auto",
        )  # fmt: skip
        return one_after_another(bench, given.methods.split(","), given.after_another, text, name)
    common = ("model", "facts", "data", "sequences", "length", "alone", "seed")
    kept = Kept(given.out, {key: getattr(given, key) for key in common})
    alone, others = given.alone or (1 if given.quick else 10), 5 if given.quick else OTHERS
    rows = []
    for method in given.methods.split(","):
        for size in sizes:
            groups = [[fact] for fact in known[:alone]] if size == 1 else [known[:size]]
            untouched = known[alone if size == 1 else size :][:others]
            rows.append(kept.row(f"{method} {size}", partial(measured, bench, method, groups, untouched)))
            print(f"{method}, {size} facts, {len(groups)} times: {rows[-1]['an edit, s']:.0f} s each", file=sys.stderr)
    title = f"{name}: it says {len(known)} of {len(asked)} facts by itself"
    show(title, list(rows[0]), [list(one.values()) for one in rows])
    return rows


if __name__ == "__main__":
    main()

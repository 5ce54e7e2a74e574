"""Claim about decorrelation from the first token (Anand et al., ICASSP 2026, arXiv:2510.22603)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...adaptation import adapter_named
from ...adaptation.targets import targets_of
from ...data import Specimen
from ...forward import Point, at_rest, watch
from ...forward.objective import IGNORED, Batch
from ...probes.catalog.attention_sinks import Tally, paid
from ...training import Machine, Problem, Run, Schedule, Seen, State, own_loss, penalty_named, train, watching
from ..context import Context, Measured
from ..registry import NotApplicable, Result, Verdict, claim
from ..scratch import cut, fresh_rows

LENGTH, VECTORS = 64, 4  # tokens of a transcript, and the vectors that stand for it
STEPS, BATCH, RATE = 100, 8, 3e-3
SHARES = (0.1, 1.0, 10.0)  # the penalty's part of the loss at the start, over the rest
JUDGED = 64  # transcripts
THRESHOLD, RATIO, QUERIES = 0.3, 30.0, 8  # of the probe `attention-sinks`, whose defaults they are
FALL, NEAR = 10, 0.05  # how far the cosines should fall, and how near the loss should stay
LARGEST = 10_000_000  # numbers of a model that a claim trains
PLAIN = "without"


@claim(
    "attention-sinks/decorrelation",
    method="attention-sinks",
    paper="arXiv:2510.22603",
    statement="Trained on text that a few pooled vectors stand for, with the decorrelation penalty a model has fewer "
    "sinks behind its first token than without, smaller activations there, and squared cosines with the first token "
    "ten times smaller; the first token stays a sink, and the loss within five percent.",
)
def decorrelation(context: Context) -> Result:
    """A first token, four means of the embeddings of sixteen tokens each, a mark, and the text: it is learned.

    Ours, in place of the paper's speech: LoRA on all linear layers for 100 steps of 8 sequences, once without the
    penalty and with three weights of it: chosen so that at the start the penalty is a tenth of the loss, as much, and
    ten times as much. Measured on held-out text: the loss of the text; sinks (tokens behind the first that draw more
    than 0.3 of the attention, mean over the heads of a block) summed over blocks, a sequence; the largest magnitude
    behind the first token; the mean squared cosine of the vectors and the mark with the first token's state, between
    the blocks; the first token's share of attention in the block where it is largest. It holds if all five are as
    claimed, against the training without penalty, at one of the weights; it is not applicable where there are no sinks
    to be mended.
    """
    context.specimen.require_causal()
    numbers = sum(parameter.numel() for parameter in context.model.parameters())
    if numbers > LARGEST:
        raise NotApplicable(f"it trains four adapters, and the model has {numbers:,} numbers: above {LARGEST:,}")
    if len(context.anatomy.block_list) < 2:
        raise NotApplicable("between the blocks of a model with fewer than two there is nothing to decorrelate")
    rows, _ = fresh_rows(context, STEPS * BATCH * LENGTH)
    length = VECTORS * (min(LENGTH, max(map(len, rows))) // VECTORS)
    texts, held_out = (cut(given, length, most) for given, most in (
        (rows, STEPS * BATCH), (list(context.evaluation.texts()), JUDGED)
    ))  # fmt: skip
    if length == 0 or len(held_out) < 2:
        raise NotApplicable(f"the texts are too short to be pooled into {VECTORS} vectors each")
    training, judged = list(torch.stack(texts).split(BATCH)), list(torch.stack(held_out).split(BATCH))
    before = _measured(context.fresh(), judged)
    found = {PLAIN: _trained(context.fresh(), training, judged, 0.0)}
    start = before["loss"].loss / max(before["squared cosine"], 1e-12)
    for share in SHARES:
        found[f"{share:g} of the loss"] = _trained(context.fresh(), training, judged, share * start)
    table = [_row("as it was", before, found[PLAIN])] + [_row(name, one, found[PLAIN]) for name, one in found.items()]
    return _result(found, table)


def _result(found: dict[str, dict[str, Any]], table: list[dict[str, Any]]) -> Result:
    plain = found[PLAIN]
    told = "; ".join(
        f"{name}: loss {one['loss'].loss:.4f}, {one['sinks']:.2f} sinks a sequence, largest {one['largest']:.1f}, "
        f"squared cosine {one['squared cosine']:.4f}, first token {one['first']:.2f}"
        for name, one in found.items()
    )
    if plain["sinks"] == 0:
        return Result(
            Verdict.NOT_APPLICABLE,
            f"No sinks behind the first token were found in the training without. {told}.",
            table,
        )
    able = [name for name, one in found.items() if name != PLAIN and all(_wanted(one, plain).values())]
    said = f"All as claimed at: {', '.join(able)}." if able else "At no weight all five are as claimed."
    return Result(Verdict.of(able), f"{said} {told}.", table)


def _wanted(one: dict[str, Any], plain: dict[str, Any]) -> dict[str, bool]:
    return {
        "fewer sinks": one["sinks"] < plain["sinks"],
        "smaller": one["largest"] < plain["largest"],
        "less alike": one["squared cosine"] * FALL <= plain["squared cosine"],
        "first stays": one["first"] > THRESHOLD or plain["first"] <= THRESHOLD,
        "loss stays": one["loss"].loss <= (1 + NEAR) * plain["loss"].loss,
    }


def _row(name: str, one: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    difference, error = one["loss"].minus(plain["loss"])
    return {
        "penalty": name, "weight": one.get("weight", ""), "loss": one["loss"].loss, "minus without": difference,
        "standard error": error, "sinks a sequence": one["sinks"], "massive a sequence": one["massive"],
        "largest behind the first": one["largest"], "squared cosine": one["squared cosine"],
        "attention on the first": one["first"],
    }  # fmt: skip


def _given(model: Any, ids: Tensor) -> Batch:
    """The first token, VECTORS means of embeddings, a mark, and the text (B x T), which alone is to be predicted."""
    ids = ids.to(model.device)
    config = model.config.get_text_config()
    first = next((token for token in (config.bos_token_id, config.eos_token_id, 0) if isinstance(token, int)), 0)
    mark = torch.full_like(ids[:, :1], (first + 1) % config.vocab_size)
    embed = model.get_input_embeddings()
    inside = embed(ids)
    pooled = inside.unflatten(1, (VECTORS, -1)).mean(2)
    given = torch.cat([embed(torch.full_like(mark, first)), pooled, embed(mark), inside], 1)
    labels = torch.cat([ids.new_full((len(ids), VECTORS + 2), IGNORED), ids], 1)
    return {"inputs_embeds": given, "labels": labels}


def _trained(specimen: Specimen, training: list[Tensor], judged: list[Tensor], weight: float) -> dict[str, Any]:
    """What is measured after the training. The specimen has its adapter merged then."""
    adapter, model = adapter_named("lora"), specimen.model
    from ...adaptation.attached import Attached  # peft takes a second to import

    penalty = penalty_named("decorrelation").function
    with at_rest(model, frozen=True):
        attached = Attached(model, adapter.config(list(targets_of(specimen.anatomy, None)), {"dropout": 0.0}), 0)
        with watching(list(specimen.anatomy.block_list)) as states:
            problem = Problem(
                "decorrelation", attached.parameters, training, lambda ids: own_loss(model, _given(model, ids)), None,
                model.train,
                penalty=lambda ids: penalty(Seen(model, _given(model, ids), list(states)), weight=weight)
                if weight
                else None,
            )  # fmt: skip
            machine = Machine(str(model.device))
            train(
                problem, Run(Schedule(RATE, epochs=-(-STEPS // len(training)), steps=STEPS), machine, State(None)), {}
            )
        attached.merge()
    return _measured(specimen, judged) | {"weight": weight}


@torch.no_grad()
def _measured(specimen: Specimen, judged: list[Tensor]) -> dict[str, Any]:
    model, tally = specimen.model, Tally(specimen.layers)
    penalty = penalty_named("decorrelation").function
    nats, cosines, largest = [], 0.0, 0.0
    with at_rest(model):
        for ids in judged:
            batch = _given(model, ids)
            for row in range(len(ids)):
                nats.append(
                    own_loss(model, {name: one[row : row + 1] for name, one in batch.items()})[0].double().cpu()
                )
            given = {"inputs_embeds": batch["inputs_embeds"], "use_cache": False}
            points: list[Point] = ["residual", "attention", "mlp", "patterns"]
            with watch(specimen.anatomy, points, instead={"patterns": lambda weights: paid(weights, None)}) as seen:
                model(**given)
            tally.add(seen, True, THRESHOLD, RATIO, QUERIES)
            states = [seen.residual[layer] for layer in range(specimen.layers + 1)]
            largest = max(largest, *(float(state[:, 1:].abs().max()) for state in states))
            cosines += float(penalty(Seen(model, batch, states), weight=1.0)) * len(ids)
    count = len(nats)
    length = torch.full((count,), float(judged[0].shape[1]), dtype=torch.float64)
    first = max(float(scores.mean()) for scores in tally.first.values()) / count
    return {
        "loss": Measured(torch.stack(nats), length, 1.0), "sinks": float(tally.sinks[:, 1].sum()) / count,
        "massive": float(tally.tokens[:, 1].sum()) / count, "largest": largest, "squared cosine": cosines / count,
        "first": first,
    }  # fmt: skip

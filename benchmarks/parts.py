"""Parts against the standard ones: seconds of prefill by length, of a token in generation, and of a step of training.

Mixers: a layer alone, of the same width and heads, on one sequence; softmax is torch's own attention, causal. The
crossover is the shortest of the measured lengths from which on the mixer is faster than softmax at every longer one.
MLPs: forward and backward over 1,024 positions, with as many neurons as give the parameters of the gated MLP.
The slot: a Llama whose attention was replaced by the softmax part with the same weights, over the untouched model.

Targets: every mixer whose cost is below N² is faster than softmax from some length on, and at the longest at least
three times; where that is not so, the table shows it. The slot costs at most 3 %, and its logits are equal to 1e-6.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import alternate, llama, parser, ratio, show, token_batches, verdict
from low_rank import decode, prefill
from torch import nn

from transect.anatomy import Anatomy
from transect.parts import Around, insert, parts
from transect.parts.part import Mixer
from transect.parts.registry import PartEntry


def seconds(run: Callable[[], object], times: int) -> float:
    """The median time of a call, after one that does not count."""
    run()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return median(taken)


def made(entry: PartEntry, width: int, neurons: int, length: int) -> Any:
    """The part in these sizes, with heads of 64 (or of half the width)."""
    heads = max(2, width // 64)
    sizes = dict(
        width=width, heads=heads, key_value_heads=heads, head_size=width // heads, neurons=neurons, length=length,
        causal=True, layer=0, layers=2, eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(0)
    return entry.function(**{name: sizes[name] for name in entry.sizes}, **entry.settings({}))


def steps_a_second(part: nn.Module, run: Callable[[], torch.Tensor], times: int) -> float:
    """Seconds of forward and backward together."""

    def step() -> None:
        part.zero_grad()
        run().square().mean().backward()

    return seconds(step, times)


@torch.no_grad()
def prefill_and_decode(mixer: Mixer, x: torch.Tensor, times: int) -> tuple[float, float]:
    """Seconds for all positions at once, and for one more behind them."""
    prefill = seconds(lambda: mixer(x, Around()), times)
    state: dict[str, torch.Tensor] = {}
    mixer(x, Around(state=state))
    kept = dict(state)

    def one_more() -> None:
        state.clear()
        state.update(kept)
        mixer(x[:, :1], Around(past=x.shape[1], state=state))

    return prefill, seconds(one_more, times)


def mixers(width: int, lengths: list[int], times: int) -> list[list[Any]]:
    """A row for each causal mixer: cost, times at each length over softmax's, crossover, decoding at the longest."""
    entries = [entry for entry in parts("mixer") if "causal" in entry.function.can_be]
    entries.sort(key=lambda entry: entry.name != "softmax")
    rows, reference = [], {}
    for entry in entries:
        found = {}
        whole = entry.name == "softmax" or entry.function.cost != "N²"
        for length in lengths if whole else lengths[:-1]:  # others may hold as many numbers as there are pairs
            mixer = made(entry, width, 4 * width, max(lengths) + 1).eval()  # and a token more
            found[length] = prefill_and_decode(mixer, torch.randn(1, length, width), times)
        reference = reference or found
        ratios = {length: found[length][0] / reference[length][0] for length in found}
        faster = [length for length in found if all(ratios[one] < 1 for one in found if one >= length)]
        longest = max(found)
        rows.append([
            entry.name, entry.function.cost, *(ratios.get(length, "-") for length in lengths),
            str(faster[0]) if faster else "never", found[longest][1] / reference[longest][1],
            verdict(ratios[longest] <= 1 / 3) if entry.function.cost != "N²" else "-",
        ])  # fmt: skip
    return rows


def steps(width: int, positions: int, times: int) -> list[list[Any]]:
    """A row for each causal mixer: parameters, forward, a training step, and operations, each over softmax's."""
    entries = [entry for entry in parts("mixer") if "causal" in entry.function.can_be]
    entries.sort(key=lambda entry: entry.name != "softmax")
    rows: list[list[Any]] = []
    reference: list[float] = []
    for entry in entries:
        mixer, x = made(entry, width, 4 * width, positions), torch.randn(1, positions, width)
        with torch.no_grad():
            forward = seconds(lambda mixer=mixer, x=x: mixer(x, Around()), times)
        numbers = list(mixer.parameters())
        step = forward
        if numbers:
            optimizer = torch.optim.AdamW(numbers, lr=1e-4)

            def train(mixer: Mixer = mixer, x: torch.Tensor = x, optimizer: Any = optimizer) -> None:
                optimizer.zero_grad()
                mixer(x, Around()).square().mean().backward()
                optimizer.step()

            step = seconds(train, times)
        found = [
            sum(number.numel() for number in numbers), forward, step,
            positions * mixer.flops + mixer.mixing_flops(positions),
        ]  # fmt: skip
        reference = reference or [float(one) for one in found]
        rows.append([entry.name, *(one / whole for one, whole in zip(found, reference, strict=True))])
    return rows


def mlps(width: int, positions: int, times: int) -> list[list[Any]]:
    """A row for each MLP: neurons, forward, forward and backward, and operations, each over those of the gated MLP."""
    entries = sorted(parts("mlp"), key=lambda entry: entry.name != "gated")
    wanted, rows, reference = 0, [], (1.0, 1.0, 1)
    x = torch.randn(1, positions, width)
    for entry in entries:
        neurons = 8 * width // 3 // 16 * 16  # in steps that experts can share out
        part = made(entry, width, neurons, positions)
        count = sum(p.numel() for p in part.parameters())
        wanted = wanted or count
        slope = (sum(p.numel() for p in made(entry, width, neurons + 16, positions).parameters()) - count) / 16
        if slope:
            neurons = max(16, round((neurons + (wanted - count) / slope) / 16) * 16)
            part = made(entry, width, neurons, positions)
        with torch.no_grad():
            forward = seconds(lambda part=part: part(x), times)
        if any(p.requires_grad for p in part.parameters()):
            step = steps_a_second(part, lambda part=part: part(x), times)
        else:
            step = forward
        if entry.name == "gated":
            reference = (forward, step, part.flops)
        rows.append([
            entry.name, str(neurons) if slope else "-", forward / reference[0], step / reference[1],
            part.flops / reference[2],
        ])  # fmt: skip
    return rows


def slot(width: int, blocks: int, positions: int, times: int) -> list[list[Any]]:
    """Reading, writing and a step of training of a model with softmax in its slot, each over the untouched model."""
    plain = llama(width, blocks, positions=positions + 16)
    filled = copy.deepcopy(plain)
    insert(filled, "mixer", "softmax")
    roles = ["q", "k", "v", "o"]
    for into, matrix in zip(Anatomy(filled).matrices(roles), Anatomy(plain).matrices(roles), strict=True):
        into.write(matrix.weight)
    ids = token_batches(1, 1, positions).batches[0]["input_ids"]
    with torch.no_grad():
        logits, expected = filled(ids).logits, plain(ids).logits
    apart = float((logits - expected).abs().max() / expected.abs().max())

    def train(model: Any) -> None:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()

    rows = []
    for name, run in {
        "prefill": torch.no_grad()(lambda model: prefill(model, ids)),
        "16 tokens more": torch.no_grad()(lambda model: decode(model, ids, 16)),
        "training step": train,
    }.items():
        found = alternate({"filled": lambda run=run: run(filled), "plain": lambda run=run: run(plain)}, times)
        over = ratio(found, "filled", "plain")
        rows.append([name, over, verdict(over <= 1.03), apart, verdict(apart <= 1e-6)])
    return rows


def main(arguments: list[str] | None = None) -> list[list[Any]]:
    """Print the tables; the mixers' rows."""
    given = parser(__doc__).parse_args(arguments)
    width, lengths = (32, [32, 64]) if given.quick else (256, [256, 1024, 4096, 16384])
    times = given.repeats or (1 if given.quick else 3)
    rows = mixers(width, lengths, times)
    headings = [
        "mixer",
        "cost",
        *(f"prefill at {length}" for length in lengths),
        "faster from",
        "a token more",
        "target",
    ]
    show(f"Mixers of width {width}: time over that of softmax attention", headings, rows)
    for size in (width,) if given.quick else (256, 1024):
        show(
            f"Softmax in its slot over the untouched Llama of width {size}, {64 if given.quick else 1024} positions",
            ["", "time", "<= 1.03", "largest difference of logits / largest logit", "<= 1e-6"],
            slot(size, 2, 64 if given.quick else 1024, 2 if given.quick else 15),
        )  # fmt: skip
        show(
            f"Mixers of width {size} over softmax attention, {64 if given.quick else 1024} positions",
            ["mixer", "parameters", "forward", "training step", "operations"],
            steps(size, 64 if given.quick else 1024, times),
        )  # fmt: skip
        found = mlps(size, 64 if given.quick else 1024, times)
        show(
            f"MLPs of width {size}: over the gated MLP at equal parameters",
            ["mlp", "neurons", "forward", "forward and backward", "operations"], found,
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()

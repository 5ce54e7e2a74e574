"""Is a converted model faster? Prefill and decoding of a random Llama, before and after every conversion of its cost.

Each conversion takes turns with the dense model, alone with it in memory. Nothing is trained: routers are set so that
they leave out what the table says. FLOPs are counted as they run (matrix products and attention), so that a shorter
sum of them is a promise; a token is decoded behind the whole prompt. As in low_rank.py the vocabulary is small and the
head reads the last position only, so that the blocks are what is measured. A vision transformer stands for what drops
patches of images, without decoding.

Target: at least 80 % of the FLOPs that are saved show as time saved, hidden size 1024, where a tenth or more is saved.
What is memory-bound (a token decoded alone) follows the parameters that are read, and what adds cost has no target.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from common import alternate, heads, llama, parser, ratio, show, token_batches, verdict
from low_rank import prefill
from torch import Tensor

import transect
from transect.evaluation.operations import operations_counted

SHARE = 0.8  # of the saving
LEAST = 0.1  # saving that has a target


def conversions_of(prompt: int, blocks: int) -> list[tuple[str, str, bool, Mapping[str, Any]]]:
    """What is shown, the conversion, whether it looks at text, and its settings."""
    inner = f"1-{blocks - 2}"  # never the first or the last block
    window, half = max(2, prompt // 16), prompt // 2
    return [
        (f"liger, window {window}", "liger", False, {"window": window}),
        (f"its hybrid, 1 in {blocks} kept", "liger", False, {"window": window, "keep_every": blocks}),
        ("mixer gated-linear", "mixer", False, {"mixer": "gated-linear"}),
        (f"spikingbrain, window {window}", "spikingbrain", False, {"window": window}),
        (f"spikingbrain, both, window {window}", "spikingbrain", False, {"window": window, "within": True}),
        ("ecoformer", "ecoformer", True, {"hash_steps": 1}),
        ("merge-attention, vo", "merge-attention", False, {"merge": "vo", "several": True}),
        ("uoe, 2 of 4", "uoe", True, {}),
        ("uoe, heads too", "uoe", True, {"groups": 4, "active_groups": 2}),
        ("dense2moe, 37.5 %", "dense2moe", True, {}),
        ("dense2moe, shared alone", "dense2moe", True, {"active": 0}),
        ("spikingbrain-experts", "spikingbrain-experts", False, {"experts": 4}),
        ("m2mkd, 1 of 4", "m2mkd", True, {"modules": blocks}),
        ("kat", "kat", False, {}),
        ("polycom, poly-norm", "polycom", True, {"kind": "poly-norm"}),
        ("memoryformer, up", "memoryformer", True, {"positions": 128}),
        ("matformer-cut, 1/2", "matformer-cut", False, {"untrained": True}),
        ("matformer, whole", "matformer", True, {}),
        ("multi-level", "multi-level", False, {}),
        ("relaxed-recursive, rank 64", "relaxed-recursive", False, {}),
        ("relaxed-recursive, tied", "relaxed-recursive", False, {"rank": 0}),
        ("algoformer, twice", "algoformer", False, {}),
        ("algoformer, left out", "algoformer", False, {"times": 0}),
        ("dense2moe-blocks, 1 of 2", "dense2moe-blocks", True, {"prompt": 4}),
        (f"first, {inner} skipped", "first", False, {"prompt": 4, "start": -9.0, "layers": inner}),
        (f"gamma-mod, half of {half}", "gamma-mod", False, {"routable": half, "choose": "top", "layers": inner}),
        (f"p-mod, half of {half}", "p-mod", False, {"targets": half, "decay": "constant"}),
        ("ultramem-v2", "ultramem-v2", False, {"side": 16}),
        ("fold-norms", "fold-norms", False, {}),
        ("peri-ln", "peri-ln", True, {}),
        ("spikingbrain-spikes", "spikingbrain-spikes", False, {}),
    ]  # fmt: skip


class Writing:
    """Goes on behind a prompt that is read once, `steps` tokens at each call, each behind all before it."""

    def __init__(self, model: Any, ids: Tensor, steps: int) -> None:
        self.model, self.steps = model, steps
        self.output = prefill(model, ids)

    def __call__(self) -> None:
        for _ in range(self.steps):
            token = self.output.logits[:, -1:].argmax(-1)
            self.output = self.model(input_ids=token, past_key_values=self.output.past_key_values, use_cache=True)


def flops(run: Callable[[], Any]) -> int:
    """Of one call."""
    with operations_counted() as counted:
        run()
    return counted.get_total_flops()


def beside(phases: Mapping[str, tuple[Callable[[], Any], Callable[[], Any]]], repeats: int) -> list[Any]:
    """For each phase, (before, after): ratios of FLOPs and of time, share of the saving that shows, verdict."""
    work = {phase: flops(after) / flops(before) for phase, (before, after) in phases.items()}
    candidates = {f"{phase} {at}": run for phase, both in phases.items() for at, run in enumerate(both)}
    seconds, row = alternate(candidates, repeats), []
    for phase, fewer in work.items():
        time = ratio(seconds, f"{phase} 1", f"{phase} 0")
        shown = (1 - time) / (1 - fewer) if fewer <= 1 - LEAST else None
        row += [
            fewer,
            time,
            "-" if shown is None else f"{shown:.0%}",
            "-" if shown is None else verdict(shown >= SHARE),
        ]
    return row


def vit(hidden: int, blocks: int, quick: bool) -> Any:
    """A random vision transformer: 196 patches, or 16."""
    config = transformers.ViTConfig(
        hidden_size=hidden, num_hidden_layers=blocks, num_attention_heads=heads(hidden), intermediate_size=4 * hidden,
        image_size=32 if quick else 224, patch_size=8 if quick else 16,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(config).eval()


# On images: what is shown, the conversion, and its settings. Interpreters with random numbers drop what they happen to.
OF_IMAGES = [
    ("ia-red2, images", "ia-red2", {"groups": 2}),
    ("sret, images", "sret", {}),
    ("sret, images, 4 slices", "sret", {"groups": 4, "groups_later": 2}),
    ("symmetrize-attention, images", "symmetrize-attention", {"several": True}),
    ("rms-norms, images", "rms-norms", {}),
]  # fmt: skip


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Time every conversion against the dense model, print the table, and return its rows by what they show."""
    made = parser(__doc__)
    made.add_argument("--hidden", type=int, help="default 1024")
    made.add_argument("--blocks", type=int, default=4)
    made.add_argument("--prompt", type=int, help="tokens to read; default 1024")
    made.add_argument("--batch-size", type=int, default=1)
    made.add_argument("--only", help="conversions, comma-separated; default all")
    chosen = made.parse_args(argv)
    quick = chosen.quick
    hidden, prompt = chosen.hidden or (64 if quick else 1024), chosen.prompt or (32 if quick else 1024)
    repeats, steps = chosen.repeats or (1 if quick else 5), 2 if quick else 8
    dense = llama(hidden, chosen.blocks, positions=4 * prompt)
    ids = token_batches(1, chosen.batch_size, prompt).batches[0]["input_ids"]
    text = token_batches(2, 4, 32 if quick else 128)
    rows: dict[str, list[Any]] = {}

    def wanted(name: str) -> bool:
        return not chosen.only or name in chosen.only.split(",")

    for shown, name, looks, settings in conversions_of(prompt, chosen.blocks):
        if not wanted(name):
            continue
        model = transect.convert(copy.deepcopy(dense), name, text if looks else None, steps=0, **settings).model
        rows[shown] = [shown] + beside(
            {
                "read": (lambda: prefill(dense, ids), lambda model=model: prefill(model, ids)),
                "write": (Writing(dense, ids, steps), Writing(model, ids, steps)),
            },
            repeats,
        )  # fmt: skip
        print(*rows[shown], sep="  ", file=sys.stderr, flush=True)
    seeing = vit(hidden, chosen.blocks, quick)
    pixels = torch.randn(chosen.batch_size, 3, seeing.config.image_size, seeing.config.image_size)
    for shown, name, settings in OF_IMAGES:
        if wanted(name):
            model = transect.convert(copy.deepcopy(seeing), name, steps=0, **settings).model
            read = beside({"read": (lambda: seeing(pixels), lambda model=model: model(pixels))}, repeats)
            rows[shown] = [shown, *read, "-", "-", "-", "-"]
            print(*rows[shown], sep="  ", file=sys.stderr, flush=True)
    show(
        f"Conversions of a Llama of {chosen.blocks} blocks, hidden {hidden}, float32, batch {chosen.batch_size}, "
        f"prompt {prompt}: over the dense model",
        ["", "prefill FLOPs", "time", "shows", "target", "decode FLOPs", "time ", "shows ", "target "],
        list(rows.values()), [f"shows: share of the FLOPs saved that is saved in time; target {SHARE:.0%}"],
    )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()

"""Everything that is registered, and what a user wants to do with it."""

from __future__ import annotations

from typing import Any

# What a user wants to do, by the family that does it; a family that is not here stands under its own name.
PURPOSES = {
    "factorization": "Make it smaller: low rank, matrix by matrix (compress, compare)",
    "replacement": "Make it smaller: another structure, matrix by matrix (compress, compare)",
    "slicing": "Make it smaller: narrower blocks (compress, compare)",
    "restructuring": "Make it smaller: the model as a whole (compress, compare)",
    "sharing": "Share out the bytes that are kept, before the method runs (--allocation)",
    "ranking": "Choose the ranks of low-rank methods by the loss that they cost (--allocation)",
    "probe": "Look inside (inspect)",
    "study": "Study what small models trained for it show (study)",
    "adapter": "Fine-tune it: what is trained (adapt --method)",
    "parametrization": "Fine-tune it in other numbers, and put it together afterwards (adapt --method)",
    "objective": "Fine-tune it: what is lowered (adapt --objective)",
    "optimizer": "Fine-tune it: how steps are taken (adapt --optimizer)",
    "rates": "Fine-tune it: by what each layer's learning rate is multiplied (adapt --layer-rates)",
    "penalty": "Fine-tune it: what is added to the loss (adapt --penalties)",
    "mixer": "Stand in the place of attention (build --mixer)",
    "mlp": "Stand in the place of the MLP (build --mlp)",
    "activation": "Stand in the place of the MLP's activation (build --activation)",
    "matrix": "Stand in the places of matrices, and are none (build --matrix)",
    "norm": "Stand in the places of the norms (build --norm)",
    "block": "Stand around whole blocks (build --block)",
    "search": "Choose its sizes inside it, and cut the smaller model out (search --method)",
    "conversion": "Turn it into another architecture that keeps its weights (convert)",
    "merging": "Make one of several models of one shape (merge)",
    "edit": "Change what it knows or does (edit)",
}

# How each is used; NAME stands for the entry's name.
COMMANDS = {
    **dict.fromkeys(
        ("factorization", "replacement", "slicing", "restructuring"),
        "transect compress MODEL --method NAME --keep 0.7 --data calib.txt --out small/",
    ),
    **dict.fromkeys(
        ("sharing", "ranking"),
        "transect compress MODEL --method svd-llm --allocation NAME --keep 0.7 --data calib.txt --out small/",
    ),
    "probe": "transect inspect MODEL --probes NAME --data sample.txt --out report/",
    "study": "transect study NAME --out report/",
    "adapter": "transect adapt MODEL --method NAME --data new.txt --forgets old.txt --out adapted/",
    "parametrization": "transect adapt MODEL --method NAME --data new.txt --out adapted/",
    "objective": "transect adapt MODEL --method lora --objective NAME --data rows.jsonl --out adapted/",
    "optimizer": "transect adapt MODEL --method full --optimizer NAME --data new.txt --out adapted/",
    "rates": "transect adapt MODEL --method full --layer-rates NAME --data new.txt --out adapted/",
    "penalty": "transect adapt MODEL --method full --penalties NAME --data new.txt --out adapted/",
    **{
        slot: f"transect build llama --hidden 256 --blocks 6 --{slot} NAME --vocabulary 4096 --out fresh/"
        for slot in ("mixer", "mlp", "activation", "matrix", "norm", "block")
    },
    "search": "transect search MODEL --method NAME --keep 0.7 --data train.txt --out small/",
    "conversion": "transect convert MODEL --method NAME --data train.txt --out converted/",
    "merging": "transect merge MODEL OTHER --method NAME --out merged/",
    "edit": "transect edit MODEL --method NAME --edits edits.json --data text.txt --out edited/",
}


def entries() -> list[Any]:
    """Every registered method, allocation, probe, study, conversion, edit, part and way to adapt or search."""
    from ..adaptation import adapters
    from ..compression import allocations, methods
    from ..conversion import conversions
    from ..editing import edits
    from ..goals import objectives
    from ..merging import mergings
    from ..parts import parts
    from ..probes import probes
    from ..sizing import searchers
    from ..studies import studies
    from ..training import layer_rates, optimizers, parametrizations, penalties

    ways = (*adapters(), *parametrizations(), *objectives(), *optimizers(), *layer_rates(), *penalties(), *searchers())
    return [*methods(), *allocations(), *probes(), *studies(), *conversions(), *mergings(), *edits(), *ways, *parts()]

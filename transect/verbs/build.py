"""`transect.build`: an ordinary Hugging Face model with random weights and parts in its slots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from ..arguments import checked
from ..checkpoint import check_output, load_tokenizer, save
from ..parameters import Seed
from ..parts import build_model
from ..store import alone
from .arguments import Count, FolderName, Role, Some
from .common import Settings, one_of


@checked
def build(
    base: str,
    *,
    out: FolderName | None = None,
    hidden: Count | None = None,
    blocks: Count | None = None,
    heads: Count | None = None,
    key_value_heads: Count | None = None,
    head_size: Count | None = None,
    neurons: Count | None = None,
    vocabulary: Count | None = None,
    length: Count | None = None,
    mixer: str | None = None,
    mlp: str | None = None,
    activation: str | None = None,
    matrix: str | None = None,
    norm: str | None = None,
    block: str | None = None,
    roles: Annotated[Iterable[Role], Some] | None = None,
    tokenizer: Any = None,
    seed: Seed = 0,
    overwrite: bool = False,
    settings: Settings | None = None,
) -> Any:
    """A model with random weights, to be trained, inspected, compressed, saved like any other.

    base: a kind of model that transformers has (`llama`, `gpt2`, `bert`, `vit`), or the file or folder of a config.
    out: a folder for it. hidden ... length: sizes; default the config's. With another width the heads stay as wide, and
        there are as many neurons for each of its channels. vocabulary: default the tokenizer's.
    mixer, mlp, activation, matrix, norm, block: parts that stand in these slots of every block (the last: around it);
        see `transect.parts.parts()`. roles: which matrices the one for matrices stands for; default all.
    tokenizer: a tokenizer, or the name of a model that has one; saved with it.
    seed: of the numbers. settings: part -> its settings.
    Raises TransectError for sizes or parts that do not go together.
    """
    slots = {
        "mixer": mixer, "mlp": mlp, "activation": activation, "matrix": matrix, "norm": norm, "block": block,
    }  # fmt: skip
    parts = {slot: name for slot, name in slots.items() if name is not None}
    chosen = one_of(settings, {name: {} for name in parts.values()})
    target = None if out is None else check_output(out, overwrite)
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    if vocabulary is None and tokenizer is not None:
        vocabulary = len(tokenizer)
    model = build_model(
        base, parts=parts, settings=chosen, roles=roles, seed=seed, hidden=hidden, blocks=blocks, heads=heads,
        key_value_heads=key_value_heads, head_size=head_size, neurons=neurons, vocabulary=vocabulary, length=length,
    )  # fmt: skip
    for kind in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if tokenizer is not None:
            setattr(model.config, kind, getattr(tokenizer, kind, None))
            setattr(model.generation_config, kind, getattr(tokenizer, kind, None))
    if target is not None:
        with alone(target):
            save(model, target, tokenizer, overwrite=overwrite)
    return model

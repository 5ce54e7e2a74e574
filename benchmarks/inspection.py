"""Looking inside a model: tail exponents against weightwatcher, captured activations against transformer_lens.

Exponents: every weight matrix of every block, the power law fitted to its squared singular values. weightwatcher runs
`analyze()` with its defaults on the blocks alone; Transect does the same fit (`singular_values` and `power_law`, a
matrix to a core), and for comparison the whole probe `spectra`, which also fits windows of each matrix. The weights are
random, with rows of unequal length, so that the spectra have tails, unless `--model` names a checkpoint. Single parts
are compared, too: the fits alone, on the same eigenvalues.

Captured activations: the residual stream behind one block, and behind all, in one pass over a batch. transformer_lens
wraps the same weights in its bridge and caches only these points. The logits of both are compared with those of the
plain model.

Targets: the largest difference of an exponent at most 1e-3, and weightwatcher's time at least 5 x Transect's;
transformer_lens' time at least Transect's, and logits equal to the plain model's bit for bit.

The peers are no dependencies. They go into an environment of their own, beside Transect's:
`pip install -c constraints.txt torch && pip install -c constraints.txt -e . && pip install weightwatcher==0.7.7
transformer_lens==4.3.0`.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from statistics import median
from typing import Any

import torch
from common import alternate, gpt2, llama, parser, ratio, show, verdict
from torch import Tensor

from transect.anatomy import Anatomy
from transect.checkpoint import open_model
from transect.data import Specimen
from transect.forward import watch
from transect.probes import run_probes
from transect.spectra import power_law, singular_values
from transect.threads import side_by_side

FLOOR = 1e-5  # weightwatcher leaves out eigenvalues up to this
VOCABULARY = 1024
Exponents = dict[str, float]


def with_tails(model: Any) -> Any:
    """The model with each row of each block's matrices times a log-normal number."""
    generator = torch.Generator().manual_seed(0)
    for matrix in Anatomy(model).matrices():
        scales = (0.7 * torch.randn(matrix.shape[0], 1, generator=generator)).exp()
        matrix.write(matrix.weight * scales)
    return model


def eigenvalues(weight: Tensor) -> Tensor:
    """Squared singular values of a matrix, ascending."""
    return singular_values(weight).square().flip(0)


def exponent(values: Tensor) -> float:
    """Ours, of these eigenvalues."""
    fit = power_law(values, FLOOR)
    return float("nan") if fit is None else fit.alpha


def exponents(anatomy: Anatomy) -> Exponents:
    """Ours, of every matrix, by the module's path; as the probe `spectra` finds them."""
    matrices = anatomy.matrices()
    fits = side_by_side(lambda matrix: exponent(eigenvalues(matrix.weight)), matrices)
    return {matrix.path: alpha for matrix, alpha in zip(matrices, fits, strict=True)}


def fitted_by_weightwatcher(spectra: dict[str, Tensor]) -> Exponents:
    """Its exponents of the same spectra."""
    from weightwatcher.WW_powerlaw import pl_fit  # pyright: ignore[reportMissingImports]

    with redirect_stdout(StringIO()):
        return {path: float(pl_fit(data=values[values > FLOOR].numpy()).alpha) for path, values in spectra.items()}


def analyzed_by_weightwatcher(anatomy: Anatomy) -> Exponents:
    """What its users call: `analyze()` with the defaults, on the blocks."""
    import weightwatcher  # pyright: ignore[reportMissingImports]

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        details = weightwatcher.WeightWatcher(model=anatomy.block_list).analyze()
    prefix = anatomy.blocks[0].path.removesuffix("0")
    return {prefix + row.longname: float(row.alpha) for row in details.itertuples()}


def compare_exponents(model: Any, name: str, repeats: int) -> dict[str, float]:
    """Tail exponents of a whole model: ours beside weightwatcher's; figures by name."""
    anatomy = Anatomy(model)
    spectra = {matrix.path: eigenvalues(matrix.weight) for matrix in anatomy.matrices()}
    seconds = alternate(
        {
            "weightwatcher, analyze()": lambda: analyzed_by_weightwatcher(anatomy),
            "transect, the same exponents": lambda: exponents(anatomy),
            "transect, probe spectra": lambda: run_probes(Specimen(anatomy), {"spectra": {}}),
            "weightwatcher, fits alone": lambda: fitted_by_weightwatcher(spectra),
            "transect, fits alone": lambda: {path: exponent(values) for path, values in spectra.items()},
        },
        repeats,
    )
    names = list(seconds)
    ours, theirs = exponents(anatomy), analyzed_by_weightwatcher(anatomy)
    difference = max(abs(ours[path] - theirs[path]) for path in ours)
    faster = ratio(seconds, names[0], names[1])
    rows = [
        [names[0], f"{median(seconds[names[0]]):.4g}", "-", "-"],
        [names[1], f"{median(seconds[names[1]]):.4g}", f"{faster:.2f}", verdict(faster >= 5)],
        [names[2], f"{median(seconds[names[2]]):.4g}", f"{ratio(seconds, names[0], names[2]):.2f}", "-"],
        [names[3], f"{median(seconds[names[3]]):.4g}", "-", "-"],
        [names[4], f"{median(seconds[names[4]]):.4g}", f"{ratio(seconds, names[3], names[4]):.2f}", "-"],
    ]
    low, high = min(ours.values()), max(ours.values())
    show(
        f"Tail exponents of {len(ours)} matrices of {name}",
        ["", "seconds", "faster than weightwatcher", ">= 5"],
        rows,
        [
            f"Largest difference of an exponent: {difference:.1e} (<= 1e-3: {verdict(difference <= 1e-3)}); "
            f"exponents from {low:.2f} to {high:.2f}."
        ],
    )
    return {"difference": difference, "faster": faster}


def bridge_of(model: Any) -> Any:
    """The same weights in transformer_lens. It insists on a tokenizer, so it gets one of numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformer_lens.model_bridge.sources.transformers.source import boot  # pyright: ignore[reportMissingImports]
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token="2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="0", eos_token="1", pad_token="1")
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()):
        model.save_pretrained(folder)
        wrapped.save_pretrained(folder)
        loaded = PreTrainedTokenizerFast.from_pretrained(folder)
        return boot(folder, hf_model=copy.deepcopy(model), tokenizer=loaded)


@torch.no_grad()
def compare_captures(
    make: Callable[..., Any], name: str, hidden: int, blocks: int, batch: int, length: int, repeats: int
) -> dict[str, float]:
    """Captured activations: ours beside transformer_lens and a plain forward pass; figures by name."""
    model = make(hidden, blocks, vocabulary=VOCABULARY)
    anatomy, bridge = Anatomy(model), bridge_of(model)
    ids = torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    middle = blocks // 2

    def plain() -> Tensor:
        return model(ids, use_cache=False).logits

    def ours(layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        with watch(anatomy, ["residual"], layers) as seen:
            logits = plain()
        return logits, seen.residual

    def theirs(layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        hooks = {f"blocks.{layer - 1}.hook_out": layer for layer in layers}
        logits, cache = bridge.run_with_cache(ids, names_filter=list(hooks), return_cache_object=False)
        return logits, {layer: cache[hook] for hook, layer in hooks.items()}

    every = range(1, blocks + 1)
    seconds = alternate(
        {
            "plain model, nothing captured": plain,
            "transect, one block": lambda: ours([middle]),
            "transformer_lens, one block": lambda: theirs([middle]),
            "transect, all blocks": lambda: ours(every),
            "transformer_lens, all blocks": lambda: theirs(every),
        },
        repeats,
    )
    names = list(seconds)
    reference = plain()
    (logits, states), (other_logits, other_states) = ours([middle]), theirs([middle])
    faster = ratio(seconds, names[2], names[1])
    rows = []
    for number, peer in ((0, None), (1, 2), (2, None), (3, 4), (4, None)):
        over = ratio(seconds, names[number], names[0])
        gain = "-" if peer is None else f"{ratio(seconds, names[peer], names[number]):.2f}"
        rows.append([names[number], f"{1000 * median(seconds[names[number]]):.4g}", f"{over:.3f}", gain])
    same, apart = torch.equal(logits, reference), float((other_logits - reference).abs().max())
    show(
        f"Captured activations: {name} of {blocks} blocks, hidden {hidden}, {batch} x {length} tokens",
        ["", "ms", "over the plain model", "faster than transformer_lens"],
        rows,
        [
            f"One block, at least as fast: {verdict(faster >= 1)}. Logits equal to the plain model's bit for bit: "
            f"{verdict(same)}; transformer_lens' differ by {apart:.1e}.",
            "Largest difference of the captured states from transformer_lens': "
            f"{float((states[middle] - other_states[middle]).abs().max()):.1e}.",
        ],
    )
    return {"faster": faster, "same": float(same)}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Print both comparisons."""
    options = parser(__doc__)
    options.add_argument("--hidden", type=int, help="default 512")
    options.add_argument("--model", help="a checkpoint whose tail exponents are compared, in place of random weights")
    options.add_argument("--blocks", type=int, default=4)
    options.add_argument("--length", type=int, help="tokens in a sequence; default 128")
    options.add_argument("--batch-size", type=int, default=4)
    chosen = options.parse_args(argv)
    hidden, length = chosen.hidden or (64 if chosen.quick else 512), chosen.length or (16 if chosen.quick else 128)
    repeats = chosen.repeats or (1 if chosen.quick else 7)
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            import transformer_lens  # noqa: F401 # pyright: ignore[reportMissingImports]
            import weightwatcher  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit(f"a peer is missing ({error}); `--help` says how to install both") from None

    if chosen.model is None:
        model, name = with_tails(llama(hidden, chosen.blocks)), f"a Llama of {chosen.blocks} blocks, hidden {hidden}"
    else:
        model, name = open_model(chosen.model, dtype="float32").model, chosen.model
    results = compare_exponents(model, name, repeats)
    for make, name in ((llama, "Llama"), (gpt2, "GPT-2")):
        found = compare_captures(make, name, hidden, chosen.blocks, chosen.batch_size, length, repeats)
        results |= {f"{name} {key}": value for key, value in found.items()}
    return results


if __name__ == "__main__":
    main()

"""The matrix nuclear norm of a text's states beside what it estimates, and beside the matrix entropy by an SVD.

States are random. Every candidate begins with the states R (N x d): centred, rows of length 1, then the figure. The
entropy is that of the singular values of XᵀX / N, as its authors compute it, in float32; for comparison also all
figures of the probe `nuclear-norm`, whose eigenvalues are in float64.

Target (the paper's claim): at N = 2048, d = 1024 the entropy takes at least 10 times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch
from common import alternate, parser, ratio, show, verdict
from torch import Tensor

from transect.probes.catalog.nuclear_norm import figures, matrix_nuclear_norm, normalised


def entropy_by_svd(states: Tensor) -> Tensor:
    """H of the singular values of XᵀX / N over ln d."""
    spread = normalised(states).to(states)
    shares = torch.linalg.svdvals(spread.T @ spread / len(spread))
    return -torch.xlogy(shares, shares).sum() / torch.tensor(float(states.shape[1])).log()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Print the comparison."""
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, help="N; default 2048")
    options.add_argument("--hidden", type=int, help="d; default 1024")
    chosen = options.parse_args(argv)
    tokens, hidden = chosen.tokens or (64 if chosen.quick else 2048), chosen.hidden or (32 if chosen.quick else 1024)
    states = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(0))
    seconds = alternate(
        {
            "matrix nuclear norm": lambda: matrix_nuclear_norm(normalised(states)),
            "matrix entropy, SVD": lambda: entropy_by_svd(states),
            "all figures of the probe": lambda: figures(states),
        },
        chosen.repeats or (1 if chosen.quick else 7),
    )
    first, *_ = names = list(seconds)
    slower = {name: ratio(seconds, name, first) for name in names}
    met = verdict(slower[names[1]] >= 10)
    rows = [
        [name, f"{1000 * median(seconds[name]):.4g}", f"{slower[name]:.1f}", met if name == names[1] else "-"]
        for name in names
    ]
    apart = abs(float(entropy_by_svd(states)) - float(figures(states)[4]))
    title = f"Spread of {tokens} states of width {hidden}"
    show(title, ["", "ms", "times slower", ">= 10"], rows, [f"The two entropies differ by {apart:.1e}."])
    return {"slower": slower[names[1]], "apart": apart}


if __name__ == "__main__":
    main()

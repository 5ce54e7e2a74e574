"""Where a text encoder brings a phrase back after noise on its tokens: by layer, at the phrase's last token.

Source: Basu et al., arXiv:2310.13730, section 3. There the score is the CLIPScore of generated images; here, where
there is no image, it is the cosine of the caption's embedding with the clean one (ours). Reported is what restoring
gains over the noisy level, not its size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....data import Fact, Specimen
from ....forward import watch
from ....probes.tracing import corrupting, embedding_deviation, subject_noise, subject_span
from .captions import batch_of, caption, embeddings, run


@torch.no_grad()
def traced(specimen: Specimen, facts: Sequence[Fact], noise: float, samples: int) -> Tensor:
    """Mean effect (L, float64) of restoring what attention's matrix o puts out in one layer.

    noise: its deviation, in those of the embeddings. samples: draws of it for each fact. A layer without attention
    has 0.
    """
    deviation = noise * embedding_deviation(specimen)
    effects = torch.zeros(specimen.layers, dtype=torch.float64)
    for fact in specimen.shown(facts, "tracing"):
        one = caption(specimen, fact)
        with watch(specimen.anatomy, ["o"]) as seen:
            run(specimen, batch_of(specimen, [one.ids]))
        clean = {layer: states[0, one.last].clone() for layer, states in seen.o.items()}
        goal = embeddings(specimen, [one.ids])
        draws = subject_noise(specimen, fact, deviation, samples, specimen.seed).to(specimen.model.device)
        noisy = {("residual", 0): corrupting(draws, subject_span(specimen, fact))}
        copies = [one.ids] * samples

        def score(changes: dict, goal: Tensor = goal, copies: list[Tensor] = copies) -> float:
            return float(torch.cosine_similarity(embeddings(specimen, copies, changes), goal).mean())

        corrupted = score(noisy)
        for layer, state in clean.items():

            def restore(x: Tensor, state: Tensor = state, at: int = one.last) -> Tensor:
                return torch.cat([x[:, :at], state.expand(len(x), 1, -1).to(x), x[:, at + 1 :]], 1)

            effects[layer] += (score({**noisy, ("o", layer): restore}) - corrupted) / len(facts)
    return effects

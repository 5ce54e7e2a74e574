"""Model-tuning via prompts: a classifier from the words that a language model puts into a blank, without a head."""

from __future__ import annotations

from typing import Annotated, Literal

from ....checkpoint import Opened
from ....parameters import Range
from ...goal import Goal
from ...registry import objective
from .classifier import PromptClassifier
from .goal import PromptGoal
from .prompt import Prompt
from .words import Pool

__all__ = ["Prompt", "PromptClassifier", "PromptGoal"]


@objective("mvp", paper="arXiv:2303.07320", score="accuracy")
def mvp(
    opened: Opened,
    *,
    templates: str = "{text} It was {blank}",
    words: str = "",
    pool_words: Pool = "max",
    pool_templates: Pool = "mean",
    train_on: Literal["all", "one"] = "all",
    epsilon: Annotated[float, Range(0)] = 0.0,
    attack_steps: Annotated[int, Range(1)] = 1,
) -> Goal:
    """Classify by the words that the model would put into a blank: softmax over the classes' scores.

    z_c is the pooled logit of the class's label words at the blank, pooled over templates; trained is the cross-entropy
    of z over the classes alone. No head is added. Data: rows with a text and a `label`, the name of a class or its
    number. A text that is too long loses its last tokens, a template none.

    templates: one or more with | between them, each with one {text} and one {blank}; for a causal model the blank is
        last.
    words: label words by class, `negative: bad, awful; positive: good, great`, each one token where the blank is.
    pool_words: of a class's words, the largest score or the mean.
    pool_templates: likewise.
    train_on: all templates for every text, or one that is drawn for each; all are used where it is measured.
    epsilon: train on embeddings that a step along the gradient has moved, by at most so much over a text (l2); 0 for as
        they are. The paper's is 1.
    attack_steps: of that gradient.
    """
    prompt = Prompt(opened.model, opened.tokenizer, templates, words, pool_words, pool_templates)
    return PromptGoal(prompt, train_on, epsilon, attack_steps)

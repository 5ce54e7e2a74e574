"""Multi-level training (Zou et al., ICLR 2024, arXiv:2404.07999): to a smaller model by merging, and back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ....anatomy import Anatomy
from ....errors import TransectError
from ....pretrained import pretrained
from ...registry import Calibration, Range, conversion
from ...stage import Stage
from .cycle import Leg as Leg
from .cycle import v_cycle as v_cycle
from .maps import Levels as Levels
from .maps import check_levels, interpolated, resized


def _levels(direction: Any, width: int, depth: int, groups: Any, keeping: Any) -> Levels:
    return Levels(direction, width, depth, groups, keeping)


def _check(anatomy: Anatomy, before: str, alpha: float, **chosen: Any) -> None:
    if before and chosen["direction"] == "shrink":
        raise TransectError("before is the model that a grown one is blended with: it does not go with shrink")
    check_levels(anatomy, _levels(**chosen))


def _stages(direction: str, **_: Any) -> list[Stage]:
    return [Stage("multi-level", train="new", new=".", lr=4e-4 if direction == "shrink" else 1e-4)]


@conversion(
    "multi-level",
    paper="arXiv:2404.07999",
    group="nested and elastic models",
    exact="grown in width alone it computes what the smaller model did, and shrinking undoes growing",
    check=_check,
    stages=_stages,
    causal=False,
)
def multi_level(
    anatomy: Anatomy,
    calibration: Calibration,
    *,
    direction: Literal["shrink", "grow"] = "shrink",
    width: Annotated[int, Range(1, 64)] = 2,
    depth: Annotated[int, Range(1, 64)] = 2,
    groups: Literal["halves", "neighbours"] = "halves",
    keeping: Literal["norm", "embedding"] = "norm",
    before: str = "",
    alpha: Annotated[float, Range(0, 1)] = 0.5,
) -> Any:
    """Another model, so many times narrower and shallower, or wider and deeper: heads, neurons and blocks are merged.

    Coalescing averages what groups put out and sums what they read; de-coalescing copies and divides. Then all numbers
    are trained, with a fresh optimizer (the released GPT-2 rates: 4e-4 small, 1e-4 large). A V-cycle is a short
    training, shrink, the long training, grow with `before`, and the rest of the training; see `v_cycle`. Depth by
    copying changes what is computed, and so does blending. Head sizes and the vocabulary stay.

    direction: shrink merges groups, grow repeats what there is.
    width: by what factor the stream, heads, key/value heads and neurons change; 1 leaves them.
    depth: by what factor the number of blocks changes; 1 leaves it.
    groups: which go together, i and i + n/factor (halves, as released), or neighbours.
    keeping: what keeps the logits of tied embeddings in scale, the final norm (exact, our variant) or the embeddings,
        as released (which a model with norms in front of its sublayers does not survive unchanged). Encoders whose
        head has a layer of its own, such as BERT, take the embeddings, whose scale their first norm does not see but
        for its epsilon.
    before: with grow, the folder of the larger model as it was before it was shrunk; none for no blending.
    alpha: the share of the grown model in the blend; without one, copies get equal gradients for ever.
    """
    model = resized(anatomy, _levels(direction, width, depth, groups, keeping))
    if before:
        model = interpolated(pretrained(type(model), before), model, alpha)
    record = Anatomy(model, anatomy.architecture).record
    record.history = [*anatomy.record.history]
    return model

"""A probe is a function whose signature is its configuration.

`@probing(name, ...)` registers `function(specimen, **settings) -> Result`. Its keyword-only parameters with a default
are settings, as a compression method's are. A probe that looks at running text is a generator function instead: it
yields, is sent the activations of one batch (`Seen`) after the other, and at the end None; then it returns its Result.
So one pass over the text serves all probes:

    @probing("stream-norm", title="Length of the stream", paper="ours", watches=["residual"], draw=draw)
    def stream_norm(specimen: Specimen) -> Looking:
        sums, count = torch.zeros(specimen.layers + 1), 0
        while (seen := (yield)) is not None:
            sums += torch.stack([seen.residual[layer].norm(dim=-1).sum() for layer in sorted(seen.residual)]).cpu()
            count += seen.residual[0][..., 0].numel()
        return Result({"norm": Quantity(sums / count, ("layer",), "", "mean length of the stream")})
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import TransectError
from ..forward import Point, Seen
from ..parameters import Parameter, listed, parameters_of, settings_of, summary_of
from .draw import Drawing
from .result import Result

Looking = Generator[None, Seen | None, Result]
OfPatterns = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Probe:
    """A registered probe.

    watches: points of the forward pass that it is sent, see `transect.forward.points`; "logits" for those.
    draw: its plots, from its Result alone. title: heading of its section in the report. trains: whether it trains
    something of its own, which takes minutes: it is run only where it is asked for.
    of_patterns: what it is sent in place of a layer's attention weights (B x H x T x T), made of them and of which
    positions are no padding (B x T, None for all) as the pass goes on, since those of all layers would fill the memory.
    """

    name: str
    title: str
    paper: str
    function: Callable[..., Any]
    watches: tuple[str, ...] = ()
    draw: Callable[[Result], list[Drawing]] | None = None
    trains: bool = False
    of_patterns: OfPatterns | None = None

    @property
    def summary(self) -> str:
        """First sentence of the function's docstring."""
        return summary_of(self.function)

    @property
    def family(self) -> str:
        return "probe"

    @property
    def streams(self) -> bool:
        """Whether it looks at running text, batch by batch."""
        return inspect.isgeneratorfunction(self.function)

    @property
    def parameters(self) -> list[Parameter]:
        return parameters_of(self.function)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings: the ones given, validated, and the defaults of the others."""
        return settings_of(self.function, self.name, given)


_probes: dict[str, Probe] = {}


def probing(
    name: str,
    *,
    title: str,
    paper: str,
    watches: Sequence[Point | str] = (),
    of_patterns: OfPatterns | None = None,
    draw: Callable[[Result], list[Drawing]] | None = None,
    trains: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a probe; see `Probe` for the fields."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _probes[name] = Probe(
            name, title, paper, function, tuple(watches), draw=draw, trains=trains, of_patterns=of_patterns
        )
        return function

    return register


def probe(name: str) -> Probe:
    """The probe of that name, or an error that lists the known ones."""
    if name not in _probes:
        raise TransectError(f"unknown probe {name!r}; known: {', '.join(sorted(_probes))}")
    return _probes[name]


def probes() -> list[Probe]:
    """All registered probes, by name."""
    return [_probes[name] for name in sorted(_probes)]


def names_of(asked: Sequence[str] | None, settings: Collection[str]) -> list[str]:
    """Those to run: the ones asked for, or all that do not train anything and those that there are settings of."""
    if asked is not None:
        return listed(asked)
    return [one.name for one in probes() if not one.trains or one.name in settings]


def drawings(result: Result, of: Probe | None = None) -> list[Drawing]:
    """How its probe draws a result. of: the probe, where it is none of the registered ones."""
    draw = (of or probe(result.probe)).draw
    return [] if draw is None else draw(result)

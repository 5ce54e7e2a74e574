"""A study is a function whose signature is its configuration, as a probe is; it is given a bench instead of a model.

`@studying(name, ...)` registers `function(bench, **settings) -> Result`. Its keyword-only parameters with a default are
settings. What it trains it makes through `bench.once`, so that a study that was killed goes on:

    @studying("two-seeds", title="Two seeds", paper="ours", draw=draw)
    def two_seeds(bench: Bench, *, width: Annotated[int, Range(1, 1024)] = 16) -> Result:
        models = [bench.once(f"seed-{seed}", lambda: trained(width, seed)) for seed in (bench.seed, bench.seed + 1)]
        return Result({"apart": Quantity(distance(*models), (), "", "distance between the two")})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import TransectError
from ..probes import Drawing, Probe, Result
from ..statistics import Progress
from ..store import Folder, keep, kept, write_text


@dataclass(frozen=True)
class Bench:
    """Where a study works.

    seed, device: of what it trains. progress: wraps what takes long, see `transect.statistics.Progress`.
    folder: one of ours, for what it keeps; None to keep nothing. key: names the study, its settings and the seed.
    """

    seed: int = 0
    device: str = "cpu"
    progress: Progress | None = None
    folder: Folder | None = None
    key: str = ""

    def once(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` gives, on the CPU; read instead of made where this study has kept it under that name."""
        if self.folder is None:
            return {name: tensor.detach().cpu() for name, tensor in make().items()}
        path, of = self.folder.file(f"made/{name}.safetensors"), f"{self.key} {name}"
        found = kept(path, of)
        if found is None:
            keep(path, make(), of)
            found = kept(path, of)
            assert found is not None, path
        return {name: found[name] for name in found}

    def write(self, name: str, text: str) -> None:
        """A file of text in the folder, if there is one."""
        if self.folder is not None:
            write_text(self.folder.file(name), text)


@dataclass(frozen=True)
class Study(Probe):
    """A registered study. files: the names of what it writes by `Bench.write`."""

    files: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        return "study"


_studies: dict[str, Study] = {}


def studying(
    name: str,
    *,
    title: str,
    paper: str,
    draw: Callable[[Result], list[Drawing]],
    files: tuple[str, ...] = (),
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register a study; see `Study` and `transect.probes.Probe` for the fields."""

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        _studies[name] = Study(name, title, paper, function, draw=draw, files=files)
        return function

    return register


def study_named(name: str) -> Study:
    """The study of that name, or an error that lists the known ones."""
    if name not in _studies:
        raise TransectError(f"unknown study {name!r}; known: {', '.join(sorted(_studies))}")
    return _studies[name]


def studies() -> list[Study]:
    """All registered studies, by name."""
    return [_studies[name] for name in sorted(_studies)]

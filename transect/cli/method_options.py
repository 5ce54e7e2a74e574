"""Parameters of methods as options: `--svd-llm.shrinkage 1e-4`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import click


class MethodCommand(click.Command):
    """A command that takes methods' parameters as options, wherever they stand, and lists them in its help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Options that are none of the command's own go to `ctx.obj`, with their values, as (option, value)."""
        own = {name: option for option in self.get_params(ctx) for name in option.opts}
        kept, extra, waiting = [], [], list(args)
        while waiting:
            word = waiting.pop(0)
            name, equals, value = word.partition("=")
            if word == "--":
                kept += [word, *waiting]
                break
            if not word.startswith("--") or name in own:
                kept.append(word)
                option = own.get(name)
                if isinstance(option, click.Option) and not (option.is_flag or option.count or equals):
                    kept += waiting[:1]
                    del waiting[:1]
                continue
            if not equals:
                if not waiting or waiting[0].startswith("--"):
                    raise click.UsageError(f"no such option, or one without a value: {name}", ctx)
                value = waiting.pop(0)
            extra.append((name, value))
        ctx.obj = extra
        return super().parse_args(ctx, kept)

    def sections(self) -> Sequence[tuple[str, Sequence[Any]]]:
        """What has parameters here: headings with the registered entries."""
        from ..compression import allocations, methods

        return ("Methods and their parameters", methods()), ("Allocations", allocations())

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """After the command's own options: every entry of the sections, its paper, its parameters and defaults."""
        for title, entries in self.sections():
            with formatter.section(title):
                for entry in entries:
                    formatter.write_dl([(f"{entry.name}  [{entry.paper}]", entry.summary)])
                    with formatter.indentation():
                        for parameter in entry.parameters:
                            name = f"--{entry.name}.{parameter.name.replace('_', '-')}"
                            formatter.write_dl([(name, f"{parameter.help} [default: {parameter.default}]")])


class ProbeCommand(MethodCommand):
    """The same for probes."""

    def sections(self) -> Sequence[tuple[str, Sequence[Any]]]:
        from ..probes import probes

        return (("Probes and their parameters", probes()),)


class EditCommand(MethodCommand):
    """The same for edits."""

    def sections(self) -> Sequence[tuple[str, Sequence[Any]]]:
        from ..editing import edits

        return (("Edits and their parameters", edits()),)


class AdapterCommand(MethodCommand):
    """The same for adapters, parametrizations, objectives, optimizers, rates by layer and penalties."""

    def sections(self) -> Sequence[tuple[str, Sequence[Any]]]:
        from ..adaptation import adapters
        from ..goals import objectives
        from ..training import layer_rates, optimizers, parametrizations, penalties

        return (
            ("Adapters and their parameters", adapters()),
            ("Parametrizations: the same choice, and the result is a model", parametrizations()),
            ("Objectives", objectives()),
            ("Optimizers", optimizers()),
            ("Rates by layer", layer_rates()),
            ("Penalties", penalties()),
        )


class ConversionCommand(MethodCommand):
    """The same for conversions."""

    def sections(self) -> Sequence[tuple[str, Sequence[Any]]]:
        from ..conversion import conversions

        groups = dict.fromkeys(one.group for one in conversions())
        return tuple((f"For {group}", [one for one in conversions() if one.group == group]) for group in groups)


class StudyCommand(MethodCommand):
    """The same for studies."""

    def sections(self) -> Sequence[tuple[str, Sequence[Any]]]:
        from ..studies import studies

        return (("Studies and their parameters", studies()),)


class MergeCommand(MethodCommand):
    """The same for ways to merge."""

    def sections(self) -> Sequence[tuple[str, Sequence[Any]]]:
        from ..merging import mergings

        return (("Ways to merge and their parameters", mergings()),)


class PartCommand(MethodCommand):
    """The same for parts."""

    def sections(self) -> Sequence[tuple[str, Sequence[Any]]]:
        from ..parts import parts
        from ..parts.registry import SLOTS

        return tuple((f"Parts for --{slot}", parts(slot)) for slot in SLOTS)


class PartContestCommand(PartCommand):
    """The same for tasks, parts and optimizers."""

    def sections(self) -> Sequence[tuple[str, Sequence[Any]]]:
        from ..tasks import tasks
        from ..training import optimizers

        return ("Tasks and their parameters", tasks()), *super().sections(), ("Optimizers", optimizers())


class SearchCommand(MethodCommand):
    """The same for search methods."""

    def sections(self) -> Sequence[tuple[str, Sequence[Any]]]:
        from ..sizing import searchers

        return (("Search methods and their parameters", searchers()),)


def method_settings(options: list[tuple[str, str]], method: str | None) -> dict[str, dict[str, Any]]:
    """`--svd-llm.shrinkage 1e-4` (or `--shrinkage 1e-4` where there is one method) by method, as strings."""
    found: dict[str, dict[str, Any]] = {}
    for option, value in options:
        owner, dot, parameter = option.removeprefix("--").rpartition(".")
        if not dot:
            if method is None:
                raise click.UsageError(f"no such option: {option} (parameters of a method are --METHOD.PARAMETER)")
            owner = method
        found.setdefault(owner, {})[parameter.replace("-", "_")] = value
    return found


def refuse_unused(settings: Iterable[str], used: Collection[str]) -> None:
    """A usage error if there are settings of something that is not used."""
    unused = [name for name in settings if name not in used]
    if unused:
        raise click.UsageError(
            f"there are parameters for {', '.join(unused)}, but only {', '.join(used)} take any here"
        )

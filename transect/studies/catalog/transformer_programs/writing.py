"""A model as a Python program that computes the same: readable, and in need of nothing but Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .branches import Cases, Outcome, by_limit, by_value, chain
from .model import UNIT, ProgramModel
from .reading import Head, Read, Table, Variable, read

Run = Callable[[Sequence[str]], list[str]]
_LINE = 120
_SELECT = '''

def select(keys, queries, predicate):
    """For each query the places of all keys that match."""
    return [[j for j, key in enumerate(keys) if predicate(query, key)] for query in queries]
'''
_SELECT_BEFORE = '''

def select(keys, queries, predicate):
    """For each query the places of all keys that match, none of them behind it."""
    return [[j for j, key in enumerate(keys[: i + 1]) if predicate(query, key)] for i, query in enumerate(queries)]
'''
_HELPERS = '''

def select_closest(keys, queries, predicate):
    """For each query the place of the nearest key that matches: of two the earlier, itself last, and 0 if none does."""
    return [
        min(matches, key=lambda j: (j == i, abs(j - i), j), default=0)
        for i, matches in enumerate(select(keys, queries, predicate))
    ]


def aggregate(places, values):
    """The value at each query's place."""
    return [values[j] for j in places]


def aggregate_sum(selected, values):
    """The sum of the values at each query's places."""
    return [sum(values[j] for j in places) for places in selected]
'''
_RUN = '''

def run(tokens):
    """A label for every token; where none was asked for in training it means nothing. PAD is for the end alone."""
    tokens = list(tokens)
    while tokens and tokens[-1] == PAD:
        tokens.pop()
    if len(tokens) > LENGTH or any(token not in SCORES["token"] for token in tokens):
        raise ValueError(f"at most {LENGTH} tokens, each one of {list(SCORES['token'])}, and not {tokens}")
    positions = list(range(len(tokens)))
    ones = [1] * len(tokens)
'''
_CLASSIFIER = """
    labels = []
    for i in range(len(tokens)):
        totals = [0] * len(LABELS)
        for name, values in categorical.items():
            totals = [total + score for total, score in zip(totals, SCORES[name][values[i]])]
        for name, values in numerical.items():
            totals = [total + values[i] * score for total, score in zip(totals, SCORES[name])]
        labels.append(LABELS[totals.index(max(totals))])
    return labels


# Of each label, in 1/UNIT nat: for the values of a variable, or for each that a variable counts.
SCORES = {
ENTRIES
}

if __name__ == "__main__":
    import sys

    print(*run(sys.argv[1:]))
"""


def decompiled(model: ProgramModel, words: Sequence[str], labels: Sequence[str]) -> str:
    """The text of a program whose `run(words)` gives the labels that a hardened model predicts, for every input.

    words, labels: of the ids; the first word is padding. They stand in the text as literals, whatever is in them.

    A head becomes a predicate with `select_closest` and `aggregate`, or `select` and `aggregate_sum`; an MLP becomes a
    table; the classifier's weights are in `SCORES` (the paper's Section 3.3). Other than in the released code a query's
    own position comes behind every other match, as it does in the model, and one match at position 0 is a match.
    """
    found = read(model, words)
    functions, calls = [], []
    for number, layer in enumerate(found.layers):
        calls += ["", f"    # layer {number}"]
        for step in layer:
            defined, called = _head(step) if isinstance(step, Head) else _table(step)
            functions += ["", "", *defined]
            calls.append(f"    {called}")
    scores = _CLASSIFIER.replace("UNIT", f"{UNIT:,}").replace("ENTRIES", "\n".join(_scores(found)))
    text = [
        '"""A transformer program: `run` labels a sequence as the model does that it was written from."""', "",
        f"PAD = {words[0]!r}", f"LENGTH = {found.length}", *_wrapped("LABELS = [", map(repr, labels), "]"),
        (_SELECT_BEFORE if found.causal else _SELECT) + _HELPERS.rstrip(), *functions, _RUN.rstrip(), *calls, "",
        *_named("categorical", found.categorical), *_named("numerical", found.numerical), scores,
    ]  # fmt: skip
    return "\n".join(text)


def runner(program: str) -> Run:
    """Its `run`. program: one that `decompiled` wrote; it is executed."""
    namespace = {"__name__": "program"}
    exec(compile(program, "program.py", "exec"), namespace)
    return namespace["run"]  # type: ignore[return-value]


def _head(head: Head) -> tuple[list[str], str]:
    """Its predicate, and the line that computes its output."""
    query, key = f"q_{head.query.name}", f"k_{head.key.name}"
    possible, alike = set(head.key.values), head.query.words is head.key.words
    itself = sum(value == wanted for value, wanted in head.predicate.items() if wanted in possible)

    def result(value: int, wanted: int) -> str:
        if wanted not in possible:
            return "False"
        same = alike and value == wanted and itself > 1
        return f"{key} == {query if same else repr(head.key.shown(wanted))}"

    table = {head.query.shown(value): result(value, wanted) for value, wanted in head.predicate.items()}
    name = f"{'count_' if head.counts else ''}predicate_{head.name}"
    defined = [f"def {name}({query}, {key}):", *_indented(chain(by_value(query, table), _returned))]
    gather, select = ("aggregate_sum", "select") if head.counts else ("aggregate", "select_closest")
    chosen = f"{select}({head.key.name}s, {head.query.name}s, {name})"
    return defined, f"{head.output.name}s = {gather}({chosen}, {head.value.name}s)"


def _table(table: Table) -> tuple[list[str], str]:
    """Its function, and the line that computes its output."""
    names = ", ".join(one.name for one in table.inputs)
    if len(table.inputs) == 1:
        lines = chain(_cases(table, table.inputs[0], table.entries.tolist()), _returned)
    else:
        first, second = table.inputs
        rows, columns = ([tuple(row) for row in one.tolist()] for one in (table.entries, table.entries.T))
        by_first = chain(_cases(table, first, rows), lambda row: chain(_cases(table, second, row), _returned))
        by_second = chain(_cases(table, second, columns), lambda row: chain(_cases(table, first, row), _returned))
        lines = min(by_first, by_second, key=len)
    lists = [f"{one.name}s" for one in table.inputs]
    source = lists[0] if len(lists) == 1 else f"zip({', '.join(lists)})"
    called = f"{table.output.name}s = [{table.name}({names}) for {names} in {source}]"
    return [f"def {table.name}({names}):", *_indented(lines)], called


def _cases(table: Table, of: Variable, outcomes: Sequence[Outcome]) -> Cases[Outcome]:
    """The outcomes by the values of an input, in their order."""
    if table.counts:
        return by_limit(of.name, of.values, outcomes)
    return by_value(of.name, {of.shown(value): one for value, one in zip(of.values, outcomes, strict=True)})


def _returned(value: object) -> list[str]:
    return [f"return {value}"]


def _scores(found: Read) -> list[str]:
    """The entries of SCORES, numbers under each other."""
    lines, rows = [], [row for table in found.weights.values() for row in table]
    wide = max(len(str(number)) for row in rows for number in row)

    def shown(row: Sequence[int]) -> str:
        return f"[{', '.join(str(number).rjust(wide) for number in row)}],"

    for variable in found.categorical:
        values = [repr(variable.shown(value)) for value in variable.values]
        space = max(map(len, values))
        table = zip(values, found.weights[variable.name], strict=True)
        lines += [f'    "{variable.name}": {{']
        lines += [f"        {value}: {' ' * (space - len(value))}{shown(row)}" for value, row in table]
        lines += ["    },"]
    lines += [f'    "{variable.name}": {shown(found.weights[variable.name][0])}' for variable in found.numerical]
    return lines


def _named(kind: str, variables: Sequence[Variable]) -> list[str]:
    """A dictionary of the variables' lists."""
    return _wrapped(f"    {kind} = {{", (f'"{one.name}": {one.name}s' for one in variables), "}")


def _wrapped(start: str, parts: Iterable[str], end: str) -> list[str]:
    """On one line, or, if that is too long, as many parts on each as there is room for."""
    parts = list(parts)
    line = f"{start}{', '.join(parts)}{end}"
    if len(line) <= _LINE:
        return [line]
    margin = " " * (len(start) - len(start.lstrip()))
    lines = [f"{margin}    {parts[0]},"]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 2 <= _LINE:
            lines[-1] += f" {part},"
        else:
            lines.append(f"{margin}    {part},")
    return [start, *lines, f"{margin}{end}"]


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]

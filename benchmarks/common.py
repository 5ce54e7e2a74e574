"""What the benchmarks share: random models, token batches, alternating timing, and the printed table."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from transect.data import Batches
from transect.store import write_text

Seconds = dict[str, list[float]]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with `--quick` (tiny sizes, to see that everything runs) and `--repeats`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, its times mean nothing")
    made.add_argument("--repeats", type=int, help="timed rounds; each runs every candidate once, in turn")
    return made


class Kept:
    """Rows of a benchmark that takes long, each in a file of a folder (None: nowhere): the same command goes on there.

    SystemExit where the folder has rows of other settings.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        if folder is not None:
            note, own = folder / "settings.json", json.dumps(dict(settings))
            if note.exists() and note.read_text(encoding="utf-8") != own:
                raise SystemExit(f"{folder} holds rows with other settings: name another --out")
            folder.mkdir(parents=True, exist_ok=True)
            write_text(note, own)

    def row(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of that name, made if it is not there."""
        file = None if self.folder is None else self.folder / f"{name.replace(' ', '-')}.json"
        if file is not None and file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        found = make()
        if file is not None:
            write_text(file, json.dumps(found))
        return found


def generation_options(
    description: str | None, argv: Sequence[str] | None, *, keep: float, repeats: int
) -> argparse.Namespace:
    """The command line of a benchmark that reads a prompt and decodes: sizes, with those of `--quick` filled in.

    keep, repeats: defaults. Besides the options the result has `steps`, the tokens to decode.
    """
    made = parser(description)
    made.add_argument("--hidden", type=int, help="default 1024")
    made.add_argument("--blocks", type=int, help="default 4")
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--prompt", type=int, help="tokens to read; default 128")
    made.add_argument("--keep", type=float, default=keep)
    chosen = made.parse_args(argv)
    quick = chosen.quick
    chosen.hidden = chosen.hidden or (64 if quick else 1024)
    chosen.blocks = chosen.blocks or (2 if quick else 4)
    chosen.prompt = chosen.prompt or (16 if quick else 128)
    chosen.steps = 2 if quick else 16
    chosen.repeats = chosen.repeats or (1 if quick else repeats)
    return chosen


def llama(
    hidden: int, blocks: int, *, intermediate: int | None = None, vocabulary: int = 1024, positions: int = 1024
) -> Any:
    """A random Llama: full attention heads of size 64 (or 8 in all), gated MLP of 2.75 x hidden, untied head."""
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate or hidden * 11 // 4, num_hidden_layers=blocks,
        num_attention_heads=heads(hidden), num_key_value_heads=heads(hidden), vocab_size=vocabulary,
        max_position_embeddings=positions, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    return _random(transformers.LlamaForCausalLM, config)


def gpt2(hidden: int, blocks: int, *, vocabulary: int = 1024, positions: int = 1024) -> Any:
    """A random GPT-2: plain MLP of 4 x hidden; no dropout, so that passes can be compared."""
    config = transformers.GPT2Config(
        n_embd=hidden, n_layer=blocks, n_head=heads(hidden), n_positions=positions, vocab_size=vocabulary,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return _random(transformers.GPT2LMHeadModel, config)


def heads(hidden: int) -> int:
    """Attention heads of size 64, or smaller ones in a narrow model."""
    return hidden // 64 if hidden >= 256 else 4


def _random(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval()


def token_batches(batches: int, batch_size: int, length: int, vocabulary: int = 1024, seed: int = 1) -> Batches:
    """Random token ids (batch_size x length), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batches, batch_size, length)
    return Batches([{"input_ids": ids} for ids in torch.randint(2, vocabulary, shape, generator=generator)])


def alternate(candidates: Mapping[str, Callable[[], Any]], repeats: int) -> Seconds:
    """Seconds of each candidate, `repeats` times: one warm-up each, then rounds in which each runs once in turn.

    In turn, because the speed of a machine drifts: within a round all candidates see nearly the same one.
    """
    seconds: Seconds = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(repeats):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: Seconds, numerator: str, denominator: str) -> float:
    """Median over the rounds of numerator / denominator."""
    return median(a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True))


def apart(script: str, option: str, arguments: Mapping[str, Any]) -> Any:
    """The JSON that a benchmark prints last when it is called in a fresh process with `option` and these arguments."""
    command = [sys.executable, script, option, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{Path(script).name} {option} failed with {json.dumps(arguments)}")
    return json.loads(done.stdout.splitlines()[-1])


def verdict(met: bool) -> str:
    """How the tables say whether a target is met."""
    return "met" if met else "not met"


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str] = ()) -> None:
    """Print one table: text columns left, numbers right (floats with 4 significant digits), notes below."""
    console = Console()
    table = Table(header_style="bold")
    for column, heading in enumerate(headings):
        text = all(isinstance(row[column], str) for row in rows)
        table.add_column(heading, justify="left" if text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    wide = Console(width=10_000).measure(table).maximum
    Console(width=max(console.width, wide)).print(table)
    for note in (*notes, machine()):
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> str:
    """One line: processor architecture, threads, torch."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} ({capability}), {torch.get_num_threads()} threads, torch {torch.__version__}"

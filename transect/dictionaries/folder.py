"""A dictionary on disk, in SAELens' layout: `cfg.json`, and `sae_weights.safetensors` with W_enc (D x F), b_enc (F),
W_dec (F x D) and b_dec (D). What SAELens has trained is read, and what is written here SAELens reads.

Several dictionaries lie side by side, each in a folder of its point's name as TransformerLens has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint.header import FLOATS, read_stored
from ..errors import BadCheckpoint
from ..forward import Point
from ..store import Folder, carries_mark, in_short, keep, read_json, verified, write_text
from ..version import __version__
from .dictionary import Dictionary

KIND = "a sparse dictionary"  # what such a folder is, see `transect.store.Folder`
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
HOOKS: dict[Point, str] = {"heads": "blocks.{}.attn.hook_z"}  # TransformerLens' names of points
NAMES = {"W_enc": "encoder", "b_enc": "encoder_bias", "W_dec": "decoder", "b_dec": "decoder_bias"}
WRITTEN_FOR = "6.0.0"  # the version of SAELens whose form of cfg.json this is


def hook_name(point: Point, layer: int) -> str:
    """TransformerLens' name of the point, which SAELens' files have."""
    return HOOKS[point].format(layer)


def folder_of(place: Path, point: Point, layer: int) -> Path:
    """Where the dictionary of a layer lies: `place` itself if that is one dictionary, else a folder in it."""
    return place if (place / CONFIG).exists() else place / hook_name(point, layer)


def write_dictionary(place: Path, dictionary: Dictionary, point: Point, layer: int, noted: Mapping[str, Any]) -> None:
    """Write a dictionary into a folder, which may be there if it is ours.

    noted: what else cfg.json says under `metadata`, such as `model_name`. The weights come first, so that a folder with
    a cfg.json is whole.
    """
    folder = Folder(place, KIND)
    folder.take()
    said = {
        "d_in": dictionary.width, "d_sae": dictionary.features, "dtype": _dtype(dictionary), "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "hook_z" if point == "heads" else "none",
        "metadata": {"hook_name": hook_name(point, layer), "sae_lens_version": WRITTEN_FOR,
                     "transect": __version__, **noted},
        "architecture": "standard",
    }  # fmt: skip
    config, weights = folder.file(CONFIG), folder.file(WEIGHTS)
    config.unlink(missing_ok=True)
    tensors = {name: _turned(getattr(dictionary, own)) for name, own in NAMES.items()}
    keep(weights, tensors, KIND, said)
    write_text(config, json.dumps(said, indent=1))


def read_dictionary(place: Path) -> tuple[Dictionary, dict[str, Any]]:
    """A dictionary and what its cfg.json says of it, `metadata` among the rest.

    Columns of other lengths than 1, and a b_dec that is not taken off before encoding, are brought to the form of
    `Dictionary`, which computes the same.
    Raises BadCheckpoint for a folder that is incomplete, damaged, or of another kind of dictionary.
    """
    said = read_json(place / CONFIG)
    config = {**said, **(said["metadata"] if isinstance(said.get("metadata"), dict) else {})}
    _check_kind(place, config)
    tensors = _tensors(place / WEIGHTS, said)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    width, features = _size(place, config, "d_in"), _size(place, config, "d_sae")
    wanted = {"W_enc": (width, features), "b_enc": (features,), "W_dec": (features, width), "b_dec": (width,)}
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise BadCheckpoint(f"{place}: {name} is {shapes[name]}, and by {CONFIG} it should be {shape}")
    dictionary = Dictionary(1, 1)  # of any size: its numbers are replaced
    for name, own in NAMES.items():
        setattr(dictionary, own, torch.nn.Parameter(_turned(tensors[name]), requires_grad=False))
    if not config.get("apply_b_dec_to_input", True):  # relu(W x + b) is relu(W (x - b_dec) + b + W b_dec)
        dictionary.encoder_bias.add_(dictionary.encoder @ dictionary.decoder_bias)
    lengths = dictionary.decoder.norm(dim=0)
    if bool(((lengths - 1).abs() > 1e-6).any()):  # what is folded already stays as it is, bit for bit
        dictionary.fold()
    return dictionary.eval(), config


def layer_of(config: Mapping[str, Any], point: Point) -> int | None:
    """The layer that a dictionary says it is of; None where it is of another point, or says nothing of the kind."""
    name = config.get("hook_name", config.get("hook_point"))
    found = re.fullmatch(re.escape(HOOKS[point]).replace(r"\{\}", r"(\d+)"), str(name))
    return int(found[1]) if found else None


def _check_kind(place: Path, config: Mapping[str, Any]) -> None:
    """Only what `Dictionary` computes."""
    for key, fits, default in (
        ("architecture", "standard", "standard"), ("activation_fn", "relu", "relu"),
        ("activation_fn_str", "relu", "relu"), ("normalize_activations", "none", "none"),
    ):  # fmt: skip
        value = config.get(key, default)
        if value not in (fits, None, False):
            raise BadCheckpoint(
                f"{place}: a dictionary with {key} {in_short(value)} cannot be read; known is {fits!r}: "
                "relu(W_enc (x - b_dec) + b_enc), of activations as they are"
            )


def _size(place: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadCheckpoint(f"{place}: {CONFIG} should say how many numbers {key} are, and says {in_short(value)}")
    return value


def _tensors(file: Path, said: Mapping[str, Any]) -> dict[str, Tensor]:
    """The four tensors in float32 or wider, checked."""
    stored = read_stored(file)
    missing = [name for name in NAMES if name not in stored]
    if missing or any(stored[name].dtype not in FLOATS for name in NAMES):
        raise BadCheckpoint(f"{file} should hold {', '.join(NAMES)} as plain numbers, and holds {', '.join(stored)}")
    if "transect" in said.get("metadata", ()) or carries_mark(file, KIND):
        try:
            found: Any = verified(file, KIND)
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{file} cannot be read: {error}") from None
        if found.note != said:
            raise BadCheckpoint(f"{file} was written with another {CONFIG} than the one beside it")
        tensors = {name: found[name] for name in NAMES}
    else:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in stored}
    scaling = tensors.get("scaling_factor")
    if scaling is not None and not bool((scaling == 1).all()):
        raise BadCheckpoint(f"{file} has scaling factors of its features, which is another kind of dictionary")
    for name in NAMES:
        if not bool(tensors[name].isfinite().all()):
            raise BadCheckpoint(f"{file}: {name} holds NaN or infinite values")
    return {name: tensor if tensor.dtype == torch.float64 else tensor.float() for name, tensor in tensors.items()}


def _turned(tensor: Tensor) -> Tensor:
    """From our layout to theirs, and back."""
    return tensor.detach().T.contiguous() if tensor.dim() == 2 else tensor.detach()


def _dtype(dictionary: Dictionary) -> str:
    return str(dictionary.decoder.dtype).removeprefix("torch.")

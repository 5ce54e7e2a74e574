"""Which layers are looked at, and the dictionary of each: read where there is one, trained and written where not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....compression.fingerprint import computation_fingerprint
from ....data import Batches, Specimen
from ....dictionaries import (
    KIND,
    Activations,
    Dictionary,
    Settings,
    folder_of,
    layer_of,
    read_dictionary,
    train_dictionary,
    write_dictionary,
)
from ....errors import NotApplicable, TransectError
from ....forward.points import place
from ....store import Folder
from ....training import State

CONFIG = "cfg.json"


def chosen_layers(specimen: Specimen, layers: str) -> list[int]:
    """The layers that a setting names: "middle", "all", or numbers; NotApplicable where no attention is left.

    Raises TransectError for a layer that does not exist, or whose attention was dropped or is a part.
    """
    blocks = specimen.anatomy.blocks
    able = [block.index for block in blocks if block.attention is not None and
            place(specimen.anatomy, "heads", block.index) is not None]  # fmt: skip
    if not able:
        raise NotApplicable("no block has attention heads of its own: they were dropped, or parts stand in their place")
    if layers in ("middle", "all"):
        return able if layers == "all" else [able[len(able) // 2]]
    try:
        wanted = list(dict.fromkeys(int(word) for word in layers.split(",")))
    except ValueError:
        raise TransectError(f"layers={layers!r} should be middle, all, or numbers such as 0,3") from None
    wrong = [layer for layer in wanted if layer not in able]
    if wrong:
        raise TransectError(
            f"layer {wrong[0]} cannot be looked at: the blocks with attention heads are {', '.join(map(str, able))}"
        )
    return wanted


@dataclass
class Found:
    """A layer's dictionary. steps, rounds: of its training, and how often that went through the text; 0 if it was read.
    trained_on: what a dictionary that was read says of its training. vectors: what it was, or would be, trained on."""

    layer: int
    dictionary: Dictionary
    vectors: Activations
    steps: int = 0
    trained_on: str = ""

    @property
    def rounds(self) -> float:
        return self.steps * self.vectors.batch / self.vectors.tokens


def present(
    specimen: Specimen, name: str, layers: list[int], foreign: bool
) -> dict[int, tuple[Dictionary, dict[str, Any]]]:
    """The dictionaries of these layers that are in the folder, each fit for its layer; none for an empty name.

    Raises TransectError for one of another width, layer or model, or damaged, and where something else is there.
    """
    if not name:
        return {}
    found, root = {}, Path(name).expanduser()
    fingerprint = computation_fingerprint(specimen.model)
    for layer in layers:
        folder = folder_of(root, "heads", layer)
        if not (folder / CONFIG).exists():
            Folder(folder, KIND).check_place()
            continue
        dictionary, said = read_dictionary(folder)
        width, of = specimen.anatomy.blocks[layer].find("o").shape[1], layer_of(said, "heads")
        if of != layer:
            raise TransectError(
                f"the dictionary in {folder} is of {said.get('hook_name', 'a point that it does not name')}, and not "
                f"of the attention outputs of layer {layer}"
                + (f": choose layers={of}" if of is not None and of < specimen.layers else "")
            )
        if dictionary.width != width:
            raise TransectError(
                f"the dictionary in {folder} is of vectors of {dictionary.width} numbers, and the heads of layer "
                f"{layer} put out {width}: it is another model's"
            )
        if said.get("model_fingerprint", fingerprint) != fingerprint and not foreign:
            raise TransectError(
                f"the dictionary in {folder} was trained on another model than this, or on this one before it was "
                "changed: foreign=true looks at this model through it all the same, or name another folder"
            )
        found[layer] = (dictionary, said)
    return found


def obtained(
    specimen: Specimen, training: Batches, layer: int, name: str, settings: Settings,
    read: tuple[Dictionary, Mapping[str, Any]] | None,
) -> Found:  # fmt: skip
    """The dictionary of a layer; one that is trained here is written before anything is measured."""
    vectors = Activations(
        specimen.anatomy, training, "heads", layer, count=settings.steps, batch=settings.batch,
        buffer=settings.buffer, first=settings.first, seed=settings.seed,
    )  # fmt: skip
    if read is not None:
        said = str(read[1].get("model_name") or read[1].get("hook_name"))
        return Found(layer, read[0].to(specimen.model.device), vectors, trained_on=said)
    folder = folder_of(Path(name).expanduser(), "heads", layer) if name else None
    fingerprint = computation_fingerprint(specimen.model)
    noted = {"layer": layer, "model": fingerprint, "data": training.fingerprint}
    unfinished = State(None if folder is None else folder.with_name(f"{folder.name}.unfinished"),
                       kind="an unfinished dictionary")  # fmt: skip
    dictionary, course = train_dictionary(
        vectors, settings, state=unfinished, note=noted, progress=specimen.progress
    )  # fmt: skip
    if folder is not None:
        said = {"model_name": specimen.name or type(specimen.model).__name__, "model_fingerprint": fingerprint,
                "context_size": max(map(len, training.texts())), "training_tokens": course.tokens}  # fmt: skip
        write_dictionary(folder, dictionary, "heads", layer, said)
        unfinished.remove()
    return Found(layer, dictionary, vectors, course.steps)

"""Small model folders to damage, and the ways to change one entry of theirs."""

import json

from safetensors.torch import load_file, save_file

Q = "model.layers.0.self_attn.q_proj"


def edit(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def edit_record(folder, table, path, **entries):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["record"][table].setdefault(path, {}).update(entries)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, **tensors):
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in {**state, **tensors}.items() if v is not None}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip

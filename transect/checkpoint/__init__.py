"""Save and load changed models through the ordinary Hugging Face calls."""

from .attach import attach
from .folder import check_folder
from .open import Opened, folder_of, load_tokenizer, model_class, open_model
from .packed import packed_tensors
from .place import placed
from .replay import replay
from .save import check_output, save, structure_of, tokenizer_of, write_description

attach()

__all__ = [
    "Opened", "attach", "check_folder", "check_output", "folder_of", "load_tokenizer", "model_class", "open_model",
    "packed_tensors", "placed", "replay", "save", "structure_of", "tokenizer_of", "write_description",
]  # fmt: skip

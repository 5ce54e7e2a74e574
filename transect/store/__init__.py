"""Files that can be trusted: written whole or not at all, read back only if they are what they should be."""

from .exchange import finish_exchange, place_folder
from .folder import Folder
from .kept import (
    Kept,
    carries_mark,
    keep,
    keep_json,
    kept,
    kept_json,
    tensor_bytes,
    verified,
    verified_json,
    without_marks,
)
from .lock import alone
from .text import in_short, parsed, read_any_json, read_json
from .write import link, remove, replacing, sweep, temporary, write_text

__all__ = [
    "Folder",
    "Kept",
    "alone",
    "carries_mark",
    "finish_exchange",
    "in_short",
    "keep",
    "keep_json",
    "kept",
    "kept_json",
    "link",
    "parsed",
    "place_folder",
    "read_any_json",
    "read_json",
    "remove",
    "replacing",
    "sweep",
    "temporary",
    "tensor_bytes",
    "verified",
    "verified_json",
    "without_marks",
    "write_text",
]

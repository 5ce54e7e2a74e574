"""Conversations to token ids, by the chat template of the tokenizer."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor

from ..errors import BadData
from .sources import Row

CHATS = ("messages", "conversations")  # the columns in which data sets keep them
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def is_chat(row: Row) -> bool:
    """Whether a row is a conversation: it has a column of messages, and no text."""
    return "text" not in row and any(name in row for name in CHATS)


def chat_stream(rows: Iterable[Row], tokenizer: Any) -> Tensor:
    """Ids (n, int32) of all conversations one after another, each as the template writes it and nothing between them.

    A template marks where a conversation begins and ends, so that no other token is added.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise BadData(
            "the data are conversations, and the tokenizer has no chat template: set tokenizer.chat_template, or give "
            "texts"
        )
    stream = array("i")
    for number, row in enumerate(rows, 1):
        try:
            messages = [_message(one) for one in _messages(row)]
            stream.extend(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise BadData(f"row {number}: the conversation cannot be written by the chat template: {error}") from None
    return torch.from_numpy(np.array(stream, dtype=np.int32))


def _messages(row: Row) -> list[Any]:
    found = next((row[name] for name in CHATS if name in row), None)
    if not isinstance(found, (list, tuple)) or not found:
        raise TypeError(f"a list of messages is expected, got {found if found == [] else type(found).__name__}")
    return list(found)


def _message(given: Any) -> dict[str, Any]:
    """A message with `role` and `content`, also from ShareGPT's `from` and `value`; what is None is left out."""
    if not isinstance(given, Mapping):
        raise TypeError(f"a message is a dict with `role` and `content`, not a {type(given).__name__}")
    if "role" in given:
        return {name: value for name, value in given.items() if value is not None or name == "content"}
    if "from" not in given or "value" not in given:
        raise TypeError(f"a message has `role` and `content`, or `from` and `value`, and not {sorted(given)}")
    if given["from"] not in _SPEAKERS:
        raise ValueError(f"the speaker {given['from']!r} is none of {', '.join(_SPEAKERS)}")
    return {"role": _SPEAKERS[given["from"]], "content": given["value"]}

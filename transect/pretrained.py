"""The one door to transformers' `from_pretrained`: code that comes with a model is never run, and nobody is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import TransectError


def pretrained(kind: Any, where: str | Path, **kwargs: Any) -> Any:
    """`kind.from_pretrained(where)` for a class of transformers, or one of its auto classes.

    Raises TransectError for what only code of its own could load (`auto_map`, in any of its files); otherwise what
    transformers raises. Left to itself transformers asks on the terminal, and runs the code if somebody says yes.
    """
    try:
        return kind.from_pretrained(str(where), trust_remote_code=False, **kwargs)
    except TransectError:
        raise
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise TransectError(
            f"{where} comes with code of its own that would have to run to load it ({kind.__name__}), and Transect "
            "never runs such code. What it opens are models, tokenizers and processors that transformers itself has"
        ) from None

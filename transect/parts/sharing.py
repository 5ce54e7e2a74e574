"""Parts of several layers that share numbers, stored once."""

from __future__ import annotations

from typing import Any

from ..operators.shared import SharesBank
from .part import Part


class SharingPart(SharesBank, Part):
    """A part that shares a bank with those that were put in together with it; the first of them owns it.

    A subclass calls `share` in its constructor and defines `new_bank`. Where the owner is dropped with its layer, the
    next one becomes the owner.
    """

    def new_bank(self) -> Any:
        """The module that is shared, with random numbers."""
        raise NotImplementedError

    def share(self, place: int, first: int) -> None:
        """Own the bank, or wait for it. place, first: see `Sizes`."""
        self.bank_group, self.owns_bank = f"{self.kind.partition('.')[2]} {first}", place == 0
        if self.owns_bank:
            self.bank = self.new_bank()

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "owns_bank": self.owns_bank}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Part:
        made: Any = super().from_description({key: value for key, value in description.items() if key != "owns_bank"})
        if made.owns_bank and not description["owns_bank"]:
            raise ValueError("the first of the parts that share a bank owns it")
        if description["owns_bank"] and not made.owns_bank:  # the first one was dropped
            made.adopt_bank(made.new_bank())
        return made

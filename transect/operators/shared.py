"""Operators of several layers that share numbers, stored once."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..anatomy.storage import parameter_of
from .base import Operator


class Bank(nn.Module):
    """The shared numbers: one parameter, `weight`, of whatever shape its users agree on."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else parameter_of(weight)


class SharesBank:
    """Something that uses a bank which others like it use too.

    One of them owns it: there it is a submodule, so that it is saved, moved and trained once. The others hold a plain
    reference. A checkpoint names the owner (`owns_bank` in the description), and loading links the others to it.
    bank_group names the bank within the model.
    """

    bank_group: str
    owns_bank: bool
    bank: Any

    def use_bank(self, bank: Any) -> None:
        """Refer to a bank that another one owns."""
        self.__dict__["bank"] = bank  # not a submodule: it is stored with its owner alone

    def adopt_bank(self, bank: Any) -> None:
        """Become the owner."""
        self.__dict__.pop("bank", None)
        self.owns_bank = True
        self.bank = bank

    def disown_bank(self) -> None:
        """Refer to the bank from now on, because another one owns it."""
        bank = self.bank
        del self.bank
        self.owns_bank = False
        self.use_bank(bank)


class Shared(SharesBank, Operator):
    """An operator that uses a bank which operators of other layers use too.

    group: names the bank within the model. bank: None until it is linked (when built from a description).
    A subclass reads `self.bank.weight`, and puts `group` and `owns_bank` in its description.
    """

    def __init__(self, d_in: int, d_out: int, group: str, bank: Bank | None, owns_bank: bool) -> None:
        super().__init__(d_in, d_out)
        self.bank_group = group
        self.owns_bank = owns_bank
        if owns_bank:
            self.bank = bank
        else:
            self.use_bank(bank)

"""Diff-QuickFix: one phrase mapped onto another in a text encoder's attention."""

from .diffquickfix import diffquickfix

__all__ = ["diffquickfix"]

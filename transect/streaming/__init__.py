"""Compression with one block in memory at a time."""

from .compress import compress_streamed
from .source import StreamedModel

__all__ = ["StreamedModel", "compress_streamed"]

"""Compression with one block in memory at a time."""

from .compress import compress_streamed
from .source import StreamedModel, folder_of

__all__ = ["StreamedModel", "compress_streamed", "folder_of"]

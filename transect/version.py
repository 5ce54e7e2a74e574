"""The version, here so that every room can name it without importing the whole package."""

__version__ = "0.1.0"

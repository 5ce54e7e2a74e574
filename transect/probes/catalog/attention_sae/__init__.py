"""Sparse features of attention outputs, with the heads that make them and the tokens that they come from."""

from . import attention_sae  # noqa: F401 - importing it registers it

"""Latent language: what each layer would say if the model stopped there, by kind of token and by language."""

from . import latent_language  # noqa: F401 - importing it registers it

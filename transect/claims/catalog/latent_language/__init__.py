"""Claims of the study of latent languages (Zhong et al. 2024, arXiv:2408.10811)."""

from . import latent_language  # noqa: F401 - importing it registers it

"""Adapting a trained model: what is trained of it, as tuners of PEFT, one file or folder each in `catalog`."""

from . import catalog
from .registry import Adapter, adapter, adapter_named, adapters

__all__ = ["Adapter", "adapter", "adapter_named", "adapters", "catalog"]

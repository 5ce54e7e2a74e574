"""Adapting a trained model: what is trained of it, as tuners of PEFT, one file or folder each in `catalog`.

The catalog, and PEFT with it, is imported when an adapter is asked for.
"""

from .peft_knows import attach_to_peft
from .registry import Adapter, adapter, adapter_named, adapters, way_named
from .settings import Settings

attach_to_peft()

__all__ = ["Adapter", "Settings", "adapter", "adapter_named", "adapters", "way_named"]

"""How `from_pretrained` comes to replay the structure record: transformers' extension point for quantizers.

Everything here is copied into the modeling file that a checkpoint carries, so it must not need the rest of Transect
beyond what `replay` needs.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..anatomy.record import StructureRecord
from ..errors import BadCheckpoint
from .replay import replay

METHOD = "transect"
# What config.json gives as the attention where no tensor's shape would stop a transformers that knows no Transect.
STOP = "transect (import it, or pass trust_remote_code=True)"


class TransectConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint: the structure record, as plain JSON."""

    def __init__(self, record: Any = None, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.record = record


class TransectQuantizer(HfQuantizer):
    """Replays the record on the empty skeleton, before the weights come. Nothing is quantized."""

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before the model is built: let it be built from the sizes that all layers share."""
        if config._attn_implementation == STOP:
            config._attn_implementation = None
        self.per_layer_config = None
        if getattr(config, "is_heterogeneous", False):
            self.per_layer_config = config.to_dict()["per_layer_config"]
            config.per_layer_config = None
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        record = getattr(self.quantization_config, "record", None)
        if not isinstance(record, dict):
            raise BadCheckpoint("config.json holds no structure record under quantization_config.record")
        self.record = replay(model, StructureRecord.from_dict(record))
        # Where weights are tied, transformers cuts or pads biases to a weight's first side, which Conv1D's is not.
        model._adjust_bias = _leave_bias

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # From here on it is an ordinary model: these marks would forbid `.float()`, the Trainer and more.
        for mark in ("hf_quantizer", "is_quantized", "quantization_method", "_adjust_bias"):
            model.__dict__.pop(mark, None)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        if self.per_layer_config is not None:
            model.config.per_layer_config = self.per_layer_config
            model.config.allow_global_per_layer_attribute_access = True
        return model

    def is_serializable(self) -> bool:
        """Always: the model's own numbers are what is saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Always: operators are made of ordinary parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Always: operators are ordinary modules."""
        return True


def _leave_bias(*_: Any) -> None:
    """A bias is as long as the record has it."""


def register(quantizer: type[HfQuantizer]) -> None:
    """Let transformers use it for `quant_method: transect`, in place of one registered before.

    transformers' own `register_quantizer` refuses a second time, which a reloaded module would run into.
    """
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = TransectConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = quantizer


def register_for_lack_of_transect() -> None:
    """What a checkpoint's own modeling file calls: an installed Transect knows better."""
    if not getattr(AUTO_QUANTIZER_MAPPING.get(METHOD), "__module__", "").startswith("transect."):
        register(TransectQuantizer)

"""Weights that are not the ordinary matrices that they seem to be are named at the door.

The fakes hold their numbers as bitsandbytes, torchao, quanto, GPTQ, fp8 and their like do; none of them is installed.
"""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.errors import TransectError

from .models import tiny
from .test_checkpoint import change

LORA = dict(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


class Packed(torch.Tensor):
    """A weight that says it is bfloat16 of the full shape and holds codes and scales (torchao, quanto)."""

    @staticmethod
    def __new__(cls, codes, scale):
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)
        made.codes, made.scale = codes, scale
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(function)


class Codes(nn.Parameter):
    """bitsandbytes: a parameter of its own class."""


class Computes(nn.Linear):
    """A linear layer whose forward is another: activations quantised on the way, scales applied ..."""

    def forward(self, x):
        return super().forward(x.round())


class NotLinear(nn.Module):
    """GPTQ, AWQ, HQQ: no nn.Linear, integers in buffers."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, linear.out_features))


def with_weight(make):
    def put(linear):
        linear._parameters["weight"] = make(linear.weight.detach())
        return linear

    return put


def computing(linear):
    made = Computes(linear.in_features, linear.out_features, bias=False)
    made.weight = linear.weight
    return made


def beside(name, buffer=False):
    def put(linear):
        value = torch.ones(1)
        linear.register_buffer(name, value) if buffer else linear.register_parameter(name, nn.Parameter(value))
        return linear

    return put


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


QUANTIZED = {
    "4-bit codes in a class of their own": with_weight(
        lambda w: Codes(torch.zeros(w.numel() // 2, 1, dtype=torch.uint8), False)
    ),
    "8-bit codes in a class of their own": with_weight(lambda w: Codes(w.to(torch.int8), False)),
    "codes in an ordinary parameter": with_weight(
        lambda w: nn.Parameter(torch.zeros(w.numel() // 2, 1, dtype=torch.uint8), False)
    ),
    "8-bit codes in an ordinary parameter": with_weight(lambda w: nn.Parameter(w.to(torch.int8), False)),
    "a tensor subclass": with_weight(lambda w: nn.Parameter(Packed(w.to(torch.int8), torch.ones(1)), False)),
    "float8": with_weight(lambda w: nn.Parameter(w.to(torch.float8_e4m3fn), False)),
    "float8 with a scale": lambda m: beside("weight_scale_inv")(
        with_weight(lambda w: nn.Parameter(w.to(torch.float8_e4m3fn), False))(m)
    ),
    "ordinary numbers and a scale": beside("input_scale", buffer=True),
    "shards of a weight": with_weight(lambda w: nn.Parameter(w[:3].clone())),
    "a flattened weight": with_weight(lambda w: nn.Parameter(w.flatten())),
    "a forward of its own": computing,
    "no linear layer at all": NotLinear,
}
COMPUTED = {
    "parametrized": lambda m: parametrize.register_parametrization(m, "weight", Double()) and m,
    "weight norm": lambda m: torch.nn.utils.parametrizations.weight_norm(m),
    "pruned by a mask": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


def changed(put, role="q_proj"):
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    setattr(attention, role, put(getattr(attention, role)))
    return model


@pytest.mark.parametrize("name", list(QUANTIZED))
def test_quantised_weights_are_named(name):
    model = changed(QUANTIZED[name])
    for attempt in (
        lambda: Anatomy(model),
        lambda: transect.inspect(model, ["nuclear-norm"]),
        lambda: transect.compress(model, "svd", keep=0.5),
    ):
        with pytest.raises(TransectError, match=r"model\.layers\.1\.self_attn\.q_proj .*[Ll]oad it without the quanti"):
            attempt()


@pytest.mark.parametrize("path", ["model.embed_tokens", "lm_head"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantised_embeddings_and_heads_are_named_too(path, dtype):
    model = tiny("llama")
    module = model.get_submodule(path)
    module._parameters["weight"] = nn.Parameter(module.weight.detach().to(dtype), False)
    with pytest.raises(TransectError, match=rf"{path} .*cannot be opened: .*{str(dtype)[6:]}.*quantised"):
        transect.compress(model, "svd", 0.7)


@pytest.mark.parametrize("name", list(COMPUTED))
def test_weights_that_are_computed_are_named_and_the_advice_helps(name):
    model = changed(COMPUTED[name], "o_proj")
    with pytest.raises(TransectError, match=r"layers\.1\.self_attn\.o_proj .*remove_parametrizations.*prune\.remove"):
        Anatomy(model)
    module = model.model.layers[1].self_attn.o_proj
    if name == "pruned by a mask":
        prune.remove(module, "weight")
    else:
        parametrize.remove_parametrizations(module, "weight")
    assert Anatomy(model).matrices(["o"])[1].shape == (32, 32)


def test_gpt2s_own_layers_are_looked_at_too():
    model = tiny("gpt2")
    model.transformer.h[2].mlp.c_fc.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), False)
    with pytest.raises(TransectError, match=r"h\.2\.mlp\.c_fc \(Conv1D\).*uint8 \[8, 1\], where \[32, 128\]"):
        Anatomy(model)


@pytest.mark.parametrize("offload", ["cpu", "disk", "nothing yet"])
def test_weights_that_are_elsewhere_are_named(tmp_path, offload):
    if offload == "nothing yet":
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(tiny("llama").config)
    else:
        model = tiny("llama")
        cpu_offload(model, "cpu") if offload == "cpu" else disk_offload(model, tmp_path, "cpu")
    with pytest.raises(TransectError, match=r"not in memory.*device_map.*--stream"):
        Anatomy(model)
    assert len(Anatomy(model, weights=False).blocks) == 3  # of a skeleton, the structure can be had


def test_adapters_are_named_and_the_advice_helps():
    model = tiny("llama")
    adapted = get_peft_model(model, LoraConfig(**LORA))
    for held in (adapted, model):
        with pytest.raises(TransectError, match=r"carries an adapter.*merge_and_unload"):
            Anatomy(held)
    assert Anatomy(adapted.merge_and_unload()).blocks
    model.add_adapter(LoraConfig(**LORA))
    with pytest.raises(TransectError, match="add_adapter"):
        transect.compress(model, "svd", keep=0.5)
    prompted = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(TransectError, match="carries an adapter"):
        Anatomy(prompted)


def test_an_adapter_inside_the_linear_layer_itself():
    with pytest.raises(TransectError, match="holds lora_A"):
        Anatomy(changed(beside("lora_A")))


@pytest.mark.parametrize("how", ["weights", "blocks"])
def test_weights_that_two_matrices_share_are_named_and_the_advice_helps(how):
    model = tiny("llama")
    layers = model.model.layers
    if how == "blocks":
        layers[2] = layers[0]
    else:
        layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(TransectError, match=r"0\.\S+ and 2\.\S+ share one weight"):
        Anatomy(model)
    if how == "blocks":
        layers[2] = copy.deepcopy(layers[0])
    else:
        layers[2].mlp.up_proj.weight = nn.Parameter(layers[2].mlp.up_proj.weight.detach().clone())
    assert Anatomy(model).blocks


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bert", "vit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ordinary_and_changed_models_pass(name, dtype):
    model = change(tiny(name)).to(dtype)
    assert Anatomy(model).blocks and Anatomy(model.requires_grad_(False)).blocks


@pytest.mark.parametrize("given", [3, "a name", nn.Linear(2, 2), torch.zeros(2), None])
def test_what_is_no_model(given):
    with pytest.raises(TransectError, match="where a Hugging Face model"):
        Anatomy(given)

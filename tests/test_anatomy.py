import pytest
import torch
from torch import nn

from transect.anatomy import Anatomy, Stacked, register_architecture
from transect.errors import TransectError, UnknownArchitecture

from .models import CAUSAL, CONFIGS, inputs, logits, tiny

ALL = list(CONFIGS)


def permuted(size: int, seed: int = 3) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ALL)
def test_every_matrix_maps_its_input_to_its_output(name):
    """The view's W and b reproduce what the model's own modules compute, fused and transposed ones included."""
    model = tiny(name, dtype=torch.float64)
    anatomy = Anatomy(model)
    seen = {}
    handles = []
    for matrix in anatomy.matrices():

        def hook(_, args, output, matrix=matrix):
            rows = matrix.rows()
            seen[matrix.name] = (matrix, args[0], output if rows is None else output[..., rows])

        handles.append(matrix.module.register_forward_hook(hook))
    logits(model, inputs(name, dtype=torch.float64))
    for handle in handles:
        handle.remove()
    assert len(seen) == len(anatomy.matrices()) == 3 * (7 if anatomy.blocks[0].mlp.gate else 6)
    for matrix, x, y in seen.values():
        assert matrix.weight.shape == matrix.shape
        torch.testing.assert_close(y, nn.functional.linear(x, matrix.weight, matrix.bias), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_permuting_neurons_and_heads_leaves_the_logits_unchanged(name):
    model = tiny(name, dtype=torch.float64)
    batch = inputs(name, dtype=torch.float64)
    before = logits(model, batch)
    for block in Anatomy(model).blocks:
        block.mlp.keep(permuted(block.mlp.neurons))
        attention = block.attention
        per_group = attention.heads // attention.key_value_heads
        groups = permuted(attention.key_value_heads).tolist()
        attention.keep([g * per_group + h for g in groups for h in permuted(per_group).tolist()])
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_removing_a_neuron_or_head_equals_zeroing_it(name):
    model, reference = tiny(name, dtype=torch.float64), tiny(name, dtype=torch.float64)
    block, twin = Anatomy(model).blocks[1], Anatomy(reference).blocks[1]
    kept = [n for n in range(block.mlp.neurons) if n not in (0, 7)]
    block.mlp.keep(kept)
    down = twin.mlp.down.weight.clone()
    down[:, [0, 7]] = 0
    twin.mlp.down.write(down)
    if name != "olmo2":  # its query norm averages over all heads, so removing one is not zeroing it
        attention = block.attention
        per_group = attention.heads // attention.key_value_heads
        attention.keep(range(per_group, attention.heads))
        o = twin.attention.o.weight.clone()
        o[:, : per_group * attention.head_size] = 0
        twin.attention.o.write(o)
        assert block.attention.key_value_heads == twin.attention.key_value_heads - 1
    batch = inputs(name, dtype=torch.float64)
    torch.testing.assert_close(logits(model, batch), logits(reference, batch), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_a_replaced_matrix_is_used(name):
    """Replacing q by an equal nn.Linear changes nothing; the stacked stand-in of a fused matrix included."""
    model = tiny(name, dtype=torch.float64)
    batch = inputs(name, dtype=torch.float64)
    before = logits(model, batch)
    block = Anatomy(model).blocks[0]
    fused = [role for role in ("q", "up") if block.matrix(role).fused is not None]
    for role in ("q", "up"):
        matrix = block.matrix(role)
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=matrix.bias is not None).double()
        linear.load_state_dict({"weight": matrix.weight} | ({} if matrix.bias is None else {"bias": matrix.bias}))
        matrix.replace(linear)
        assert matrix.module is linear
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=1e-9)
    assert len(fused) == sum(isinstance(module, Stacked) for module in model.modules())


@pytest.mark.parametrize("name", CAUSAL)
def test_dropped_sublayers_and_blocks_add_nothing(name):
    model, reference = tiny(name, dtype=torch.float64), tiny(name, dtype=torch.float64)
    anatomy, twin = Anatomy(model), Anatomy(reference)
    anatomy.blocks[0].attention.drop()
    anatomy.blocks[1].mlp.drop()
    assert anatomy.blocks[0].attention is None and anatomy.blocks[1].mlp is None
    for unit in (twin.blocks[0].attention.o, twin.blocks[1].mlp.down):
        unit.write(torch.zeros(unit.shape), None if unit.bias is None else torch.zeros(unit.shape[0]))
    batch = inputs(name, dtype=torch.float64)
    torch.testing.assert_close(logits(model, batch), logits(reference, batch), rtol=0, atol=1e-9)
    ids = batch["input_ids"]
    with torch.no_grad():
        cached = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        plain = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    anatomy.drop_block(1)
    assert len(anatomy.blocks) == 2 and anatomy.config.num_hidden_layers == 2
    assert logits(model, batch).shape == logits(reference, batch).shape


def test_post_norm_models_refuse_to_drop_a_sublayer():
    for name in ("bert", "roberta"):
        with pytest.raises(TransectError, match="normalises after"):
            Anatomy(tiny(name)).blocks[0].mlp.drop()


def test_bad_subsets_are_refused():
    block = Anatomy(tiny("llama")).blocks[0]
    for heads in ([], [0, 0], [4], [0, 2, 1]):
        with pytest.raises(TransectError):
            block.attention.keep(heads)
    for neurons in ([], [1, 1], [48], [-1]):
        with pytest.raises(TransectError):
            block.mlp.keep(neurons)


def test_embeddings_norms_and_activation_are_found():
    anatomy = Anatomy(tiny("qwen3"))
    block = anatomy.blocks[0]
    assert set(block.norms) == {"attention_input", "mlp_input"} and anatomy.final_norm is not None
    assert block.attention.q_norm is not None and block.mlp.activation is not None
    assert (block.attention.heads, block.attention.key_value_heads, block.attention.head_size) == (4, 2, 8)
    assert not anatomy.embeddings_tied and Anatomy(tiny("gpt2")).embeddings_tied


def test_an_unknown_architecture_says_how_to_describe_it_and_can_be_described():
    model = tiny("llama")
    model.config.model_type = "novel"
    with pytest.raises(UnknownArchitecture, match="CONTRIBUTING"):
        Anatomy(model)
    description = {
        "name": "novel", "model_types": ["novel"], "blocks": "layers", "attention": "self_attn",
        "matrices": {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
                     "o": "self_attn.o_proj", "up": "mlp.up_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj"},
        "config": {"heads": "num_attention_heads", "hidden": "hidden_size"}, "final_norm": "norm",
        "norms": {"attention_input": "input_layernorm", "mlp_input": "post_attention_layernorm"},
        "attributes": {"num_key_value_groups": "heads_per_group"},
    }  # fmt: skip
    with pytest.raises(TransectError, match="no path is given"):
        register_architecture({**description, "matrices": {"q": "x"}})
    with pytest.raises(TransectError, match="unknown keys"):
        register_architecture({**description, "layers": "x"})
    assert len(Anatomy(model, description).matrices()) == 21


def test_nan_weights_are_named():
    model = tiny("llama")
    Anatomy(model).blocks[1].mlp.up.weight[0, 0] = float("nan")
    with pytest.raises(TransectError, match="up_proj"):
        Anatomy(model).check_finite()

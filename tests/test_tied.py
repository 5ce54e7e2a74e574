"""Blocks that share their tensors: one tensor everywhere, in memory and in the folder, and a place of its own in the
cache for each."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

import transect
from transect.anatomy import Anatomy, record_of
from transect.anatomy.ties import tie
from transect.checkpoint import open_model
from transect.data import load
from transect.errors import BadCheckpoint, TransectError
from transect.evaluation import evaluate_loss, parameters
from transect.statistics import InputCovariance, collect

from .models import CAUSAL, assert_alike, assert_same_model, inputs, logits, saved_and_loaded, tiny

ORDER = [0, 1, 2, 1, 2, 2]


def looped(name="llama", order=ORDER, tied=True):
    model = tiny(name)
    Anatomy(model).arrange(order, tied=tied)
    return model


def distinct(model):
    return len({id(p) for p in Anatomy(model).block_list.parameters()})


@pytest.mark.parametrize("name", CAUSAL)
def test_a_looped_model_is_one_of_copies_that_is_stored_once(name, tmp_path):
    model, copies = looped(name), looped(name, tied=False)
    assert parameters(model) == parameters(tiny(name))
    assert_alike(logits(model, inputs(name)), logits(copies, inputs(name)))
    again = saved_and_loaded(model, name, tmp_path / "model")
    assert distinct(again) == distinct(model) == distinct(tiny(name))
    assert record_of(again).tied == record_of(model).tied
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert len(stored) <= len(tiny(name).state_dict())
    assert Anatomy(again).config_value("blocks") == 6


def test_an_encoder_too(tmp_path):
    model = looped("vit")
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert_same_model(again, model, inputs("vit"))
    assert distinct(again) == distinct(tiny("vit"))


def test_every_place_has_its_own_cache_and_the_config_follows():
    model = looped("gemma3")  # whose blocks are of two kinds
    kinds = tiny("gemma3").config.layer_types
    assert model.config.layer_types == [kinds[number] for number in ORDER]
    assert [block.module.self_attn.layer_idx for block in Anatomy(model).blocks] == list(range(6))
    output = model(inputs("gemma3")["input_ids"], use_cache=True)
    assert len(output.past_key_values.layers) == 6


def test_the_gradient_is_the_sum_over_the_places():
    model, copies = looped(), looped(tied=False)
    for one in (model, copies):
        one(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
    for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
        each = [copies.model.layers[place].get_parameter(name).grad for place in (2, 4, 5)]
        torch.testing.assert_close(model.model.layers[2].get_parameter(name).grad, sum(each))


def test_it_stays_one_tensor_through_copies_casts_and_moves():
    model = looped()
    expected = distinct(model)
    assert distinct(copy.deepcopy(model)) == expected
    assert distinct(copy.deepcopy(model).half()) == expected
    assert distinct(copy.deepcopy(model).to(torch.bfloat16).float()) == expected
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.layers[5].mlp.down_proj.weight.zero_()
    assert copied.model.layers[2].mlp.down_proj.weight.count_nonzero() == 0


def test_what_others_save_is_whole(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = looped()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB", state_dict=model.state_dict())
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.unwrap_model(accelerator.prepare(model)).save_pretrained(
        tmp_path / "accelerate", save_function=accelerator.save, state_dict=accelerator.get_state_dict(model)
    )
    for folder in ("shards", "accelerate"):
        for options in ({}, {"device_map": "cpu"}, {"dtype": torch.float64}):
            again = AutoModelForCausalLM.from_pretrained(tmp_path / folder, **options)
            assert distinct(again) == distinct(model)
            assert_same_model(again.float(), model, inputs("llama"))


def test_the_body_alone_and_under_another_head(tmp_path):
    model = looped()
    model.save_pretrained(tmp_path / "whole")
    from transformers import AutoModel

    body = AutoModel.from_pretrained(tmp_path / "whole")
    assert len({id(p) for p in body.layers.parameters()}) == distinct(model)
    body.save_pretrained(tmp_path / "body")
    again = AutoModel.from_pretrained(tmp_path / "body")
    batch = inputs("llama")
    assert_alike(again(**batch).last_hidden_state, model.model(**batch).last_hidden_state)


def test_blocks_are_dropped_and_arranged_again(tmp_path):
    model = looped()
    whole = looped(tied=False)
    for one in (model, whole):
        Anatomy(one).drop_block(1)  # the first of two places
        Anatomy(one).arrange([0, 1, 2, 1, 4], tied=one is model)
    assert_alike(logits(model, inputs("llama")), logits(whole, inputs("llama")))
    # The order was 0, 2, 1, 2, 2 in numbers of the first model, and is 0, 2, 1, 2, 2 again with the fourth in front.
    found = {tuple(sorted(path.split(".")[2] for path in paths)) for paths in record_of(model).ties().values()}
    assert found == {("1", "3", "4")}
    assert distinct(model) == distinct(tiny("llama"))
    saved_and_loaded(model, "llama", tmp_path)


def test_parts_of_blocks_are_tied_and_given_back():
    model = tiny("llama")
    anatomy = Anatomy(model)
    anatomy.tie([2, 0], lambda name: "mlp" in name)
    assert model.model.layers[0].mlp.up_proj.weight is model.model.layers[2].mlp.up_proj.weight
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, tiny("llama").model.layers[2].mlp.up_proj.weight)
    anatomy.tie([0, 1], lambda name: "mlp.up" in name)  # all three are one now
    assert model.model.layers[1].mlp.up_proj.weight is model.model.layers[2].mlp.up_proj.weight
    before = logits(model, inputs("llama"))
    anatomy.untie()
    assert not record_of(model) and distinct(model) == distinct(tiny("llama"))
    assert_alike(logits(model, inputs("llama")), before)


def test_replacing_what_is_shared_takes_it_out_of_the_group():
    model = looped()
    before = logits(model, inputs("llama"))
    matrix = Anatomy(model).blocks[5].matrix("up")
    from transect.anatomy.storage import dense

    matrix.replace(dense(matrix.weight * 2, matrix.bias))
    assert "model.layers.5.mlp.up_proj.weight" not in record_of(model).tied
    assert "model.layers.4.mlp.up_proj.weight" in record_of(model).tied
    assert not torch.allclose(logits(model, inputs("llama")), before)
    assert torch.equal(model.model.layers[2].mlp.up_proj.weight, tiny("llama").model.layers[2].mlp.up_proj.weight)


def test_it_is_probed_and_evaluated_and_collected():
    model, copies = looped(), looped(tied=False)
    data = load(inputs("llama", batch=4)["input_ids"], model)
    assert evaluate_loss(model, data).loss == pytest.approx(evaluate_loss(copies, load(data_of(data), copies)).loss)
    found = [collect(Anatomy(one), data, [InputCovariance()], Anatomy(one).matrices()) for one in (model, copies)]
    for key in ("blocks.2.mlp.input", "blocks.5.mlp.input"):
        one, other = (each.value(key, InputCovariance()) for each in found)
        torch.testing.assert_close(one, other)
    reports = [transect.inspect(one, ["spectra", "stream-growth"], data_of(data)) for one in (model, copies)]
    assert all(reports)


def data_of(batches):
    return torch.cat([batch["input_ids"] for batch in batches])


def test_what_is_shared_is_not_compressed_or_edited_by_itself():
    model = looped()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TransectError, match=r"blocks.1.attention.q holds the same tensor as model.layers.3.*untie"):
        transect.compress(model, "svd", keep=0.7)
    with pytest.raises(TransectError, match="cannot be changed alone"):
        matrix = Anatomy(model).blocks[3].matrix("up")
        matrix.write(matrix.weight * 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    Anatomy(model).untie()
    transect.compress(model, "svd", keep=0.7)


@pytest.mark.parametrize("order", [[], [0, 3], [-1], [0, 1.0], "0"])
def test_orders_that_mean_nothing(order):
    with pytest.raises(TransectError, match="an order of blocks"):
        Anatomy(tiny("llama")).arrange(order)


def test_what_cannot_be_tied():
    model = tiny("llama")
    with pytest.raises(TransectError, match="its shape is"):
        tie(model, ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"])
    with pytest.raises(TransectError, match="cannot be tied"):
        tie(model, ["model.layers.0.mlp.up_proj.weight", "model.layers.9.mlp.up_proj.weight"])
    Anatomy(model).blocks[1].mlp.keep(range(8))
    with pytest.raises(TransectError, match=r"blocks 0 and 1 cannot share.*not the same in both"):
        Anatomy(model).tie([0, 1])
    assert not record_of(model).tied
    shared = transect.compress(tiny("llama"), "masa", keep=0.9, data=inputs("llama")["input_ids"])
    with pytest.raises(TransectError, match="bank"):
        Anatomy(shared).arrange([0, 0, 1, 2])
    with pytest.raises(TransectError, match="block's place enters"):
        Anatomy(tiny("gpt_neo")).arrange([0, 0, 1, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tied: tied.update({"model.layers.9.mlp.up_proj.weight": "a"}), "nothing there"),
        (lambda tied: tied.update({"model.embed_tokens.weight": tied["model.layers.1.mlp.up_proj.weight"]}), "ties"),
        (lambda tied: tied.update({"model.layers.1.mlp.up_proj.weight": 3}), "damaged"),
        (lambda tied: tied.clear(), "does not hold all"),
    ],
)  # fmt: skip
def test_a_folder_with_a_damaged_table_is_refused(change, message, tmp_path):
    looped().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"]["record"]["tied"])
    file.write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=message):
        open_model(tmp_path)

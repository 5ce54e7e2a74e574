"""Mixtures of experts: each expert's matrices, its statistics, its changes, and what is refused."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy, Experts, experts_apart
from transect.anatomy.experts import SeparateExperts
from transect.cli import main_group
from transect.errors import NotApplicable, OutOfReach, TransectError
from transect.probes.catalog.spectra import draw
from transect.statistics import (
    ExpertLoad,
    FeatureNorm,
    FisherDiagonal,
    InputCovariance,
    InputMean,
    OutputGradientCovariance,
    collect,
    key_of,
)

from .models import MOE_CONFIGS, VOCABULARY, assert_alike, assert_same_model, inputs, logits, tiny

ALL = list(MOE_CONFIGS)
ROUTER = 1e-5  # routers round to float32, whatever the model's precision
DATA = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(5))


def wide(name, seed=0):
    """In float64, which grouped_mm does not take."""
    model = tiny(name, seed, torch.float64)
    model.set_experts_implementation("eager")
    return model


def mixtures(anatomy):
    return [block.mlp for block in anatomy.blocks if isinstance(block.mlp, Experts)]


def permuted(size, seed=3):
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ALL)
def test_every_matrix_maps_its_input_to_its_output_and_counts_in_the_bytes(name):
    model = wide(name)
    anatomy = Anatomy(model)
    matrices = anatomy.matrices()
    before = logits(model, inputs(name))
    seen, handles = {}, []
    with experts_apart(matrices):
        for matrix in matrices:

            def hook(_, args, output, matrix=matrix):
                seen[matrix.name] = (args[0], output)

            handles.append(matrix.module.register_forward_hook(hook))
        torch.testing.assert_close(logits(model, inputs(name)), before, rtol=0, atol=1e-12)
    assert "experts.0.up" in str(list(seen)) and set(seen) <= {matrix.name for matrix in matrices}
    for matrix in matrices:
        assert matrix.weight.shape == matrix.shape
        if matrix.name in seen:
            x, y = seen[matrix.name]
            torch.testing.assert_close(y, nn.functional.linear(x, matrix.weight, matrix.bias), rtol=1e-9, atol=1e-9)
    mixture = mixtures(anatomy)[0]
    expert = mixture.experts[3]
    assert torch.equal(torch.cat([expert.gate.weight, expert.up.weight]), mixture.host.gate_up_proj[3])
    assert torch.equal(expert.down.weight, mixture.host.down_proj[3])
    routing = ("mlp.gate.weight", ".router.weight", "shared_expert_gate.weight")
    stored = sum(
        parameter.numel() for path, parameter in model.named_parameters()
        if "layers." in path and "norm" not in path and not path.endswith((*routing, "bias"))
    )  # fmt: skip
    assert anatomy.matrix_bytes() == 8 * stored


@pytest.mark.parametrize("name", ALL)
def test_permuting_neurons_and_experts_leaves_the_logits_unchanged(name):
    model = wide(name)
    before = logits(model, inputs(name))
    for mixture in mixtures(Anatomy(model)):
        for expert in [*mixture.experts, *([] if mixture.shared is None else [mixture.shared])]:
            expert.keep(permuted(expert.neurons))
    torch.testing.assert_close(logits(model, inputs(name)), before, rtol=0, atol=1e-9)
    for number, mixture in enumerate(mixtures(Anatomy(model))):
        mixture.keep(permuted(len(mixture.experts), number))
    torch.testing.assert_close(logits(model, inputs(name)), before, rtol=0, atol=ROUTER)
    assert not Anatomy(model).record  # the config still describes the model


def by_hand(name, mixture, x, experts):
    """What a mixture adds to the stream (N x d) if it has these of its experts."""
    probabilities = nn.functional.linear(x, mixture.router.weight[experts]).softmax(-1)
    weights, index = probabilities.topk(min(2, len(experts)))
    if name == "mixtral":
        weights = weights / weights.sum(-1, keepdim=True)
    added = torch.zeros_like(x)
    for row in range(len(x)):
        for weight, chosen in zip(weights[row], index[row].tolist(), strict=True):
            added[row] += weight * one(mixture.experts[experts[chosen]], x[row])
    if mixture.shared is not None:
        added += torch.sigmoid(mixture.module.shared_expert_gate(x)) * one(mixture.shared, x)
    return added


def one(expert, x):
    hidden = nn.functional.silu(nn.functional.linear(x, expert.gate.weight))
    return nn.functional.linear(hidden * nn.functional.linear(x, expert.up.weight), expert.down.weight)


@pytest.mark.parametrize("kept", [[0, 2, 4], [3]])
@pytest.mark.parametrize("name", [name for name in ALL if name != "phimoe"])  # its router draws differently
def test_the_experts_that_stay_share_what_the_router_gives(name, kept):
    model, whole = wide(name), wide(name)
    x = torch.randn(1, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for apart, (mixture, twin) in enumerate(zip(*(mixtures(Anatomy(m)) for m in (model, whole)), strict=True)):
        if apart == 1:  # with modules of their own
            up = mixture.experts[4].up
            up.replace(nn.Linear(up.shape[1], up.shape[0], bias=False).double().requires_grad_(False))
            twin.experts[4].up.write(up.weight)
        mixture.keep(kept)
        assert len(mixture.experts) == len(kept) and mixture.chosen == min(2, len(kept))
        with torch.no_grad():
            torch.testing.assert_close(mixture.module(x)[0], by_hand(name, twin, x[0], kept), rtol=0, atol=ROUTER)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_a_removed_neuron_is_one_whose_weights_out_are_zero(name):
    model, twin = wide(name), wide(name)
    for mixture, other in zip(*(mixtures(Anatomy(m)) for m in (model, twin)), strict=True):
        pairs = [(mixture.experts[2], other.experts[2])]
        if mixture.shared is not None:
            pairs.append((mixture.shared, other.shared))
        for expert, reference in pairs:
            expert.keep([n for n in range(expert.neurons) if n != 7])
            down = reference.down.weight.clone()
            down[:, 7] = 0
            reference.down.write(down)
        assert mixture.experts[2].neurons == mixture.experts[1].neurons - 1
    torch.testing.assert_close(logits(model, inputs(name)), logits(twin, inputs(name)), rtol=0, atol=1e-9)


STATISTICS = [
    InputCovariance(), InputMean(), FeatureNorm(1), OutputGradientCovariance(trim=0.125, clip=(0.1, 10.0)),
    FisherDiagonal(), ExpertLoad(), ExpertLoad(weighted=True),
]  # fmt: skip


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_an_expert_s_statistics_are_those_of_the_positions_that_it_is_sent(name, apart):
    """Against a pass in which every expert is run on every position, with the router's weights or zeros."""
    model, batch = wide(name), {"input_ids": DATA[:4].clone(), "attention_mask": torch.ones(4, 16, dtype=torch.long)}
    batch["attention_mask"][1, 11:] = 0
    anatomy = Anatomy(model)
    mixture = mixtures(anatomy)[0]
    if apart:
        linear = nn.Linear(32, 20, bias=False).double()
        mixture.experts[0].up.replace(linear)
    store = collect(anatomy, [batch], STATISTICS)

    # by hand: the router's choices, then E sums over the positions of each
    seen, gradients = {}, {}
    twin = wide(name)
    if apart:
        mixtures(Anatomy(twin))[0].experts[0].up.write(linear.weight)
    other = mixtures(Anatomy(twin))[0]
    experts = other.experts

    def every(module, args):
        hidden, index, weights = args
        added = torch.zeros_like(hidden)
        for number, expert in enumerate(experts):
            x = hidden.detach().requires_grad_(True)
            up, gate = (nn.functional.linear(hidden, m.weight) for m in (expert.up, expert.gate))
            for role, y in (("up", up), ("gate", gate)):
                y.retain_grad()
                gradients[number, role] = y
            neurons = nn.functional.silu(gate) * up
            down = nn.functional.linear(neurons, expert.down.weight)
            down.retain_grad()
            gradients[number, "down"] = down
            chosen = (index == number).any(-1)
            weight = (weights * (index == number)).sum(-1)
            seen[number] = (x.detach(), neurons.detach(), chosen, weight.detach())
            added = added + down * weight[:, None]
        return added

    other.host.forward = lambda *args: every(other.host, args)
    twin.requires_grad_(False)
    handle = twin.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_(True))
    out = twin(**batch).logits[:, :-1]
    handle.remove()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum").backward()
    mask = batch["attention_mask"].bool()
    for number, expert in enumerate(mixture.experts):
        x, neurons, chosen, weight = seen[number]
        counted = chosen & mask.flatten()
        assert counted.any()
        for matrix, rows in ((expert.gate, x), (expert.up, x), (expert.down, neurons)):
            rows = rows[counted]
            expected = {InputCovariance(): rows.T @ rows / len(rows), InputMean(): rows.mean(0),
                        FeatureNorm(1): rows.abs().mean(0)}  # fmt: skip
            for statistic, value in expected.items():
                got = store.value(key_of(matrix, statistic), statistic)
                torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-9)
            inside = x if matrix.role != "down" else neurons
            g = (gradients[number, matrix.role].grad * mask.flatten()[:, None]).view(4, 16, -1)
            each = torch.stack([(g[i].T @ inside.view(4, 16, -1)[i]).square() for i in range(4)])
            got = store.value(key_of(matrix, FisherDiagonal()), FisherDiagonal())
            torch.testing.assert_close(got, each.mean(0), rtol=1e-5, atol=1e-12)
            inner = torch.zeros_like(mask)
            for row, length in zip(inner, mask.sum(1).tolist(), strict=True):
                row[length // 8 : length - length // 8] = True
            kept = counted.view(4, 16) & inner
            norms = g.norm(dim=-1)
            felt = kept & (norms > 1e-10)
            mean = (norms * felt).sum(1, keepdim=True) / felt.sum(1, keepdim=True).clamp_min(1)
            scaled = g * (norms.clamp(0.1 * mean, 10 * mean) / norms.clamp_min(1e-10))[..., None]
            rows = scaled[felt]
            statistic = STATISTICS[3]
            got = store.value(key_of(matrix, statistic), statistic)
            torch.testing.assert_close(got, rows.T @ rows / int(kept.sum()), rtol=1e-5, atol=1e-9)
        valid = mask.flatten()
        loads = {ExpertLoad(): chosen[valid].double(), ExpertLoad(weighted=True): weight[valid].double()}
        for statistic, share in loads.items():
            assert store.value(mixture.name, statistic)[number] == pytest.approx(share.mean().item(), rel=1e-9)


def test_an_expert_that_no_position_reached_borrows_the_others_statistics():
    """Of the residual stream the sums of the others; of neurons, which have no counterparts there, their mean."""
    model = wide("mixtral")
    mixture = mixtures(Anatomy(model))[1]
    mixture.router.register_forward_hook(
        lambda module, args, out: (
            out[0],
            out[1],
            torch.where(out[2] == 3, (out[2] == 1).any(-1, True) * 1 + 1, out[2]),
        )
    )
    anatomy = Anatomy(model)
    store = collect(anatomy, [{"input_ids": DATA}], STATISTICS)
    mixture = mixtures(anatomy)[1]
    assert float(store.value(mixture.name, ExpertLoad())[3]) == 0
    lonely, others = mixture.experts[3], [mixture.experts[n] for n in (0, 1, 2, 4)]

    def sums(matrix, statistic, part):
        found = store.sums(key_of(matrix, statistic), statistic, matrix.shape, matrix.module)
        return found["count"] if part == "count" else statistic.value(found) * found["count"]

    def pooled(role, statistic):
        matrices = [getattr(other, role) for other in others]
        return sum(sums(m, statistic, "sum") for m in matrices) / sum(sums(m, statistic, "count") for m in matrices)

    for statistic in (InputCovariance(), InputMean(), FeatureNorm(1)):
        got = store.value(key_of(lonely.up, statistic), statistic)
        torch.testing.assert_close(got, pooled("up", statistic), rtol=1e-9, atol=1e-12)
    got = store.value(key_of(lonely.down, InputCovariance()), InputCovariance())
    torch.testing.assert_close(got, torch.eye(20).double() * pooled("down", InputCovariance()).diagonal().mean())
    torch.testing.assert_close(
        store.value(key_of(lonely.down, FeatureNorm(1)), FeatureNorm(1)),
        pooled("down", FeatureNorm(1)).mean().expand(20),
    )
    torch.testing.assert_close(
        store.value(key_of(lonely.down, STATISTICS[3]), STATISTICS[3]), pooled("down", STATISTICS[3])
    )
    fisher = store.value(key_of(lonely.gate, FisherDiagonal()), FisherDiagonal())
    torch.testing.assert_close(fisher, pooled("gate", FisherDiagonal()).mean(0, keepdim=True).expand(20, 32))
    fisher = store.value(key_of(lonely.down, FisherDiagonal()), FisherDiagonal())
    torch.testing.assert_close(fisher, pooled("down", FisherDiagonal()).mean(1, keepdim=True).expand(32, 20))


def test_without_any_position_there_is_nothing_to_borrow():
    model = tiny("mixtral")
    anatomy = Anatomy(model)
    store = collect(anatomy, [{"input_ids": DATA[:1], "attention_mask": torch.zeros(1, 16)}], [InputCovariance()])
    with pytest.raises(TransectError, match=r"experts\.0\.input has seen no data"):
        store.value(key_of(mixtures(anatomy)[0].experts[0].up, InputCovariance()), InputCovariance())


PER_MATRIX = {
    "svd": {}, "fwsvd": {}, "asvd": {}, "svd-llm": {}, "kfac-svd": {}, "cospadi": {"iterations": 2}, "monarch": {},
    "armor": {"rounds": 3}, "wanda": {}, "sparsegpt": {}, "magnitude": {}, "nowag-p": {},
    "cospadi-shared": {"iterations": 2}, "mixed": {"iterations": 2}, "jlcm": {"steps": 5},
    "dsformer": {"iterations": 2},
}  # fmt: skip


@pytest.mark.parametrize("method", PER_MATRIX)
def test_every_method_of_single_matrices_keeps_its_budget_and_the_result_loads(method, tmp_path):
    """On few tokens, so that some experts are reached by none; the model in memory is the one that loads."""
    name = ("qwen2_moe", "mixtral", "olmoe", "qwen3_moe")[list(PER_MATRIX).index(method) % 4]
    model, data = tiny(name), DATA[:2, :8]
    whole = Anatomy(model).matrix_bytes()
    transect.compress(model, method, 0.7, data, **PER_MATRIX[method])
    anatomy = Anatomy(model)
    assert 0.5 * whole < anatomy.matrix_bytes() <= 0.7 * whole * (1 + 1e-9)
    assert any(isinstance(module, SeparateExperts) for module in model.modules())
    model.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert_same_model(loaded, model, inputs(name))
    made = [
        loaded.generate(DATA[:1, :6], max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*made)
    mixtures(Anatomy(loaded))[0].keep([1, 4])  # what was loaded can be changed and saved further
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same_model(again, loaded, inputs(name))


def test_a_folder_with_changed_experts_loads_without_transect(tmp_path, elsewhere):
    """And a transformers that is not told how to read it stops."""
    model = transect.compress(tiny("mixtral"), "svd-llm", 0.7, DATA)
    mixtures(Anatomy(model))[2].drop()
    model.save_pretrained(tmp_path / "small")
    code = f"""
import sys, torch
sys.modules["transect"] = None
from transformers import AutoModelForCausalLM, MixtralForCausalLM
try:
    MixtralForCausalLM.from_pretrained({str(tmp_path / "small")!r})
except RuntimeError as error:
    print("stopped")
ids = torch.tensor({DATA[:1].tolist()})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "small")!r}, trust_remote_code=True)
torch.save([model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)], {str(tmp_path / "out")!r})
"""
    assert "stopped" in elsewhere.python(code)
    made, written = torch.load(tmp_path / "out")
    assert_alike(made, logits(model, {"input_ids": DATA[:1]}))
    assert torch.equal(written, model.generate(DATA[:1], max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("name", ALL)
def test_expert_count_keeps_the_most_used_and_leaves_an_ordinary_model(name, tmp_path):
    model = tiny(name)
    anatomy = Anatomy(model)
    store = collect(anatomy, [{"input_ids": DATA}], [ExpertLoad(), ExpertLoad(weighted=True)])
    before = [[expert.up.weight.clone() for expert in mixture.experts] for mixture in mixtures(anatomy)]
    loads = [store.value(mixture.name, ExpertLoad()) for mixture in mixtures(anatomy)]
    whole = anatomy.matrix_bytes()
    transect.compress(model, "expert-count", 0.75, DATA)
    assert 0.6 * whole < anatomy.matrix_bytes() <= 0.75 * whole
    for mixture, old, load in zip(mixtures(anatomy), before, loads, strict=True):
        kept = sorted(load.topk(len(mixture.experts)).indices.tolist())
        assert 2 <= len(kept) < 5
        assert all(torch.equal(e.up.weight, old[n]) for e, n in zip(mixture.experts, kept, strict=True))
    model.save_pretrained(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert "quantization_config" not in config and "per_layer_config" not in config
    assert len(kept) in (config.get("num_experts"), config.get("num_local_experts"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert_same_model(loaded, model, inputs(name))
    by_weight = transect.compress(tiny(name), "expert-count", 0.75, DATA, score="weight")
    for mixture, old in zip(mixtures(Anatomy(by_weight)), before, strict=True):
        soft = store.value(mixture.name, ExpertLoad(weighted=True)).topk(len(mixture.experts)).indices
        kept = sorted(soft.tolist())
        assert all(torch.equal(e.up.weight, old[n]) for e, n in zip(mixture.experts, kept, strict=True))


def test_expert_count_refuses_what_it_cannot_do():
    with pytest.raises(OutOfReach, match="with 1 in each block it keeps"):
        transect.compress(tiny("mixtral"), "expert-count", 0.2, DATA)
    with pytest.raises(OutOfReach, match="with 2 in each block"):  # fewer break its router
        transect.compress(tiny("phimoe"), "expert-count", 0.5, DATA)
    with pytest.raises(OutOfReach, match="no mixture of experts"):
        transect.compress(tiny("llama"), "expert-count", 0.7, DATA)
    mixture = mixtures(Anatomy(tiny("phimoe")))[0]
    for experts in ([], [0], [0, 0], [1, 5], [-1, 2]):
        with pytest.raises(TransectError, match=r"kept|distinct"):
            mixture.keep(experts)


def test_unequal_numbers_of_experts_load_as_well(tmp_path):
    model = tiny("qwen3_moe")
    first, last = mixtures(Anatomy(model))
    first.keep([4, 2, 0])
    last.keep([1])
    model.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert_same_model(loaded, model, inputs("mixtral"))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_dropped_mixtures_and_blocks_are_gone_and_the_result_loads(name, tmp_path):
    model, twin = tiny(name), tiny(name)
    mixtures(Anatomy(model))[0].drop()
    block = Anatomy(model).blocks[0]
    assert block.mlp is None and {matrix.role for matrix in block.matrices()} == set("qkvo")
    other = mixtures(Anatomy(twin))[0]
    for matrix in other.matrices():
        if matrix.role == "down":
            matrix.write(torch.zeros(matrix.shape))
    torch.testing.assert_close(logits(model, inputs(name)), logits(twin, inputs(name)))
    model.save_pretrained(tmp_path / "dropped")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dropped")
    assert_same_model(loaded, model, inputs(name))
    Anatomy(model).drop_block(0)  # the block without experts of qwen2_moe is now the first
    model.save_pretrained(tmp_path / "shorter")
    shorter = AutoModelForCausalLM.from_pretrained(tmp_path / "shorter")
    assert_same_model(shorter, model, inputs(name))
    assert "quantization_config" not in json.loads((tmp_path / "shorter" / "config.json").read_text())


def test_a_mixture_that_loses_the_owner_of_a_dictionary_hands_it_over(tmp_path):
    model = transect.compress(tiny("mixtral"), "cospadi-shared", 0.7, iterations=2, data=DATA)
    owners = [
        (mixture, number) for mixture in mixtures(Anatomy(model))
        for number, expert in enumerate(mixture.experts) if expert.up.module.owns_bank
    ]  # fmt: skip
    mixture, number = owners[0]
    kept = [n for n in range(5) if n not in (number, 4)]
    before = [mixture.experts[n].up.weight.clone() for n in kept]
    mixture.keep(kept)
    assert all(torch.equal(e.up.weight, old) for e, old in zip(mixture.experts, before, strict=True))
    model.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert_same_model(loaded, model, inputs("mixtral"))


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("mixtral", "svd-llm", {}), ("qwen2_moe", "kfac-svd", {"allocation": "global"}),
        ("olmoe", "fwsvd", {"sequential": True}),
    ],
)  # fmt: skip
def test_streaming_merges_what_the_checkpoint_keeps_apart(name, method, options, tmp_path):
    """transformers writes every expert's matrices under names of their own."""
    tiny(name).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    assert any("experts.3." in stored for stored in index["weight_map"])
    transect.compress(tmp_path / "dense", method, 0.6, DATA, **options, stream_to=tmp_path / "small")
    whole = transect.compress(tiny(name), method, 0.6, DATA, **options)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(streamed, inputs(name)), logits(whole, inputs(name)), rtol=1e-3, atol=1e-3)


def test_a_refit_is_least_squares_on_what_each_expert_is_sent_in_the_compressed_model():
    """(W - L R) C Rᵀ = 0 with C the second moment of its inputs there."""
    dense, model = tiny("mixtral"), tiny("mixtral")
    transect.compress(model, "svd-llm", 0.7, DATA, sequential=True, refit=True)
    anatomy, seen = Anatomy(model), InputCovariance()
    store = collect(anatomy, [{"input_ids": DATA}], [seen])
    for mixture, twin in zip(mixtures(anatomy), mixtures(Anatomy(dense)), strict=True):
        for matrix, old in zip(mixture.matrices(), twin.matrices(), strict=True):
            inputs_of = store.value(key_of(matrix, seen), seen)
            right = matrix.module.right.weight.double()
            wrong = (old.weight - matrix.weight).double() @ inputs_of @ right.T
            assert wrong.norm() < 1e-4 * (old.weight.double() @ inputs_of @ right.T).norm()


@pytest.mark.parametrize("method", ["modegpt", "amp", "fusegpt"])
def test_methods_that_need_one_mlp_a_block_say_so_and_change_nothing(method):
    model = tiny("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(OutOfReach, match=r"mixture of experts|stores those of its experts together"):
        transect.compress(model, method, 0.7, DATA)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_comparison_has_a_dash_where_a_method_does_not_know_experts(tmp_path):
    methods = ["svd", "modegpt", "expert-count", "llm-drop", "masa", "wanda"]
    frame = transect.compare(tiny("olmoe"), methods, [0.95], DATA, DATA[:4], tmp_path / "run")
    rows = frame.set_index("method")
    assert rows.loc["modegpt", "loss"] != rows.loc["modegpt", "loss"] and "mixture" in rows.loc["modegpt", "note"]
    measured = [method for method in methods if method != "modegpt"]
    assert rows.loc[measured, "loss"].notna().all() and (rows.loc[measured, "kept"] <= 0.95 + 1e-9).all()


def test_probes_of_neurons_refuse_and_the_others_see_every_expert():
    inspection = transect.inspect(tiny("qwen2_moe"), ["spectra", "feature-neurons", "kfac-spectrum"], data=DATA)
    assert set(inspection.refused) == {"feature-neurons", "kfac-spectrum"}
    assert all("experts" in reason for reason in inspection.refused.values())
    spectra = inspection["spectra"]
    names = spectra.label("matrix", len(spectra["alpha"]))
    assert {"blocks.0.mlp.experts.4.down", "blocks.0.mlp.shared.up", "blocks.1.mlp.up"} <= set(names)
    place = names.index("blocks.2.mlp.experts.3.gate")
    weight = mixtures(Anatomy(tiny("qwen2_moe")))[1].experts[3].gate.weight
    values = torch.linalg.svdvals(weight.double())
    assert float(spectra["frobenius_norm"][place]) == pytest.approx(float(values.norm()), rel=1e-6)
    places = draw(spectra)[0].figure.data[0]
    mean = spectra["hill_windows"][[n.endswith("gate") and n.startswith("blocks.2.") for n in names]].nanmean()
    assert places.z[2][list(places.x).index("gate")] == pytest.approx(float(mean), abs=1e-3)


def test_what_the_view_cannot_give_is_named():
    block = Anatomy(tiny("mixtral")).blocks[1]
    for ask in (
        lambda: block.mlp.neurons,
        lambda: block.mlp.up,
        lambda: block.matrix("down"),
        lambda: block.find("up"),
    ):
        with pytest.raises(NotApplicable, match="block 1 is a mixture of experts"):
            ask()
    with pytest.raises(NotApplicable, match="cannot be listened to"):
        block.mlp.experts[0].up.module.register_forward_hook(print)
    model = tiny("mixtral")
    mixtures(Anatomy(model))[0].host.is_transposed = True
    with pytest.raises(TransectError, match="keeps transposed matrices"):
        Anatomy(model).matrices()


def test_the_command_line_compresses_a_mixture(tmp_path):
    tiny("mixtral").save_pretrained(tmp_path / "dense")
    for arguments in (
        ["compress", tmp_path / "dense", "--method", "svd", "--keep", "0.7", "--out", tmp_path / "small"],
        ["inspect", tmp_path / "small", "--probes", "spectra", "--out", tmp_path / "report"],
    ):
        ran = CliRunner().invoke(main_group, list(map(str, arguments)))
        assert ran.exit_code == 0, ran.output
    assert "experts.2.up" in next((tmp_path / "report").rglob("*.html")).read_text()

"""W-PCA: the PCA dimension, the score of a model, and rankings of untrained architectures."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers as tf
from scipy.stats import kendalltau, spearmanr

from transect.anatomy import Anatomy
from transect.contest import train_architectures
from transect.data import Batches, Specimen, load
from transect.errors import BadData, Diverged, TransectError
from transect.forward import watch
from transect.probes import drawings, run_probes
from transect.probes.catalog.w_pca import agreement, drawn_architectures, pca_dim, rank_architectures
from transect.probes.catalog.w_pca.dimension import Scatter
from transect.store import Folder
from transect.training import Schedule

from .models import VOCABULARY, inputs, tiny

ETAS = (0.3, 0.6, 0.9, 0.99, 0.9999)
IDS = torch.randint(3, VOCABULARY, (24, 20), generator=torch.Generator().manual_seed(7))


def states(tokens, width, seed=0):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uneven(tokens, width, seed=0):
    """Rows whose directions differ in variance."""
    return states(tokens, width, seed) @ states(width, width, seed + 50) * torch.logspace(0, -1, width).double()


def reference(rows, eta):
    """By NumPy's covariance and eigenvalues, component after component."""
    values = np.linalg.eigvalsh(np.cov(rows.numpy(), rowvar=False))[::-1]
    held, count = 0.0, 0
    while held <= eta and count < len(values):
        held += values[count] / values.sum()
        count += 1
    return count


def scored(model, batches, **settings):
    specimen = Specimen(Anatomy(model), data=load(batches, model))
    return run_probes(specimen, {"w-pca": settings})["w-pca"]


# The dimension


def test_directions_of_equal_variance():
    rows = torch.linalg.qr(states(4000, 20) - states(4000, 20).mean(0)).Q  # orthonormal and, nearly, centred
    for eta in (0.31, 0.52, 0.88, 0.97):
        assert pca_dim(rows, eta) == math.floor(eta * 20) + 1
    assert abs(pca_dim(states(4000, 20), 0.52) - 11) <= 1  # up to sampling


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_never_more_than_the_rank(rank):
    rows = states(60, rank) @ states(rank, 20, seed=1)
    assert pca_dim(rows, 1 - 1e-9) == rank and all(pca_dim(rows, eta) <= rank for eta in ETAS)


@pytest.mark.parametrize("shape", [(60, 12), (8, 30), (2, 5), (300, 3)])
def test_grows_with_the_share_and_stays_within_its_bounds(shape):
    rows = uneven(*shape)
    found = [pca_dim(rows, eta) for eta in (1e-9, *ETAS, 1 - 1e-12)]
    assert found == sorted(found) and found[0] == 1 and found[-1] <= min(shape[1], shape[0] - 1)
    assert found == [reference(rows, eta) for eta in (1e-9, *ETAS)] + found[-1:]


@pytest.mark.parametrize("seed", range(10))
def test_against_numpy(seed):
    rows = uneven(100, 16, seed) + 5 * states(1, 16, seed + 9)
    assert [pca_dim(rows, eta) for eta in ETAS] == [reference(rows, eta) for eta in ETAS]


def test_what_it_does_not_depend_on():
    rows = uneven(80, 12)
    plain = [pca_dim(rows, eta) for eta in ETAS]
    turn = torch.linalg.qr(states(12, 12, seed=3)).Q
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    for same in (rows @ turn, 1e-6 * rows, -3e5 * rows, rows + 1e4 * states(1, 12, seed=4), rows[order]):
        assert [pca_dim(same, eta) for eta in ETAS] == plain
    tally = Scatter()
    for part in (rows + 1e4).split([1, 40, 0, 39]):
        tally.add(part)
    assert [tally.dimension(eta) for eta in ETAS] == plain


def test_rows_that_are_all_the_same_have_none():
    assert pca_dim(states(1, 6).expand(10, 6), 0.9) == 0 and pca_dim(torch.zeros(10, 6), 0.9) == 0
    assert pca_dim(1e-12 * states(10, 6), 0.9) > 0


def test_what_makes_no_sense_is_refused():
    for eta in (0, 1, -0.5, 1.5, float("nan")):
        with pytest.raises(TransectError, match="above 0 and below 1"):
            pca_dim(states(9, 4), eta)
        with pytest.raises(TransectError, match="eta"):
            scored(tiny("opt"), [inputs("opt")], eta=eta)
    with pytest.raises(TransectError, match="at least two tokens, got 1"):
        pca_dim(states(1, 4), 0.9)
    with pytest.raises(TransectError, match=r"T x d\), got shape \(2, 3, 4\)"):
        pca_dim(torch.zeros(2, 3, 4), 0.9)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(TransectError, match="not finite"):
            pca_dim(torch.tensor([[1.0, wrong], [0.0, 1.0]]), 0.9)


# The probe


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "phi3", "bert", "vit"])
@pytest.mark.parametrize("where", ["pre", "post"])
def test_each_block_is_the_dimension_of_its_activations(name, where):
    model, batches = tiny(name), [inputs(name, batch=4, seed=seed) for seed in (1, 2)]
    found = scored(model, batches, eta=0.95, where=where)
    anatomy, rows = Anatomy(model), {}
    point = "neurons" if where == "post" else "gate" if anatomy.blocks[0].mlp.gate is not None else "up"
    for batch in batches:
        given = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad(), watch(anatomy, [point]) as seen:
            model(**given)
        for layer, one in getattr(seen, point).items():
            rows.setdefault(layer, []).append(one.flatten(0, -2))
    expected = [pca_dim(torch.cat(parts), 0.95) for _, parts in sorted(rows.items())]
    assert found["dimension"].tolist() == expected and float(found["proxy"]) == pytest.approx(np.mean(expected))
    assert int(found["parameters"]) == model.num_parameters()
    assert float(found["score"]) == float(found["proxy"]) * model.num_parameters()
    assert found["neurons"].tolist() == [block.mlp.neurons for block in anatomy.blocks]
    assert len(drawings(found)) == 1 and f"{model.num_parameters():,} parameters" in found.findings[1]


@pytest.mark.parametrize("neurons", [16, 32, 100, 300])
def test_before_the_activation_there_are_no_more_directions_than_the_stream_is_wide(neurons):
    torch.manual_seed(0)
    model = tf.OPTForCausalLM(small(ffn_dim=neurons)).double()
    found = scored(model, IDS, eta=1 - 1e-9)
    assert (found["dimension"] <= min(32, neurons)).all() and (found["read"] == 32).all()
    post = scored(model, IDS, eta=1 - 1e-9, where="post")
    assert neurons < 100 or (post["dimension"] > 32).all()
    assert any("where=post" in caveat for caveat in found.caveats) == (neurons > 32)
    assert any("are few" in caveat for caveat in found.caveats) == (4 * neurons > IDS.numel())


def small(width=32, ffn_dim=64, layers=2):
    return tf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=width, ffn_dim=ffn_dim, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=width, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def test_doubling_all_widths_multiplies_both_parts():
    parts = []
    for times in (1, 2):
        torch.manual_seed(0)
        model = tf.OPTForCausalLM(small(16 * times, 32 * times))
        found = scored(model, IDS, eta=0.9)
        parts.append((float(found["proxy"]), model.num_parameters()))
        assert float(found["score"]) == parts[-1][0] * parts[-1][1]
    assert parts[1][0] > 1.3 * parts[0][0] and parts[1][1] > 1.9 * parts[0][1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    model = tiny("llama").double()
    rows = [IDS[0, :20], IDS[1, :9], IDS[2, :14]]
    alone = scored(model, [{"input_ids": row[None]} for row in rows])
    ids, mask = torch.full((3, 25), 9), torch.zeros(3, 25, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(25 - len(row), 25)
        ids[number, place], mask[number, place] = row, 1
    padded = scored(model, [{"input_ids": ids, "attention_mask": mask}])
    assert padded["dimension"].tolist() == alone["dimension"].tolist() and int(padded["tokens"]) == 43


def test_nothing_is_left_behind_in_the_model():
    torch.manual_seed(3)
    model = tf.OPTForCausalLM(small())  # with dropout
    model.train()
    model.model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, again = (scored(model, IDS) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random) and [module.training for module in model.modules()] == modes
    assert all(one.grad is None and one.requires_grad for one in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert float(first["score"]) == float(again["score"])


def test_blocks_without_an_mlp_are_left_out_and_broken_weights_are_named():
    model = tiny("opt")
    Anatomy(model).blocks[1].mlp.drop()
    found = scored(model, [inputs("opt")])
    assert found.labels["layer"] == ["0", "2"] and len(found["dimension"]) == 2
    Anatomy(model).blocks[2].mlp.up.weight[0, 0] = float("nan")
    with pytest.raises(TransectError, match="not finite"):
        scored(model, [inputs("opt")])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_it_says_nothing_of_mixtures_of_experts(name):
    model = tiny(name)
    found = run_probes(Specimen(Anatomy(model), data=load(IDS, model)), {"w-pca": {}})
    assert "mixture" in found.refused["w-pca"]


# Rankings


def test_the_same_seeds_give_the_same_ranking_and_spread_over_seeds_is_reported():
    configs = {"narrow": small(16, 32), "same": small(16, 32), "wide": small(32, 64), "deep": small(32, 64, 3)}
    random = torch.get_rng_state()
    first, again = (rank_architectures(configs, IDS, seeds=(0, 1)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random) and first.table.equals(again.table) and first.agreement is None
    rows = first.table.set_index("architecture")
    assert list(rows.index)[:2] == ["deep", "wide"] and rows.loc["narrow"].equals(rows.loc["same"])
    single = [rank_architectures(configs, IDS, seeds=(seed,)).table.set_index("architecture") for seed in (0, 1)]
    values = [float(one.loc["deep", "dimension"]) for one in single]
    assert rows.loc["deep", "dimension"] == pytest.approx(np.mean(values)) and math.isnan(
        single[0].loc["deep", "score_std"]
    )
    assert rows.loc["deep", "dimension_std"] == pytest.approx(np.std(values, ddof=1))
    assert rows.loc["deep", "parameters"] == tf.OPTForCausalLM(configs["deep"]).num_parameters()


def test_agreement_with_given_scores():
    configs = {str(number): small(16, 8 * (number + 1)) for number in range(4)}
    scores = {"0": 1.0, "1": 3.0, "2": 2.0, "3": 4.0}
    found = rank_architectures(configs, IDS, scores=scores, seeds=(0,), where="post")
    rows, given = found.table.set_index("architecture").loc[list(configs)], list(scores.values())
    for name in ("parameters", "dimension", "score"):
        assert found.agreement.loc[name, "tau"] == pytest.approx(kendalltau(rows[name], given)[0])
        assert found.agreement.loc[name, "rho"] == pytest.approx(spearmanr(rows[name], given)[0])
    assert found.agreement.loc["parameters", "tau"] == pytest.approx(2 / 3)


def test_partial_correlations_take_the_parameter_count_out():
    generator = np.random.default_rng(0)
    parameters = generator.normal(size=4000)
    scores = parameters + generator.normal(size=4000)
    proxies = {"parameters": parameters, "blind": parameters + generator.normal(size=4000), "seeing": scores}
    found = agreement({name: values.tolist() for name, values in proxies.items()}, scores.tolist(), parameters.tolist())
    assert found.loc["blind", "rho"] > 0.4 and abs(found.loc["blind", "partial_rho"]) < 0.05
    assert found.loc["seeing", "partial_rho"] == pytest.approx(1) == found.loc["seeing", "partial_tau"]
    assert math.isnan(found.loc["parameters", "partial_tau"])
    # the residuals' correlation, for ranks
    ranks = np.stack([np.argsort(np.argsort(one)) for one in (proxies["blind"], scores, parameters)]).astype(float)
    left = [one - np.polyval(np.polyfit(ranks[2], one, 1), ranks[2]) for one in ranks[:2]]
    assert found.loc["blind", "partial_rho"] == pytest.approx(np.corrcoef(*left)[0, 1])
    assert agreement({"constant": [1, 1, 1]}, [1, 2, 3], [3, 1, 2]).isna().all(axis=None)


def test_rankings_refuse_what_they_cannot_rank():
    with pytest.raises(TransectError, match="two architectures and one seed: got 1 and 3"):
        rank_architectures({"a": small()}, IDS)
    with pytest.raises(TransectError, match="got 2 and 0"):
        rank_architectures({"a": small(), "b": small()}, IDS, seeds=())
    with pytest.raises(BadData, match=r"scores are for \['a'\]"):
        rank_architectures({"a": small(), "b": small()}, IDS, scores={"a": 1.0})
    with pytest.raises(BadData, match=r"got \[2, 3\]"):
        agreement({"a": [1, 2]}, [1, 2, 3], [1, 2, 3])
    with pytest.raises(BadData, match="finite"):
        agreement({"a": [1, float("nan")]}, [1, 2], [1, 2])


# Architectures that are drawn, and trained briefly


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_drawn_architectures_are_small_models_of_the_kind(name):
    anatomy = Anatomy(tiny(name))
    sizes = {"depths": (2, 4), "widths": (16, 32), "ratios": (1, 2), "head": 8}
    found = drawn_architectures(anatomy, 12, **sizes)
    assert list(found) == list(drawn_architectures(anatomy, 12, **sizes)) and len(set(found)) == 12
    assert list(found) != list(drawn_architectures(anatomy, 12, seed=1, **sizes))
    for said, config in list(found.items())[::5]:
        built = Anatomy(tf.AutoModelForCausalLM.from_config(config))
        blocks, width, neurons = (int(size) for size in said.split(" x "))
        assert 2 <= blocks == len(built.blocks) <= 4 and 16 <= width <= 32 and neurons in (width, 2 * width)
        assert built.blocks[0].matrix("down").shape == (width, neurons) and built.config_value("heads") == width // 8
    assert anatomy.model.config.to_dict() == tiny(name).config.to_dict()
    with pytest.raises(TransectError, match="there are 18 such architectures, and 19 were asked for"):
        drawn_architectures(anatomy, 19, **sizes)


def test_trained_architectures_see_the_same_and_are_not_trained_twice(tmp_path):
    configs = {"narrow": small(16, 32), "wide": small(32, 64)}
    training, held_out = (
        Batches([{"input_ids": part} for part in IDS[:20].split(4)]),
        Batches([{"input_ids": IDS[20:]}]),
    )
    schedule = Schedule(1e-2, epochs=2)
    random = torch.get_rng_state()
    alone = train_architectures(dict(reversed(configs.items())), training, held_out, schedule)
    folder = Folder(tmp_path / "architectures", "architectures")
    part = train_architectures({"wide": configs["wide"]}, training, held_out, schedule, folder=folder)
    both = train_architectures(configs, training, held_out, schedule, folder=folder)
    assert torch.equal(torch.get_rng_state(), random) and both["wide"] == part["wide"]  # its seconds, too
    for name in configs:
        assert both[name]["loss"] == alone[name]["loss"] and both[name]["tokens"] == 2 * 20 * 20
        assert both[name]["parameters"] == tf.OPTForCausalLM(configs[name]).num_parameters()
    other = train_architectures({"wide": configs["wide"]}, training, held_out, Schedule(1e-3), folder=folder)
    assert other["wide"]["loss"] != part["wide"]["loss"]
    with pytest.raises(Diverged, match="wide: the loss is not finite"):
        train_architectures({"wide": configs["wide"]}, training, held_out, Schedule(1e30, clip=None))

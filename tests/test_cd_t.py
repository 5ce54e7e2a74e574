"""CD-T: the rules of the card, on tiny random models in float64."""

from contextlib import contextmanager

import pytest
import torch

from tests.models import CAUSAL, inputs, tiny
from transect import Anatomy
from transect.claims import Verdict, copying, run_claims
from transect.data import Batches, Specimen, load
from transect.errors import NotApplicable
from transect.forward import Seen, changed, watch
from transect.probes import drawings, run_probes
from transect.probes.catalog.cd_t.circuits import (
    Alone,
    grow,
    mean_heads,
    prune,
    scores_on_everything,
    scores_on_logits,
)
from transect.probes.catalog.cd_t.decomposition import Decomposition, stable


class Letters:
    """A tokenizer that only decodes."""

    def decode(self, ids):
        return "".join(chr(97 + int(number) % 26) for number in ids)


BIASED = ("gpt2", "opt", "gpt_neox", "qwen2", "gptj")


def opened(name, pattern="recomputed", length=6):
    model = tiny(name, dtype=torch.float64)
    ids = inputs(name, batch=1, length=length)["input_ids"][0]
    return Decomposition(Specimen(Anatomy(model)), ids, pattern)


def one_hot(length, position):
    return torch.arange(length)[None] == position


@pytest.mark.parametrize("pattern", ["recomputed", "fixed"])
@pytest.mark.parametrize("name", CAUSAL)
def test_everything_nothing_and_causality(name, pattern):
    made = opened(name, pattern)
    everything = made.words(torch.ones(1, 6, dtype=torch.bool))
    crumbs = (everything.logits[0] - made.logits).norm() / made.logits.norm()
    assert crumbs < (0.1 if name in BIASED else 1e-5)  # a bias goes to the rest where both parts are nearly 0
    nothing = made.words(torch.zeros(1, 6, dtype=torch.bool))
    assert not nothing.logits.any() and not nothing.stream.any()
    late = made.words(one_hot(6, 3))
    assert not late.stream[:, :3].any() and late.stream[:, 3:].any()
    head = made.heads([(1, 4, 2)])
    assert not head.stream[:, :4].any() and head.stream[:, 4:].any()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in made.specimen.model.modules()) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_batches_equal_single_sources(name):
    made = opened(name)
    nodes = [(0, 1, 0), (0, 5, 3), (1, 2, 1)]
    together = made.heads(nodes, keep=True)
    for number, node in enumerate(nodes):
        alone = made.heads([node], keep=True)
        torch.testing.assert_close(together.logits[number], alone.logits[0], rtol=1e-9, atol=1e-9)
        for layer, part in alone.heads.items():
            torch.testing.assert_close(together.heads[layer][number], part[0])


def test_without_bias_and_nonlinearity_a_part_is_the_linear_contribution():
    """A head of the last block, without its MLP, reaches the logits through W_o, the norm's scale and W_U alone."""
    model = tiny("llama", dtype=torch.float64)
    anatomy = Anatomy(model)
    anatomy.blocks[2].mlp.drop()
    ids = inputs("llama", batch=1, length=6)["input_ids"][0]
    made = Decomposition(Specimen(anatomy), ids)
    node = (2, 5, 1)
    with torch.no_grad(), watch(anatomy, ["residual", "heads"]) as seen:
        model(ids[None])
    block, x = anatomy.blocks[2], seen.residual[3][0, -1]
    written = block.attention.o.weight[:, 8:16] @ seen.heads[2][0, -1, 8:16]
    normed = written * anatomy.final_norm.weight / (x.square().mean() + anatomy.final_norm.variance_epsilon).sqrt()
    torch.testing.assert_close(made.heads([node]).logits[0], (normed @ model.lm_head.weight.T).detach())
    pair = made.heads([node, (2, 5, 2)]).logits
    torch.testing.assert_close(made.heads([(2, 5, 2)]).logits[0], pair[1])


def test_in_a_linear_network_parts_add_up_over_sources():
    """With the attention weights fixed, and without MLPs and biases, everything behind the words is linear."""
    model = tiny("llama", dtype=torch.float64)
    anatomy = Anatomy(model)
    for block in anatomy.blocks:
        block.mlp.drop()
    made = Decomposition(Specimen(anatomy), inputs("llama", batch=1, length=6)["input_ids"][0], "fixed")
    each = made.words(torch.eye(6, dtype=torch.bool)).logits
    pair = made.words((torch.arange(6) < 2)[None]).logits[0]
    torch.testing.assert_close(each[:2].sum(0), pair, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(each.sum(0), made.logits, rtol=0, atol=1e-6)  # Llama's norms compute in float32
    assert each.abs().amax(1).min() > 1e-3


def test_a_head_that_says_its_mean_is_no_source():
    made = opened("gpt2")
    means = {layer: made.seen.heads[layer][0] for layer in range(3)}
    assert not made.heads([(0, 2, 1), (1, 3, 0)], means).stream.any()


def test_the_stabiliser_keeps_the_sum_and_is_idempotent():
    generator = torch.Generator().manual_seed(0)
    r, x = (torch.randn(50, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    once = stable(r, x)
    assert (once * (x - once) >= 0).all()
    assert torch.equal(stable(once, x), once)
    assert torch.equal(once[r * (x - r) >= 0], r[r * (x - r) >= 0])
    assert set(((once == x) | (once == 0))[r * (x - r) < 0].tolist()) == {True}


def test_the_layers_of_gpt2_written_out():
    """Both parts of every activation, by the rules of the card; the stabiliser acts three times in a layer."""
    made = opened("gpt2")
    model = made.specimen.model
    tau = 1e-8

    def linear(r, i, weight, bias):
        r, i = r @ weight, i @ weight
        size = r.abs() + i.abs() + tau
        return r + bias * r.abs() / size, i + bias * i.abs() / size

    def norm(r, i, module):
        spread = ((r + i).var(-1, correction=0, keepdim=True) + module.eps).sqrt()
        size = r.abs() + i.abs() + tau
        return tuple(
            module.weight * (x - x.mean(-1, keepdim=True)) / spread + module.bias * x.abs() / size for x in (r, i)
        )

    def stabilised(r, i):
        whole, apart, first = r + i, r * i < 0, r.abs() >= i.abs()
        return (
            torch.where(apart, torch.where(first, whole, 0.0), r),
            torch.where(apart, torch.where(first, 0.0, whole), i),
        )

    def heads(x):
        return x.unflatten(-1, (4, 8)).transpose(0, 1)

    mask = torch.full((6, 6), float("-inf"), dtype=torch.float64).triu(1)
    positions = torch.tensor([False, True, False, True, False, False])
    with torch.no_grad():
        x = made.seen.residual[0][0]
        r, i = x * positions[:, None], x * ~positions[:, None]
        for block in model.transformer.h:
            normed = norm(r, i, block.ln_1)
            both = linear(*normed, block.attn.c_attn.weight, block.attn.c_attn.bias)
            (q, k, v), (q_i, k_i, v_i) = ([heads(part) for part in one.split(32, -1)] for one in both)
            whole = ((q + q_i) @ (k + k_i).mT / 8**0.5 + mask).softmax(-1) @ (v + v_i)
            z = (q @ k.mT / 8**0.5 + mask).softmax(-1) @ v
            z, z_i = (one.transpose(0, 1).flatten(1) for one in (z, whole - z))
            added, added_i = linear(z, z_i, block.attn.c_proj.weight, block.attn.c_proj.bias)
            r, i = r + added, i + added_i
            up, up_i = stabilised(*linear(*norm(r, i, block.ln_2), block.mlp.c_fc.weight, block.mlp.c_fc.bias))
            neurons_i = block.mlp.act(up_i)
            neurons = block.mlp.act(up + up_i) - neurons_i
            out, out_i = stabilised(*linear(neurons, neurons_i, block.mlp.c_proj.weight, block.mlp.c_proj.bias))
            assert not torch.equal(stabilised(r + out, i + out_i)[0], r + out)
            r, i = stabilised(r + out, i + out_i)
    torch.testing.assert_close(made.words(positions[None]).stream[0], r, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "pattern"), [("gpt2", "recomputed"), ("llama", "recomputed"), ("bloom", "fixed")])
def test_one_pass_gives_what_each_node_does_alone(name, pattern):
    made = opened(name, pattern)
    nodes, direction = made.nodes, torch.zeros(len(made.logits))
    direction[3], direction[7] = 1, -1
    scores, shares = scores_on_everything(made, direction, None, batch=5)
    torch.testing.assert_close(scores, scores_on_logits(made, nodes, direction, None, batch=64))
    for source in ((0, 1, 0), (1, 2, 3), (1, 5, 1), (2, 5, 2)):
        number, found = nodes.index(source), made.heads([source], keep=True)
        torch.testing.assert_close(scores[number], found.logits[0, 3] - found.logits[0, 7])
        for target in ((0, 5, 0), (1, 5, 0), (2, 1, 1), (2, 5, 1)):
            share = float(shares[number, nodes.index(target)])
            if target[0] > source[0]:
                r = made.head(target, found.heads[target[0]][0])
                i = made.head(target, made.seen.heads[target[0]][0]) - r
                expected = float(r.abs().mean() / (r.abs().mean() + i.abs().mean()))
                assert share == pytest.approx(expected, abs=1e-6)
                assert (share > 0) == (target[1] >= source[1])
            else:
                assert share == 0


def test_a_circuit_grows_from_what_raises_the_answer_through_all_layers_in_front():
    made = opened("gpt2")
    nodes = made.nodes
    high, low = (2, 5, 0), (0, 5, 1)
    scores = torch.tensor([{high: 3.0, low: 2.0, (2, 5, 3): -9.0}.get(node, 0.5) for node in nodes])
    _, shares = scores_on_everything(made, torch.zeros(len(made.logits)), None)
    rounds = grow(nodes, scores, shares, 2, 0.0)
    assert rounds[0] == [high, low]  # not the one that lowers the answer most
    asked = [node for node in nodes if node[0] < 2 and node != low]
    of_high = shares[[nodes.index(node) for node in asked], nodes.index(high)]
    for layer in (0, 1):
        mine = torch.tensor([node[0] == layer for node in asked])
        of_high[mine] /= of_high[mine].sum()
    assert rounds[1] == [asked[int(number)] for number in of_high.topk(2).indices]
    tops = [max(layer for layer, _, _ in one) for one in rounds]
    assert tops == sorted(set(tops), reverse=True)
    assert grow(nodes, -torch.ones(len(nodes)), shares, 2, 0.0) == [[]]
    assert len(grow(nodes, scores, shares, 2, 0.7)[0]) == 1


def test_pruning_drops_what_the_circuit_does_better_without():
    worth = {"a": 1.0, "b": -2.0, "c": 0.5, "d": -1.0, "e": -0.1}
    asked = []

    def score(some):
        asked.append(tuple(some))
        together = 3.0 if "c" in some and "d" in some else 0.0  # d hurts alone, and helps c
        return sum(worth[one] for one in some) + together

    def without(kept, some):
        return torch.tensor([score([one for one in kept if one != node]) for node in some])

    assert prune(list("abcde"), ["b"], score, without, 10) == list("abcd")
    assert prune(list("abcde"), [], score, without, 10) == list("acd")
    assert ("a", "c", "d", "e") in asked
    assert prune(list("abcde"), [], score, without, 1) == list("acde")
    assert prune(list("abcde"), [], score, without, 0) == list("abcde")
    assert prune(list("abde"), [], score, without, 10) == ["a"]
    assert prune(list("ab"), list("ab"), score, without, 3) == list("ab")
    assert prune([], [], score, without, 3) == []


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_a_circuit_less_one_of_its_nodes_is_the_circuit_without_it(name, monkeypatch):
    specimen = Specimen(Anatomy(tiny(name, dtype=torch.float64)))
    ids = inputs(name, batch=3, length=6)["input_ids"]
    means = mean_heads(specimen, ids)
    circuit = Decomposition(specimen, ids[0]).nodes[::5]
    some = Alone(specimen, ids, means)
    monkeypatch.setattr("transect.probes.catalog.cd_t.circuits._ROWS", 6)  # two nodes at once
    found = [pair for batch, logits in some.without(circuit, circuit) for pair in zip(batch, logits, strict=True)]
    assert sorted(node for node, _ in found) == circuit
    for node, logits in found:
        expected = some.logits([one for one in circuit if one != node])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)  # Llama's norms compute in float32
        read = node[0] < 2 or node[1] == 5  # of the last layer, only the last position is
        assert torch.allclose(logits, some.logits(circuit), rtol=0, atol=1e-9) != read


def test_the_prompts_that_judge_do_not_prune(monkeypatch):
    model = tiny("gpt2")
    rows = [inputs("gpt2", batch=1, length=9, seed=seed)["input_ids"][0].tolist() for seed in range(4)]
    specimen = Specimen(Anatomy(model), data=load(rows, model), tokenizer=Letters())
    seen = []

    class Counted(Alone):
        def __init__(self, specimen, ids, means):
            super().__init__(specimen, ids, means)
            seen.append(ids)

    monkeypatch.setattr("transect.probes.catalog.cd_t.faithfulness.Alone", Counted)
    settings = {"prompts": 4, "length": 5, "most": 8, "threshold": 0.0}
    plain = run_probes(specimen, {"cd-t": {**settings, "pruned": 0}})["cd-t"]
    pruned = run_probes(specimen, {"cd-t": {**settings, "pruned": 3}})["cd-t"]
    assert (pruned["sizes"] <= plain["sizes"]).all() and (pruned["sizes"] < plain["sizes"]).any()
    assert (pruned["sizes"] >= plain["sizes"] - 3).all()
    halves = {tuple(ids.flatten().tolist()) for ids in seen}
    assert len(halves) == 2 and all(len(ids) == 2 for ids in seen)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_probe_runs_on_text_everywhere(name):
    model = tiny(name)
    rows = [inputs(name, batch=1, length=9, seed=seed)["input_ids"][0].tolist() for seed in range(4)]
    specimen = Specimen(Anatomy(model), data=load(rows, model), tokenizer=Letters())
    result = run_probes(specimen, {"cd-t": {"prompts": 3, "length": 5, "most": 2}})["cd-t"]
    assert result["words"].shape == (3, 5) and result["heads"].shape == (3, 4)
    assert result.findings and len(drawings(result)) == 3


def test_all_heads_are_the_model_and_none_the_mean():
    model = tiny("gpt2", dtype=torch.float64)
    specimen = Specimen(Anatomy(model))
    ids = inputs("gpt2", batch=3, length=6)["input_ids"]
    means = mean_heads(specimen, ids)
    nodes = Decomposition(specimen, ids[0]).nodes
    with torch.no_grad():
        torch.testing.assert_close(Alone(specimen, ids, means).logits(nodes), model(ids).logits[:, -1])
        ablated = {("heads", layer): lambda x, mean=mean: mean.expand_as(x) for layer, mean in means.items()}
        with changed(specimen.anatomy, ablated):
            torch.testing.assert_close(Alone(specimen, ids, means).logits([]), model(ids).logits[:, -1])


def test_encoders_are_refused():
    for name in ("bert", "vit"):
        with pytest.raises(NotApplicable):
            Decomposition(Specimen(Anatomy(tiny(name))), torch.arange(3, 8))


def test_heads_that_copy_are_told_by_what_they_attend_to(monkeypatch):
    specimen = Specimen(Anatomy(tiny("llama")))
    ids = copying.repeated(specimen, 3)
    assert ids.shape == (3, 24) and torch.equal(ids[:, :12], ids[:, 12:])
    back, copies = torch.zeros(3, 4, 24, 24), torch.zeros(3, 4, 24, 24)
    for query in range(1, 24):
        back[:, 1, query, query - 1] = 0.8
    for query in range(12, 24):
        copies[:, 2, query, query - 11] = 0.6

    @contextmanager
    def seen(anatomy, points):
        yield Seen(patterns={0: back, 2: copies})

    monkeypatch.setattr(copying, "watch", seen)
    shares = copying.copying_heads(specimen, 3)
    expected = torch.zeros(2, 3, 4)
    expected[0, 0, 1], expected[1, 2, 2] = 0.8, 0.6
    torch.testing.assert_close(torch.stack(shares), expected)
    assert copying.heads_that(shares[0], "looks back") == [(0, 1)]
    with pytest.raises(NotApplicable, match="no head of this model sings"):
        copying.heads_that(shares[0] * 0.1, "sings")


def test_claims_about_heads_that_copy(monkeypatch):
    model = tiny("llama")
    text = Batches([inputs("llama", batch=2)])
    outcomes = run_claims(model, text, text, ["cd-t/copying-heads", "talking-heads/induction"])
    assert {outcome.result.verdict for outcome in outcomes} == {Verdict.NOT_APPLICABLE}
    shares = torch.zeros(2, 3, 4)
    shares[0, 0, 1], shares[1, 2, 2] = 0.8, 0.6
    for name in ("cd_t", "talking_heads"):
        monkeypatch.setattr(f"transect.claims.catalog.{name}.copying_heads", lambda specimen: (shares[0], shares[1]))
    heads, pairs = (outcome.result for outcome in run_claims(
        model, text, text, ["cd-t/copying-heads", "talking-heads/induction"]
    ))  # fmt: skip
    assert len(heads.numbers) == 12 and [row["head"] for row in heads.numbers if row["copies"]] == ["2.2"]
    place = next(number for number, row in enumerate(heads.numbers, 1) if row["copies"])
    assert (heads.verdict is Verdict.HOLDS) == (place <= 3)
    (row,) = pairs.numbers
    found = run_probes(Specimen(Anatomy(model)), {"talking-heads": {"tested": 0}})["talking-heads"]["heads"][1]
    assert row["pair"] == "0.1 -> 2.2" and row["score"] == pytest.approx(float(found[1, 10]))
    assert row["place"] == 1 + int((found > found[1, 10]).sum())
    assert (pairs.verdict is Verdict.HOLDS) == (row["place"] == 1)

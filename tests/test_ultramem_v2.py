"""UltraMemV2: retrieval against all slots of the grid, limits, windows, gradients, the start, sharing, bad input."""

import copy
from itertools import product

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from transect.anatomy import Anatomy
from transect.errors import TransectError
from transect.parts import build_model, insert
from transect.parts.catalog.ultramem_v2 import UltraMem, best_slots, direction

from .models import tiny

TOKENS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def part(places=1, width=16, neurons=32, seed=0, **settings):
    torch.manual_seed(seed)
    made = [
        UltraMem(width, neurons, place, places, 0, **{"side": 6, "top": 4, "start": "paper", **settings}).double()
        for place in range(places)
    ]
    for one in made[1:]:
        one.use_bank(made[0].bank)
    return made if places > 1 else made[0]


def test_all_rows_and_columns_give_the_best_slots_of_all():
    row, column, cores = drawn(5, 2, 7), drawn(5, 2, 7, seed=1), drawn(2, 2, 2, seed=2)
    uv = direction(cores, torch.ones(2, 2))
    slots, scores = best_slots(row, column, cores, uv, 7)
    all_scores = torch.einsum("tri,hrs,tsj->thij", row, cores, column).flatten(2)  # slot i n + j
    best = all_scores.sum(1).topk(7).indices
    assert torch.equal(slots.sort(-1).values, best.sort(-1).values)
    torch.testing.assert_close(scores, all_scores.gather(2, slots[:, None].expand(-1, 2, -1)))


def test_recall_rises_with_what_is_looked_at_and_how_near_rank_one_the_cores_are():
    def recall(top, second):
        row, column = drawn(300, 2, 30).abs(), drawn(300, 2, 30, seed=1).abs()
        cores = torch.diag(torch.tensor([1.0, second], dtype=torch.float64))[None]
        found = best_slots(row, column, cores, direction(cores, torch.ones(2, 2)), top)[0][:, :4]
        best = torch.einsum("tri,hrs,tsj->tij", row, cores, column).flatten(1).topk(4).indices
        return float((found[:, :, None] == best[:, None]).any(1).double().mean())

    assert recall(4, 0.5) < recall(8, 0.5) - 0.05 < recall(30, 0.5)
    assert recall(8, 0.8) < recall(8, 0.3) < recall(8, 0) == recall(30, 0.8) == 1


def test_the_limits_of_the_scores():
    s, t = drawn(3, 1, 5), drawn(3, 1, 5, seed=1)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    slots, scores = best_slots(s, t, one, direction(one, torch.ones(2, 1)), 5)
    i, j = slots // 5, slots % 5
    torch.testing.assert_close(scores[:, 0], s[:, 0].gather(1, i) * t[:, 0].gather(1, j))
    ones = torch.ones_like(s)
    eye = torch.eye(2, dtype=torch.float64)[None]  # additive product keys
    slots, scores = best_slots(torch.cat([s, ones], 1), torch.cat([ones, t], 1), eye, torch.ones(2, 2).double(), 5)
    sums = (s[:, 0, :, None] + t[:, 0, None]).flatten(1)
    torch.testing.assert_close(scores[:, 0], sums.topk(5).values)


def test_the_direction_keeps_its_sign():
    cores = drawn(2, 2, 2)
    found = direction(cores, torch.ones(2, 2))
    torch.testing.assert_close(direction(cores + 1e-6, -found), -found, atol=1e-4, rtol=0)
    u, v = found
    total = cores.sum(0)
    assert float(u @ total @ v) == pytest.approx(float(torch.linalg.matrix_norm(total, 2)))


@pytest.mark.parametrize("queries", ["each", "shared"])
def test_the_memory_slot_by_slot(queries):
    one, u = part(queries=queries), drawn(3, 16)
    pool = one.bank
    expected = torch.zeros(3, 16, dtype=torch.float64)
    slots, scores = one.looked_up(u)
    q = one.query_proj(u).view(3, 2, -1, 8)
    q = functional.rms_norm(q, (8,)) * one.query_gain
    keys = functional.rms_norm(one.keys, (8,)) * one.key_gain
    for t, k in product(range(3), range(4)):
        i, j = divmod(int(slots[t, k]), 6)
        by_rank = [[q[t, a, r % q.shape[2]] @ keys[a, r, at] for r in range(2)] for a, at in ((0, i), (1, j))]
        row, column = (torch.stack(scores) for scores in by_rank)
        at = int(one.shuffle[slots[t, k]])
        g = one.pre_proj.weight @ u[t] @ pool.pre[at]
        value = []
        for a in range(2):
            torch.testing.assert_close(scores[t, a, k], row @ one.cores[a] @ column)
            value.append(scores[t, a, k] * g * pool.values[a * 36 + at])
        expected[t] += one.out_proj.weight @ torch.cat(value)
    torch.testing.assert_close(one.memory(u), expected)
    one.memory(u[:1]).square().sum().backward()
    assert int((pool.pre.grad.abs().sum(1) > 0).sum()) == 4 and int((pool.values.grad.abs().sum(1) > 0).sum()) == 8
    assert one.cores.grad.abs().min() > 0 and not one.uv.requires_grad
    before = one.memory(u).detach()
    with torch.no_grad():
        pool.values *= 3
        torch.testing.assert_close(one.memory(u), 3 * before)
        pool.pre /= 3
        torch.testing.assert_close(one.memory(u), before)


def test_plain_vectors_slot_by_slot():
    one, u = part(values="vectors"), drawn(3, 16)
    neurons = part()
    assert sum(p.numel() for p in one.bank.parameters()) == sum(p.numel() for p in neurons.bank.parameters())
    slots, scores = one.looked_up(u)
    expected = torch.zeros(3, 16, dtype=torch.float64)
    for t, k in product(range(3), range(4)):
        at = int(one.shuffle[slots[t, k]])
        value = torch.cat([scores[t, a, k] * one.bank.values[a * 36 + at] for a in range(2)])
        expected[t] += one.out_proj.weight @ value
    torch.testing.assert_close(one.memory(u), expected)


def test_windows_of_the_pool():
    for share, side in ((0.5, 8), (1.0, 12), (0.01, 6)):  # of 4 x 36 slots
        parts = part(places=4, share=share)
        for place, one in enumerate(parts):
            assert one.side == side
            seen = set(((one.shuffle + one.offset) % one.slots).tolist())
            assert seen == {(36 * place + k) % 144 for k in range(side * side)}
    numbers = sum(p.numel() for p in parts[0].bank.parameters())
    assert numbers == 6**2 * 4 * (parts[0].pre_size + parts[0].value_size)
    assert parts[1].bank is parts[0].bank and not any("bank" in name for name, _ in parts[1].named_parameters())


@pytest.mark.parametrize(
    ("values", "width", "layers", "top", "most"),
    [("neurons", 64, 4, 16, 20), ("neurons", 256, 20, 32, 100), ("vectors", 256, 20, 32, 20)],
)
@torch.no_grad()
def test_the_start_has_the_variance_of_an_mlp(values, width, layers, top, most):
    torch.manual_seed(0)
    neurons, x, std = 4 * width, torch.randn(400, width), (2 / (5 * width)) ** 0.5
    gate, up, down = (torch.randn(*shape) * std for shape in ((neurons, width), (neurons, width), (width, neurons)))
    mlp = (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T / (2 * layers) ** 0.5
    one = UltraMem(width, neurons, 0, layers, 0, side=32, top=top, start="paper", values=values)
    assert one.looked_up(x)[1].mean().item() == pytest.approx(1, abs=0.2)
    ratio = float(one.memory(x).std() / mlp.std())
    assert 0.5 < ratio < 2
    for numbers in one.bank.parameters():
        torch.nn.init.normal_(numbers)
    assert float(one.memory(x).std() / mlp.std()) > most  # the more, the larger: 100 from a few hundred channels on


@pytest.mark.parametrize(("name", "values"), [("llama", "neurons"), ("gpt2", "vectors"), ("opt", "neurons")])
@torch.no_grad()
def test_it_begins_as_the_model_and_is_saved_with_one_pool(name, values, tmp_path):
    model = tiny(name)
    expected = model(TOKENS).logits
    insert(model, "block", "ultramem-v2", settings={"side": 8, "top": 4, "values": values})
    assert torch.equal(model(TOKENS).logits, expected)
    first, second = (block.module.around.part for block in Anatomy(model).blocks[:2])
    assert second.bank is first.bank
    for block in Anatomy(model).blocks:
        torch.nn.init.normal_(block.module.around.part.out_proj.weight)
    changed = model(TOKENS).logits
    assert not torch.allclose(changed, expected, atol=1e-3)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(TOKENS).logits, changed)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again(TOKENS).logits, changed)
    given = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(*(again.generate(TOKENS, use_cache=use, **given) for use in (True, False)))
    Anatomy(again).drop_block(0)  # which owned the pool
    logits = again(TOKENS).logits
    again.save_pretrained(tmp_path / "less")
    less = AutoModelForCausalLM.from_pretrained(tmp_path / "less")
    torch.testing.assert_close(less(TOKENS).logits, logits)


def test_bad_input():
    with pytest.raises(TransectError, match="top=16 of 8 rows"):
        build_model("llama", hidden=16, blocks=1, parts={"block": "ultramem-v2"}, settings={"ultramem-v2": {"side": 8}})
    for name, value in (("share", 0), ("share", 1.5), ("top", 200)):
        with pytest.raises(TransectError, match=name):
            insert(tiny("llama"), "block", "ultramem-v2", settings={name: value})

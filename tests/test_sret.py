"""SReT: attention within slices, a block's turns with what stands between them, and a trained encoder as one."""

from itertools import pairwise

import pytest
import torch
from torch.autograd.functional import jacobian
from transformers import AutoModelForImageClassification

import transect
from transect.anatomy import Anatomy, record_of
from transect.conversion import Calibration, conversion_named
from transect.conversion.catalog.sret import recursive
from transect.errors import TransectError
from transect.evaluation import parameters
from transect.parts import Around, Inside, insert
from transect.parts.catalog.plain_mlp import PlainMLP
from transect.parts.catalog.softmax import Softmax
from transect.parts.catalog.sret import Sliced, SReT
from transect.parts.rotary import rotated

from .models import assert_alike, assert_same_model, inputs, logits, tiny

WIDTH, HEADS, COUNT = 16, 2, 12


def sliced(groups, shuffle="none", layer=0):
    torch.manual_seed(0)
    return Sliced(WIDTH, HEADS, HEADS, 8, False, layer, groups=groups, shuffle=shuffle).double().eval()


def stream(count=COUNT, seed=0):
    return torch.randn(2, count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def converted(name="vit", **settings):
    anatomy, chosen = Anatomy(tiny(name)), conversion_named("sret")
    chosen.check(anatomy, **chosen.settings(settings))
    chosen.function(anatomy, Calibration(), **chosen.settings(settings))
    return anatomy.model


@torch.no_grad()
def test_one_slice_is_softmax_attention_shuffled_or_not():
    plain = Softmax(WIDTH, HEADS, HEADS, 8, False).double().eval()
    plain.load_state_dict(sliced(1).state_dict())
    assert_alike(sliced(1)(stream(), Around()), plain(stream(), Around()))
    moved = sliced(1, "fixed")
    moved.order = lambda count: torch.randperm(count, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(moved(stream(), Around()), plain(stream(), Around()), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(("groups", "ends"), [(3, [0, 4, 8, 12]), (5, [0, 3, 6, 9, 12]), (12, list(range(13)))])
def test_a_slice_sees_itself_alone(groups, ends):
    mixer = sliced(groups)
    found = jacobian(lambda x: mixer(x[None], Around())[0].sum(-1), stream()[0])  # N x N x d
    seen = found.abs().sum(-1) > 1e-12
    expected = torch.zeros(COUNT, COUNT, dtype=torch.bool)
    for begin, end in pairwise(ends):
        expected[begin:end, begin:end] = True
    assert torch.equal(seen, expected)


@torch.no_grad()
def test_shuffled_slices_are_others_and_stay_the_same():
    fixed = sliced(3, "fixed")
    assert torch.equal(fixed(stream(), Around()), fixed(stream(), Around()))
    assert not torch.allclose(fixed(stream(), Around()), sliced(3)(stream(), Around()))
    assert not torch.allclose(fixed(stream(), Around()), sliced(3, "fixed", layer=1)(stream(), Around()))
    random = sliced(3, "random")
    assert not torch.allclose(random(stream(), Around()), random(stream(), Around()))
    # By hand: attention of the shuffled positions, put back.
    order = fixed.order(COUNT)
    by_hand = torch.empty_like(stream())
    by_hand[:, order] = sliced(3)(stream()[:, order], Around())
    assert_alike(fixed(stream(), Around()), by_hand)


@pytest.mark.parametrize("shuffle", ["none", "fixed"])
@torch.no_grad()
def test_rotary_positions_stay_with_what_is_sliced_and_shuffled(shuffle):
    """By hand: queries and keys are turned by the places where they stood, and those of other slices are not seen."""
    mixer, x = sliced(3, shuffle, layer=1), stream()
    angles = torch.arange(COUNT, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001] * 2)
    rotary = (angles.cos()[None], angles.sin()[None])
    order = torch.arange(COUNT) if shuffle == "none" else mixer.order(COUNT)
    slices = order.argsort() // (COUNT // 3)
    q, k, v = (p(x).unflatten(-1, (HEADS, 8)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    scores = rotated(q, rotary) @ rotated(k, rotary).mT * 8**-0.5
    weights = scores.masked_fill(slices[:, None] != slices, -torch.inf).softmax(-1)
    expected = mixer.o_proj((weights @ v).transpose(1, 2).flatten(2))
    assert_alike(mixer(x, Around(rotary=rotary)), expected)
    assert not torch.allclose(mixer(x, Around()), expected)


@torch.no_grad()
def test_what_is_no_position_is_not_read_where_slices_are_uneven():
    real = torch.ones(2, COUNT, dtype=torch.bool)
    real[1, 5:] = False
    x, other = stream(), stream()
    other[1, 5:] = 9
    for mixer in (sliced(5), sliced(5, "fixed")):
        one, changed = mixer(x, Around(real)), mixer(other, Around(real))
        assert torch.equal(one[0], changed[0]) and torch.equal(one[1, :5], changed[1, :5])


def test_scores_cost_as_many_times_less_as_there_are_slices():
    whole = sliced(1).mixing_flops(64)
    assert [whole // sliced(groups).mixing_flops(64) for groups in (2, 4, 16)] == [2, 4, 16]
    from torch.utils.flop_counter import FlopCounterMode

    counted = []
    for groups in (1, 4):
        with FlopCounterMode(display=False) as flops:
            sliced(groups)(stream(64), Around())
        counted.append(flops.get_total_flops())
    projections = 2 * 2 * 64 * 4 * WIDTH * WIDTH
    assert counted[0] - projections == 4 * (counted[1] - projections)


@torch.no_grad()
def test_weights_of_one_are_the_block_and_of_zero_nothing():
    torch.manual_seed(0)
    first, second, attention, mlp = (torch.nn.Linear(WIDTH, WIDTH).double() for _ in range(4))
    inside = Inside(lambda x: x, attention, mlp, [first, second], lambda: None, lambda x, real: x)
    part, x = SReT(WIDTH).double(), stream()
    between = x + attention(first(x))
    block = between + mlp(second(between))
    assert_alike(part(x, inside), block + part.projection(part.norm(block)))
    part.c.copy_(torch.tensor([1.0, 0.0]))
    assert_alike(part(x, inside), block)
    part.z.copy_(torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert torch.equal(part(x, inside), x)
    assert_alike(SReT(WIDTH, ratio=0).double()(x, inside), block)


@pytest.mark.parametrize("loops", [1, 2, 3])
def test_a_converted_encoder_begins_as_what_it_was_and_comes_back(loops, tmp_path):
    model = converted(loops=loops)
    assert_alike(logits(model, inputs("vit")), logits(tiny("vit"), inputs("vit")))
    with torch.no_grad():
        for block in Anatomy(model).blocks:
            block.module.leading.z.fill_(0.9)
            block.module.leading.c.fill_(0.7)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert_same_model(again, model, inputs("vit"))
    assert parameters(again) == parameters(model) and record_of(again).tied == record_of(model).tied


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_sliced_turns_share_their_block_and_come_back(name, tmp_path):
    model = converted(name, groups=4, groups_later=2)
    blocks = Anatomy(model).blocks
    parts = [block.part("attention") for block in blocks]
    assert [part.groups for part in parts] == [4, 2] * 3 and [p.shuffle for p in parts] == ["none", "fixed"] * 3
    assert parts[0].q_proj.weight is parts[1].q_proj.weight and parts[0].q_proj.weight is not parts[2].q_proj.weight
    assert_alike(logits(model, inputs(name)), logits(model, inputs(name)))
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert_same_model(again, model, inputs(name))


def test_turns_cost_no_parameters_but_what_stands_between():
    once, twice, thrice = (parameters(converted(loops=loops)) for loops in (1, 2, 3))
    each = 4 + 2 + 2 * 32 + 2 * (32 * 32 + 32)
    assert twice - once == thrice - twice == 3 * each
    assert parameters(converted(loops=4, ratio=0)) - parameters(tiny("vit")) == 3 * 4 * 4
    assert once - parameters(tiny("vit")) == 3 * each


def test_the_gradient_of_a_block_is_the_sum_over_its_turns():
    models = []
    for _ in range(2):
        anatomy = Anatomy(tiny("vit"))
        recursive(anatomy, 2, 1.0, 1, 1, "none")
        models.append(anatomy.model)
    Anatomy(models[1]).untie()
    for model in models:
        model(**inputs("vit")).loss.backward()
    names = [name for name, _ in Anatomy(models[0]).blocks[2].module.named_parameters() if "around" not in name]
    for name in names:
        ours, *each = (
            Anatomy(model).blocks[place].module.get_parameter(name).grad
            for model, place in ((models[0], 2), (models[1], 2), (models[1], 3))
        )
        torch.testing.assert_close(ours, sum(each), atol=1e-5, rtol=1e-4)


def test_training_moves_the_later_turns():
    found = transect.convert(
        tiny("vit"), "sret", inputs("vit", batch=8), steps=6, lr=1e-2, held_out=0.25, batch_size=2, lowers="own"
    )
    later = Anatomy(found.model).blocks[1].module.leading
    assert later.z[1] != 0 and later.c[1] != 0 and found.outcome["loss_after"] <= found.outcome["loss_converted"]


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (lambda: tiny("llama"), {}, "predicts the next token"), (lambda: tiny("bert"), {}, "behind the residual sum"),
        (lambda: tiny("modernbert"), {}, "a block's place enters"), (lambda: tiny("modernbert"), {"loops": 1}, "norms"),
        (lambda: converted(), {}, "share parameters already"), (lambda: tiny("vit"), {"loops": 0}, "loops=0 must be"),
        (lambda: insert(tiny("vit"), "mixer", "pooling"), {"groups": 2}, "a part stands there"),
        (lambda: tiny("vit"), {"groups_later": 99}, "99 slices of [0-9]+ positions"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_any_change(made, options, message):
    model = made()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TransectError, match=message):
        transect.convert(model, "sret", **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# The published backbones: widths, heads, ratios of MLPs and of what stands between turns, and parameters and the
# multiply-adds, in 10^9, with slices and without, for 1,000 classes of images of 224 x 224.
BACKBONES = {
    "T": ((64, 128, 256), (2, 4, 8), 3.6, 1, 4_755_979, (1.1, 1.4)),
    "LT": ((64, 128, 256), (2, 4, 8), 4.0, 1, 4_988_024, (1.2, 1.4)),
    "S": ((126, 252, 504), (3, 6, 12), 3.0, 2, 20_899_692, (4.2, 4.7)),
}
DISTINCT, TURNS, TOKENS = (2, 5, 3), 2, (28**2, 14**2, 7**2)
SLICES = ((8, 2), (4, 1), (1, 1))  # of the first and the second turn, by stages


@pytest.mark.parametrize("name", BACKBONES)
def test_the_published_backbones_have_as_many_parameters_and_operations(name):
    """Their stages of these parts, with what is around them counted by hand: three convolutions, a map of positions,
    two convolutions between the stages, and a head."""
    widths, heads, ratio, between, count, costs = BACKBONES[name]
    first, last = widths[0], widths[-1]
    stem = [(3, first // 2, 112**2), (first // 2, first, 56**2), (first, first, 28**2)]
    numbers = sum(9 * i * o + o + 2 * o for i, o, _ in stem) + first * TOKENS[0]
    adds = sum(9 * i * o * places for i, o, places in stem)
    for d, places in zip(widths[:2], TOKENS[1:], strict=True):
        numbers += (9 + 1) * 2 * d
        adds += 9 * 2 * d * places
    numbers += 2 * last + 1000 * (last + 1)
    sums = [adds + 1000 * last] * 2
    for d, h, distinct, tokens, slices in zip(widths, heads, DISTINCT, TOKENS, SLICES, strict=True):
        mlp, part = PlainMLP(d, int(ratio * d)), SReT(d, ratio=between)
        norms = 2 * 2 * d
        numbers += distinct * (norms + parameters(mlp) + part.z.numel())
        numbers += distinct * TURNS * (parameters(part) - part.z.numel())
        for turn, groups in enumerate(slices):
            attention = Sliced(d, h, h, d // h, False, 0, groups=groups, bias=True)
            numbers += 0 if turn else distinct * parameters(attention)
            whole = Sliced(d, h, h, d // h, False, 0, groups=1, bias=True)
            for at, one in enumerate((attention, whole)):
                each = tokens * (one.flops + mlp.flops + part.flops) + one.mixing_flops(tokens)
                sums[at] += distinct * each // 2
    assert numbers == count
    assert [one / 1e9 for one in sums] == pytest.approx(costs, abs=0.06)

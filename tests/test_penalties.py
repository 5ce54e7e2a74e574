"""Penalties: the algebra of decorrelation, what they see of a pass, and adapting with one."""

import pytest
import torch

import transect
from transect.anatomy import Anatomy
from transect.errors import TransectError
from transect.training import Seen, penalty_named, watching
from transect.training.penalties.decorrelation import decorrelation, squared_cosines

from .models import CONFIGS, VOCABULARY, inputs, tiny

DATA = torch.randint(3, VOCABULARY, (20, 12), generator=torch.Generator().manual_seed(5))
ALL = torch.ones(2, 5, dtype=torch.bool)
FIRST = torch.zeros(2, dtype=torch.long)


def states(count=3, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, width, generator=generator, dtype=torch.float64) for _ in range(count)]


def of(*layers, anchors=FIRST, counted=ALL):
    return squared_cosines(layers, anchors, counted)


def test_it_is_the_mean_of_squared_cosines():
    found, parts = states(), []
    for layer in found:
        for row in layer:
            parts += [torch.nn.functional.cosine_similarity(row[0], row[t], dim=0) ** 2 for t in range(1, 5)]
    torch.testing.assert_close(of(*found), torch.stack(parts).mean())


def test_its_range_and_what_leaves_it_as_it_is():
    (layer,) = states(1)
    aligned = layer[:, :1] * torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)[None, :, None]
    assert float(of(aligned)) == pytest.approx(1)
    apart = torch.zeros(2, 5, 8, dtype=torch.float64)
    apart[:, torch.arange(5), torch.arange(5)] = torch.arange(1.0, 6.0, dtype=torch.float64)
    assert float(of(apart)) == 0
    scales = torch.tensor([2.0, -3.0, 0.1, 1.0, 7.0], dtype=torch.float64)[None, :, None]
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    torch.testing.assert_close(of(layer * scales), of(layer))
    torch.testing.assert_close(of(layer @ turn), of(layer))
    torch.testing.assert_close(of(torch.cat([layer, layer[:, 1:]], 1), counted=torch.ones(2, 9).bool()), of(layer))


def test_padding_and_answers_do_not_count_on_either_side():
    (layer,) = states(1)
    right = ALL.clone()
    right[1, 3:] = False
    alone = [
        of(layer[:1], anchors=FIRST[:1], counted=ALL[:1]),
        of(layer[1:, :3], anchors=FIRST[:1], counted=ALL[1:, :3]),
    ]
    torch.testing.assert_close(of(layer, counted=right), (4 * alone[0] + 2 * alone[1]) / 6)  # by their tokens
    turned = torch.stack([layer[0], torch.cat([layer[1, 3:], layer[1, :3]])])  # the padding in front
    left = torch.stack([right[0], right[1].flip(0)])
    torch.testing.assert_close(of(turned, anchors=left.int().argmax(1), counted=left), of(layer, counted=right))
    moved = layer.clone()
    moved[1, 3:] = 100.0
    torch.testing.assert_close(of(moved, counted=right), of(layer, counted=right))
    assert float(of(layer, counted=torch.zeros_like(ALL))) == 0  # nothing to count is no NaN
    labels = torch.full((2, 5), -100)
    labels[:, 3:] = 7
    seen = Seen(None, {"input_ids": labels, "labels": labels}, [moved, *states(1), moved])
    short = Seen(None, {"input_ids": labels[:, :3]}, [one[:, :3] for one in seen.states])
    torch.testing.assert_close(decorrelation(seen, weight=1.0), decorrelation(short, weight=1.0))
    assert float(decorrelation(seen, weight=0.0)) == 0


def test_its_gradient():
    (layer,) = states(1)
    layer.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda one: of(one), (layer,))
    (gradient,) = torch.autograd.grad(of(layer), layer)
    torch.testing.assert_close((gradient * layer).sum(-1), torch.zeros(2, 5, dtype=torch.float64))  # lengths are free
    assert gradient[:, 0].norm() > 0 and gradient[:, 1].norm() > 0


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "vit"])
def test_what_is_seen_is_the_models_own_stream(name):
    model = tiny(name).eval()
    batch = {key: value for key, value in inputs(name).items() if key != "labels"}
    with watching(list(Anatomy(model).block_list)) as seen, torch.no_grad():
        for _ in range(2):  # of the last pass alone
            hidden = model(**batch, output_hidden_states=True).hidden_states
    assert len(seen) == len(Anatomy(model).blocks) + 1
    for ours, theirs in zip(seen[1:-1], hidden[1:-1], strict=True):  # the last of theirs is normed
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs)
    before = list(seen)
    with torch.no_grad():
        model(**batch)
    assert len(seen) == len(before) and all(one is other for one, other in zip(seen, before, strict=True))


def test_adapting_with_it_lowers_it():
    def measured(model):
        with watching(list(Anatomy(model).block_list)) as seen, torch.no_grad():
            model.eval()(input_ids=DATA)
            return float(decorrelation(Seen(model, {"input_ids": DATA}, seen), weight=1.0))

    options = {"lr": 1e-2, "epochs": 3, "batch_size": 4, "device": "cpu"}
    plain, with_it, zero = (tiny("llama") for _ in range(3))
    transect.adapt(plain, "full", DATA, **options)
    outcome = transect.adapt(
        with_it, "full", DATA, penalties=["decorrelation"], settings={"decorrelation": {"weight": 50.0}}, **options
    ).outcome
    transect.adapt(
        zero, "full", DATA, penalties=["decorrelation"], settings={"decorrelation": {"weight": 0.0}}, **options
    )
    assert measured(with_it) < 0.8 * measured(plain)
    assert all(torch.equal(a, b) for a, b in zip(zero.parameters(), plain.parameters(), strict=True))
    assert outcome["settings"]["penalties"] == {"decorrelation": {"weight": 50.0}}
    assert outcome["checks"][0][1] < 10  # the training loss that is told is the model's own


def test_what_does_not_go():
    with pytest.raises(TransectError, match="unknown penalty 'sinks'; known: decorrelation"):
        penalty_named("sinks")
    with pytest.raises(TransectError, match="weight=-1 must be"):
        transect.adapt(
            tiny("llama"), "lora", DATA, penalties="decorrelation", settings={"decorrelation": {"weight": -1}}
        )
    with pytest.raises(TransectError, match="two blocks or more"):
        decorrelation(Seen(None, {"input_ids": DATA}, states(2)))

"""Blocks that are run on some positions of each sequence, or not at all: what is computed, cached, and remembered."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from transect.anatomy import Anatomy
from transect.errors import TransectError
from transect.evaluation.operations import cache_bytes
from transect.parts import BlockPart, Inside, insert
from transect.parts.kept import KeptLayer

from .models import tiny

TOKENS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(1))
NAMES = ["llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "gemma3", "gptj", "cohere"]


class Some(BlockPart):
    """Runs the block where the stream's first channel is above its third: each position by itself."""

    paper, limit, routes = "none", "never", True

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x, inside: Inside):
        return inside.on(x, kept_of(x))


class Either(BlockPart):
    """Skips the block for a whole sequence, by the first of its channels at the first real position."""

    paper, limit, routes = "none", "never", True

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x, inside: Inside):
        real = inside.real()
        first = torch.zeros(len(x), dtype=torch.long) if real is None else real.int().argmax(1)
        state = inside.state if inside.state is not None else {}
        if "runs" not in state:
            state["runs"] = kept_of(x[torch.arange(len(x)), first])
        return inside.on(x, state["runs"][:, None].expand(x.shape[:2]))


class Scaled(BlockPart):
    """Runs the block everywhere, and what its MLP adds counts half."""

    paper, limit, routes = "none", "never", True

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x, inside: Inside):
        kept = torch.ones(x.shape[:2], dtype=torch.bool)
        return inside.on(x, kept, torch.full(x.shape[:2], 0.5))


def kept_of(x):
    return x[..., 0] > x[..., 2]


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for one in (Some, Either, Scaled):
        monkeypatch.setattr(one, "kind", f"block.toy-{one.__name__.lower()}", raising=False)


def routed(name, part="toy-some", layers=None):
    model = tiny(name)
    insert(model, "block", part, layers=layers)
    return model


def by_masks(name, tokens):
    """The model that computes every block everywhere, hides the keys that are not kept, and puts back what came in."""
    model = tiny(name)
    model.set_attn_implementation("eager")
    for block in Anatomy(model).blocks:
        own = block.module.forward

        def forward(x=None, *args, own=own, **kwargs):
            x = kwargs.pop("hidden_states", x)
            kept, place = kept_of(x), "attention_mask"
            if place not in kwargs:
                args = list(args)
                mask = next(n for n, one in enumerate(args) if torch.is_tensor(one) and one.dim() == 4)
                args[mask] = args[mask].masked_fill(~kept[:, None, None], torch.finfo(torch.float32).min)
            else:
                kwargs[place] = kwargs[place].masked_fill(~kept[:, None, None], torch.finfo(torch.float32).min)
            y = own(x, *args, **kwargs)
            whole = y if torch.is_tensor(y) else y[0]
            whole = torch.where(kept[..., None], whole, x)
            return whole if torch.is_tensor(y) else (whole, *y[1:])

        block.module.forward = forward
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_it_is_the_block_with_the_others_hidden(name):
    expected = by_masks(name, TOKENS)
    assert not torch.allclose(expected, tiny(name)(TOKENS).logits, atol=1e-2)
    for implementation in ("sdpa", "eager"):
        model = routed(name)
        if implementation == "sdpa" and not model._supports_sdpa:
            continue
        model.set_attn_implementation(implementation)
        tolerance = dict(atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
        torch.testing.assert_close(model(TOKENS, use_cache=False).logits, expected, **tolerance)
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
            torch.testing.assert_close(in_pieces(model, cache), expected, **tolerance)


def in_pieces(model, cache):
    """Logits of a text that comes in pieces, and no mask with it."""
    return torch.cat([model(one, past_key_values=cache).logits for one in TOKENS.split([5, 1, 2, 1, 3], dim=1)], dim=1)


@pytest.mark.parametrize("layers", [[0], [1], [0, 2]])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.no_grad()
def test_beside_blocks_of_a_static_cache_it_has_their_masks(name, layers):
    """Of which some have a sliding window, of 8 positions."""
    model = routed(name, layers=layers)
    found = in_pieces(model, StaticCache(config=model.config, max_cache_len=16))
    torch.testing.assert_close(found, in_pieces(model, DynamicCache(config=model.config)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("part", ["toy-some", "toy-either"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_each_sequence_comes_out_as_alone_padded_in_front_and_generates(name, part):
    model = routed(name, part)
    mask = torch.ones_like(TOKENS)
    mask[0, :4], mask[2, :1] = 0, 0
    asked = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    together = model.generate(TOKENS, attention_mask=mask, **asked)
    for other in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(together, model.generate(TOKENS, attention_mask=mask, **other, **asked))
    for row, start in enumerate((4, 0, 1)):
        alone = model.generate(TOKENS[row : row + 1, start:], attention_mask=mask[row : row + 1, start:], **asked)
        assert torch.equal(together[row, start:], alone[0])
    beams = dict(asked, num_beams=3, num_return_sequences=2)
    assert torch.equal(*(model.generate(TOKENS, attention_mask=mask, use_cache=use, **beams) for use in (True, False)))


@torch.no_grad()
def test_the_cache_holds_what_was_kept_and_what_is_left_out_is_not_computed():
    model = routed("llama")
    cache = DynamicCache(config=model.config)
    states = model(TOKENS, past_key_values=cache, output_hidden_states=True).hidden_states
    for number, layer in enumerate(cache.layers):
        kept = kept_of(states[number])
        assert isinstance(layer, KeptLayer) and layer.get_seq_length() == 12
        assert layer.keys.shape[2] == int(kept.sum(1).max())
        for row in range(3):
            assert layer.places[row][layer.places[row] >= 0].tolist() == kept[row].nonzero()[:, 0].tolist()
        assert torch.equal(states[number][~kept], states[number + 1][~kept]) or number == 2  # there a norm follows
    dense = DynamicCache(config=model.config)
    tiny("llama")(TOKENS, past_key_values=dense)
    assert cache_bytes(cache) < cache_bytes(dense)
    flops = []
    for one in (model, tiny("llama")):
        with FlopCounterMode(display=False) as counted:
            one(TOKENS[:1], use_cache=False)
        flops.append(counted.get_total_flops())
    assert flops[0] < flops[1]


@torch.no_grad()
def test_a_block_that_no_sequence_runs_is_not_run_and_keeps_nothing():
    model = routed("llama", "toy-either")
    ran = []
    for block in Anatomy(model).blocks:
        block.module.self_attn.register_forward_hook(lambda *_, index=block.index: ran.append(index))
    cache = DynamicCache(config=model.config)
    row = torch.tensor([[12, *TOKENS[0, 1:].tolist()]])
    states = model(row, past_key_values=cache, output_hidden_states=True).hidden_states
    runs = [number for number in range(3) if bool(kept_of(states[number])[0, 0])]
    assert ran == runs and 0 < len(runs) < 3
    for number, layer in enumerate(cache.layers):
        assert layer.is_initialized == (number in runs) and layer.get_seq_length() == 12
    more = model(TOKENS[:1, :2], past_key_values=cache).logits
    whole = model(torch.cat([row, TOKENS[:1, :2]], dim=1), use_cache=False).logits[:, 12:]
    torch.testing.assert_close(more, whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_cache_is_chosen_from_repeated_and_reset():
    model = routed("llama")
    cache = DynamicCache(config=model.config)
    model(TOKENS[:, :8], past_key_values=cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    order = torch.tensor([2, 2, 0, 0])
    found = model(TOKENS[order, 8:], past_key_values=cache).logits
    torch.testing.assert_close(found, model(TOKENS[order]).logits[:, 8:], atol=1e-4, rtol=1e-4)
    with pytest.raises(TransectError, match="cannot be taken back"):
        cache.crop(-1)
    cache.reset()
    torch.testing.assert_close(model(TOKENS, past_key_values=cache).logits, model(TOKENS).logits)


def test_gradients_pass_through_what_was_kept():
    model = routed("llama")
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "opt"])
@torch.no_grad()
def test_what_the_mlp_adds_is_multiplied(name):
    model, dense = routed(name, "toy-scaled"), tiny(name)
    for block in Anatomy(dense).blocks:
        block.branch_output("mlp").register_forward_hook(lambda _, __, out: out * 0.5)
    torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_routed_is_one_error():
    for name in ("bert", "bloom", "vit"):
        model = tiny(name)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(TransectError, match="positions are routed around blocks of causal models"):
            insert(model, "block", "toy-some")
        assert before.keys() == model.state_dict().keys()
    model = tiny("llama")
    insert(model, "mixer", "softmax", layers=[1])
    with pytest.raises(TransectError, match="a part in its place"):
        insert(model, "block", "toy-some")
    model = routed("llama")
    with pytest.raises(TransectError, match="a Cache cannot keep what parts need"):
        model(TOKENS, past_key_values=Cache(layer_class_to_replicate=DynamicLayer))
    full = DynamicCache(config=model.config)
    tiny("llama")(TOKENS, past_key_values=full)
    with pytest.raises(TransectError, match="filled before parts were put"):
        model(TOKENS, past_key_values=full)

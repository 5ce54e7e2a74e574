"""Robust weight signatures: what is orthogonal to what, what is added and taken away, and what few bits lose."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import transect
from tests.models import assert_alike, assert_same_tensors, inputs, logits, tiny
from transect.anatomy import Anatomy
from transect.editing import undo_folder
from transect.errors import BadCheckpoint, TransectError
from transect.merging import read_signature, signature_of, write_signature
from transect.merging.registry import tensors_of
from transect.merging.signature import FILE, bits_of, cosine, rounded, shallow_names


def trained(seed, scale=0.05):
    """What a training of the base could have given."""
    model, generator = tiny("llama"), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
    return model


def numbers(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {"w": scale * torch.randn(12, 9, generator=generator), "b": scale * torch.randn(7, generator=generator)}


def plus(one, other, share=1.0):
    return {name: one[name] + share * other[name] for name in one}


def test_a_signature_is_orthogonal_to_the_clean_update_and_linear_in_the_robust_one():
    base, a, b, c = (numbers(seed) for seed in range(4))
    clean = plus(base, a)
    v, w = (signature_of(base, clean, plus(base, one), base) for one in (b, c))
    both = signature_of(base, clean, plus(plus(base, b, 2.0), c), base)
    for name in base:
        assert abs(torch.nn.functional.cosine_similarity(v[name].flatten(), a[name].flatten(), 0)) < 1e-4
        torch.testing.assert_close(both[name], 2 * v[name] + w[name], rtol=1e-4, atol=1e-5)
        share = (a[name] * b[name]).sum() / a[name].square().sum()  # with the projection it is the robust model again
        torch.testing.assert_close(clean[name] + v[name] + (share - 1) * a[name], base[name] + b[name])
    assert cosine(v, v) == pytest.approx(1) and abs(cosine(v, w)) < 0.5


@pytest.mark.parametrize("times", [0.0, 1.0, -2.5])
def test_no_signature_where_the_robust_update_lies_along_the_clean_one(times):
    base, a = numbers(0), numbers(1)
    for tensor in signature_of(base, plus(base, a), plus(base, a, times), base).values():
        assert tensor.abs().max() < 1e-5


def test_where_the_clean_training_changed_nothing_all_of_the_robust_update_is_kept():
    base, b = numbers(0), numbers(1)
    for name, tensor in signature_of(base, base, plus(base, b), base).items():
        torch.testing.assert_close(tensor, b[name])


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0, 2, 3, 4, 16, 17, 256, 1000, 65536]), st.integers(0, 100), st.integers(1, 40))
def test_few_bits_lose_half_a_step_at_most_and_come_back_as_they_are_used(levels, seed, size):
    from pathlib import Path
    from tempfile import TemporaryDirectory

    generator = torch.Generator().manual_seed(seed)
    values = {"w": torch.randn(size, 3, generator=generator), "same": torch.full((5,), 0.25)}
    used = rounded(values, levels)
    with TemporaryDirectory() as folder:
        write_signature(Path(folder) / FILE, values, levels)
        stored = read_signature(folder)
    for name, tensor in values.items():
        assert torch.equal(stored[name], used[name])
        step = 0 if levels == 0 else float(tensor.max() - tensor.min()) / (levels - 1)
        assert (stored[name] - tensor).abs().max() <= step / 2 + 1e-6


def test_a_file_has_as_many_bits_as_levels_need(tmp_path):
    values = {"w": torch.randn(400, 400)}
    sizes = {}
    for levels in (0, 16, 256, 65536):
        write_signature(tmp_path / FILE, values, levels)
        sizes[levels] = (tmp_path / FILE).stat().st_size
    for levels in (16, 256, 65536):
        assert abs(sizes[levels] - 160_000 * bits_of(levels) / 8) < 1000
    assert sizes[0] > 7.5 * sizes[16]


def test_merging_adds_the_signature_of_the_shallow_blocks_alone(tmp_path):
    base, clean, robust = tiny("llama"), trained(1), trained(2)
    merged = transect.merge([clean, robust], "rws", base=base, depth=0.34, strength=0.5, out=tmp_path / "m")
    kept = shallow_names(Anatomy(clean), 0.34)
    assert {name for name in kept if "layers" in name} == {
        name for name in tensors_of(clean) if name.startswith("model.layers.0.")
    }
    assert "model.embed_tokens.weight" in kept and not {"model.norm.weight", "lm_head.weight"} & set(kept)
    signature = read_signature(tmp_path / "m")
    assert set(signature) == set(kept)
    for name, tensor in tensors_of(merged.model).items():
        before = tensors_of(clean)[name]
        if name in kept:
            torch.testing.assert_close(tensor, before + 0.5 * signature[name])
        else:
            assert torch.equal(tensor, before)


def test_all_tensors_and_no_strength():
    base, clean, robust = tiny("llama"), trained(1), trained(2)
    assert shallow_names(Anatomy(clean), 1.0) == list(tensors_of(clean))
    assert_same_tensors(transect.merge([clean, robust], "rws", base=base, strength=0.0).model, clean)
    assert_same_tensors(transect.merge([clean, clean], "rws", base=base, levels=0, depth=1.0).model, clean)


def test_the_order_of_several_does_not_matter():
    base, clean = tiny("llama"), trained(1)
    others = [trained(2), trained(3)]
    one = transect.merge([clean, *others], "rws", base=base, levels=0).model
    other = transect.merge([clean, *reversed(others)], "rws", base=base, levels=0)
    for name, tensor in tensors_of(one).items():
        torch.testing.assert_close(tensor, tensors_of(other.model)[name])
    assert "cosine of the signatures of models 2 and 3" in other.outcome["told"]


def test_an_edit_adds_it_to_another_model_and_takes_it_back(tmp_path):
    base, clean, robust, target = tiny("llama"), trained(1), trained(2), trained(4)
    transect.merge([clean, robust], "rws", base=base, depth=1.0, out=tmp_path / "m")
    signature = read_signature(tmp_path / "m")
    edited = transect.edit(copy.deepcopy(target), "rws", signature=str(tmp_path / "m"), strength=2.0)
    for name, tensor in tensors_of(edited.model).items():
        torch.testing.assert_close(tensor, tensors_of(target)[name] + 2 * signature[name])
    assert {row["matrix"] for row in edited.journal.changes()} == set(signature)
    edited.save(tmp_path / "edited")
    undo_folder(tmp_path / "edited", tmp_path / "back")
    back = type(target).from_pretrained(tmp_path / "back")
    assert_same_tensors(back, target)  # bit for bit
    away = transect.edit(edited.model, "rws", signature=str(tmp_path / "m"), strength=-2.0)
    for name, tensor in tensors_of(away.model).items():
        torch.testing.assert_close(tensor, tensors_of(target)[name], rtol=0, atol=1e-6)
    assert_alike(logits(away.undo(), inputs("llama")), logits(edited.model, inputs("llama")))


def test_a_strength_of_0_changes_nothing(tmp_path):
    write_signature(tmp_path / FILE, {"model.norm.weight": torch.ones(32)}, 16)
    target = trained(4)
    transect.edit(target, "rws", signature=str(tmp_path / FILE), strength=0)
    assert_same_tensors(target, trained(4))


def test_what_is_no_signature_of_this_model_is_refused(tmp_path):
    target = trained(4)
    write_signature(tmp_path / FILE, {"model.other.weight": torch.ones(3)}, 16)
    with pytest.raises(TransectError, match=r"this one has no tensor model\.other\.weight"):
        transect.edit(target, "rws", signature=str(tmp_path))
    write_signature(tmp_path / FILE, {"model.norm.weight": torch.ones(31)}, 16)
    with pytest.raises(TransectError, match=r"its model\.norm\.weight is \[31\], and this model's \[32\]"):
        transect.edit(target, "rws", signature=str(tmp_path))
    damaged = bytearray((tmp_path / FILE).read_bytes())
    damaged[-1] ^= 1
    (tmp_path / FILE).write_bytes(damaged)
    with pytest.raises(BadCheckpoint, match="not as it was written"):
        transect.edit(target, "rws", signature=str(tmp_path))
    with pytest.raises(BadCheckpoint, match="there is no signature"):
        transect.edit(target, "rws", signature=str(tmp_path / "none"))
    with pytest.raises(TransectError, match="rws: name a signature"):
        transect.edit(target, "rws")
    with pytest.raises(TransectError, match="levels=1 holds nothing"):
        transect.merge([target, target], "rws", base=tiny("llama"), levels=1)
    assert_same_tensors(target, trained(4))

"""Statistics and batches that are read back are what was written, of the same model and data, or are not used."""

import errno
import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import transect
from tests.models import VOCABULARY, tiny
from transect.anatomy import Anatomy
from transect.compression.calibrate import calibrate
from transect.data import Batches
from transect.errors import BadData, TransectError
from transect.statistics import FeatureNorm, InputCovariance, collect

from .faults import Failing

DATA = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(5))
BATCHES = Batches([{"input_ids": DATA}])
BYTES = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def collected(cache, model=None, wanted=(FeatureNorm(power=2),), **more):
    anatomy = Anatomy(model or tiny("llama"))
    return calibrate(anatomy, anatomy.matrices(["q", "down"]), wanted, BATCHES, cache=cache, **more).state()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "statistics.safetensors"
    collected(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def expected():
    return collected(None)


@BYTES
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_damaged_statistics_are_not_used(written, expected, tmp_path, where, bit, cut):
    """And the file is recognised as ours, to be written again, wherever one bit of it has flipped."""
    position = int(where * len(written))
    damaged = bytearray(written[:position] if cut else written)
    if not cut:
        damaged[position] ^= 1 << bit
    cache = tmp_path / "statistics.safetensors"
    cache.write_bytes(bytes(damaged))
    assert same(collected(cache), expected) and same(collected(cache), expected)
    if not cut:
        cache.write_bytes(bytes(damaged))
        transect.compress(tiny("llama"), "svd-llm", 0.7, DATA, cache=cache)


def test_statistics_of_something_else_are_not_used(written, tmp_path, caplog):
    caplog.set_level(logging.INFO, "transect")
    cache = tmp_path / "statistics.safetensors"
    turned = tiny("llama")
    turned.config.rope_parameters["rope_theta"] = 500.0
    others = [{"model": tiny("llama", seed=1)}, {"model": turned}, {"accumulate": torch.float32}, {"seed": 1}]
    for other in others:
        cache.write_bytes(written)
        caplog.clear()
        assert same(collected(cache, **other), collected(None, **other))
        assert "is of something else" in caplog.text
        assert same(collected(cache, **other), collected(None, **other)) and cache.read_bytes() != written


def test_what_is_missing_is_added(written, tmp_path, monkeypatch):
    from transect.compression import calibrate as room

    cache, passes = tmp_path / "statistics.safetensors", []
    monkeypatch.setattr(room, "collect", lambda a, b, wanted, *more, **k: passes.append(wanted) or collect(
        a, b, wanted, *more, **k))  # fmt: skip
    cache.write_bytes(written)
    both = (InputCovariance(), FeatureNorm(power=2))
    expected = collected(None, wanted=both)
    passes.clear()
    for wanted in (both, both, (InputCovariance(),)):
        assert same(collected(cache, wanted=wanted), expected)
    assert passes == [[InputCovariance()]]


def test_nothing_but_statistics_of_ours_is_replaced(written, tmp_path):
    model, cache = tiny("llama"), tmp_path / "cache"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tiny("llama").save_pretrained(tmp_path / "dense")
    transect.compress(tmp_path / "dense", "svd", 0.7, stream_to=tmp_path / "small")
    mine = [b'from transect.statistics import Statistics\nprint("transect.of")\n', b"\0" * 100]
    mine += [next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("dense", "small")]
    for content in mine:
        cache.write_bytes(content)
        with pytest.raises(TransectError, match="holds no statistics that Transect kept; move it away"):
            transect.compress(model, "svd-llm", 0.7, DATA, cache=cache)
        assert cache.read_bytes() == content
    for path, reason in ((tmp_path / "dense", "it is a folder"), (tmp_path / "none" / "cache", "no folder")):
        with pytest.raises(TransectError, match=reason):
            transect.compress(model, "svd-llm", 0.7, DATA, cache=path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for content in (b"", written):  # nothing is lost with these
        cache.write_bytes(content)
        transect.compress(tiny("llama"), "svd-llm", 0.7, DATA, cache=cache)


def test_a_full_disk_is_one_line_and_leaves_the_model_and_the_cache(written, tmp_path):
    cache, model = tmp_path / "statistics.safetensors", tiny("llama")
    cache.write_bytes(written)
    for n in range(2, 5):  # the lock, the file, its name
        with (
            Failing(tmp_path, n, OSError(errno.ENOSPC, "No space left on device")),
            pytest.raises(TransectError, match=r"cannot be kept in .*No space left"),
        ):
            transect.compress(model, "svd-llm", 0.7, DATA, cache=cache)
        assert [path.name for path in tmp_path.iterdir()] == [cache.name] and cache.read_bytes() == written
    assert not Anatomy(model).record


@BYTES
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_batches_are_what_was_written_or_an_error(tmp_path, where, bit, cut):
    ids = torch.arange(12).reshape(2, 6)
    batches = Batches([{"input_ids": ids, "labels": ids}, {"input_ids": ids[:1] + 1}])
    path = tmp_path / "batches.safetensors"
    batches.save(path)
    again = Batches.load(path)
    assert again.fingerprint == batches.fingerprint == Batches.load(path, batches.fingerprint).fingerprint
    with pytest.raises(BadData, match="does not hold the batches"):
        Batches.load(path, BATCHES.fingerprint)
    data = bytearray(path.read_bytes())
    position = int(where * len(data))
    if cut:
        del data[position:]
    else:
        data[position] ^= 1 << bit
    path.write_bytes(bytes(data))
    try:  # where the format's own name has flipped, nothing of ours has
        assert Batches.load(path).fingerprint == batches.fingerprint
    except BadData as error:
        assert "does not hold the batches" in str(error)

"""Every part through the frame: where it stands, what it may see, generation, round trips, bad input."""

import json

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

import transect
from transect.anatomy import Anatomy
from transect.checkpoint import open_model
from transect.cli import main_group
from transect.errors import TransectError
from transect.parts import Around, build_model, insert, part_named, parts
from transect.parts.build import config_of, sized

LENGTH, WIDTH = 32, 32
SIZES = dict(hidden=WIDTH, blocks=2, heads=4, neurons=48, vocabulary=64, length=LENGTH)
SMALL: dict[str, dict] = {  # settings by "slot.name", where the defaults are none for the tiny model
    "block.ia-red2": dict(groups=2, threshold=0.8),
    "mixer.linformer": dict(rank=6), "mixer.nystrom": dict(landmarks=4), "mixer.strided": dict(stride=4),
    "mixer.fixed": dict(stride=4, summary=2), "mixer.longformer": dict(window=3, global_tokens=2),
    "mixer.bigbird": dict(window=2, random=1), "mixer.reformer": dict(window=3, buckets=4),
    "mixer.routing": dict(window=3, clusters=4), "mixer.compressive": dict(segment=4, memory=2, compressed=2, rate=2),
    "mixer.funnel": dict(stride=3), "mixer.transformer-xl": dict(segment=4, memory=2),
    "block.dense2moe-blocks": dict(prompt=4),
    "block.first": dict(prompt=4), "block.gamma-mod": dict(routable=6), "block.p-mod": dict(targets=6),
}  # fmt: skip
ENTRIES = {f"{entry.family}.{entry.name}": entry for entry in parts() if not entry.function.images}
IMAGES_ALONE = {f"{entry.family}.{entry.name}": entry for entry in parts() if entry.function.images}
MIXERS = {kind: entry for kind, entry in ENTRIES.items() if entry.family == "mixer"}
CAUSAL = [kind for kind, entry in MIXERS.items() if "causal" in entry.function.can_be]
BOTH_WAYS = [kind for kind, entry in MIXERS.items() if "bidirectional" in entry.function.can_be]
OTHERS = [kind for kind in ENTRIES if kind not in MIXERS]
TOKENS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
IMAGE_SIZES = dict(hidden=WIDTH, blocks=2, heads=4, neurons=48, image=8, patch=2, channels=1, classes=3)
IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def base_of(kind):
    """A kind of model that the part can stand in."""
    return "vit" if kind in IMAGES_ALONE or (kind in MIXERS and kind not in CAUSAL) else "llama"


def sizes_for(base):
    return IMAGE_SIZES if base == "vit" else {**SIZES, "key_value_heads": 2} if base == "llama" else SIZES


def auto_of(kind):
    return AutoModelForImageClassification if base_of(kind) == "vit" else AutoModelForCausalLM


def read_by(kind):
    return {"input_ids": TOKENS} if base_of(kind) == "llama" else {"pixel_values": IMAGES}


def built(kind, base=None, **more):
    entry, base = (ENTRIES | IMAGES_ALONE)[kind], base or base_of(kind)
    return build_model(
        base, parts={entry.family: entry.name}, settings={entry.name: SMALL.get(kind, {})}, **sizes_for(base) | more
    )


def made(kind, causal=True):
    """The part alone, in float64."""
    slot = built(kind).model.layers[0].self_attn if causal else None
    if slot is not None:
        return slot.part.double().eval()
    sizes = dict(
        width=WIDTH, heads=4, key_value_heads=2, head_size=8, neurons=48, length=LENGTH, causal=False, layer=0,
        layers=2, eps=1e-6,
    )  # fmt: skip
    entry = ENTRIES[kind]
    torch.manual_seed(0)
    part = entry.function(**{name: sizes[name] for name in entry.sizes}, **entry.settings(SMALL.get(kind, {})))
    return part.double().eval()


def stream(seed=0, count=12):
    return torch.randn(2, count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_a_causal_mixer_sees_nothing_behind_it_and_goes_on_position_by_position(kind):
    mixer, x = made(kind), stream()
    y, other = mixer(x, Around()), x.clone()
    other[:, 7:] += 1
    torch.testing.assert_close(mixer(other, Around())[:, :7], y[:, :7])
    state: dict = {}
    steps, at = [], 0
    for count in (5, 1, 1, 3, 2):
        steps.append(mixer(x[:, at : at + count], Around(past=at, state=state)))
        at += count
    torch.testing.assert_close(torch.cat(steps, dim=1), y, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", BOTH_WAYS)
@torch.no_grad()
def test_padding_behind_changes_nothing(kind):
    mixer, x = made(kind, causal=False), stream()
    real = torch.ones(2, 12, dtype=torch.bool)
    real[:, 9:] = False
    other = x.clone()
    other[:, 9:] = 7
    y = mixer(x, Around(real))[:, :9]
    torch.testing.assert_close(mixer(other, Around(real))[:, :9], y)
    torch.testing.assert_close(mixer(x, Around(torch.ones_like(real))), mixer(x, Around()))


@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_padding_in_front_is_not_read(kind):
    mixer, x = made(kind), stream()
    real = torch.ones(2, 12, dtype=torch.bool)
    real[:, :4] = False
    other = x.clone()
    other[:, :4] = 7
    torch.testing.assert_close(mixer(other, Around(real))[:, 4:], mixer(x, Around(real))[:, 4:])


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_it_generates_with_its_cache_as_without_and_comes_back_from_its_folder(kind, base, tmp_path):
    model = built(kind, base)
    for tokens in (TOKENS[:, :6], TOKENS):
        given = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
        with_cache, without = (model.generate(tokens, use_cache=use, **given) for use in (True, False))
        assert torch.equal(with_cache, without)
        assert torch.equal(model.generate(tokens, cache_implementation="static", **given), without)
    beams = model.generate(TOKENS[:, :6], num_beams=2, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert beams.shape == (2, 10)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for (key, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("kind", OTHERS)
def test_another_part_maps_position_by_position_and_comes_back_from_its_folder(kind, tmp_path):
    model = built(kind)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)
    changed = TOKENS.clone()
    changed[:, -1] = 5
    torch.testing.assert_close(model(changed).logits[:, :-1], model(TOKENS).logits[:, :-1])


@pytest.mark.parametrize("kind", ENTRIES)
def test_its_gradients_are_finite_and_half_precision_agrees(kind):
    model, given = built(kind), read_by(kind)
    given["labels"] = TOKENS if "input_ids" in given else torch.tensor([0, 2])
    if getattr(ENTRIES[kind].function, "routes", False):
        model.train()  # decisions have a gradient only there
    loss = model(**given).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = model(**given).loss
    assert float(half) == pytest.approx(float(loss), abs=0.1)


@pytest.mark.parametrize("kind", [kind for kind, entry in ENTRIES.items() if entry.function.roles])
def test_its_matrices_are_matrices_to_every_method(kind, tmp_path):
    model = built(kind)
    roles = ENTRIES[kind].function.roles
    found = {matrix.role for matrix in Anatomy(model).blocks[0].matrices()}
    assert set(roles) <= found
    for role, path in roles.items():
        matrix = next(m for m in Anatomy(model).blocks[0].matrices() if m.role == role)
        assert matrix.path.endswith(path)
    before = Anatomy(model).matrix_bytes()
    if base_of(kind) == "llama":
        transect.compress(model, "svd-llm", keep=0.6, data=TOKENS.repeat(8, 1))
    else:
        transect.compress(model, "svd", keep=0.6)
    assert Anatomy(model).matrix_bytes() < 0.7 * before
    model.save_pretrained(tmp_path / "small")
    assert type(open_model(tmp_path / "small").model) is type(model)  # the folder holds what its record says
    again = auto_of(kind).from_pretrained(tmp_path / "small")
    torch.testing.assert_close(again(**read_by(kind)).logits, model(**read_by(kind)).logits)


@torch.no_grad()
def test_the_slot_adds_nothing_to_softmax_attention():
    dense = build_model("llama", **SIZES, key_value_heads=2)
    model = build_model("llama", **SIZES, key_value_heads=2, parts={"mixer": "softmax"})
    model.load_state_dict(
        {k.replace("self_attn.", "self_attn.part."): tensor for k, tensor in dense.state_dict().items()}
    )
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, atol=1e-6, rtol=1e-5)
    real = mask.bool()
    ours, theirs = (one(TOKENS, attention_mask=mask).logits[real] for one in (model, dense))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    given = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(TOKENS, **given), dense.generate(TOKENS, **given))
    one_layer = build_model("llama", **SIZES, key_value_heads=2)
    insert(one_layer, "mixer", "gated-linear", layers=[1])  # beside softmax attention with its own cache
    a, b = (one_layer.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=u) for u in (0, 1))
    assert torch.equal(a, b)


def test_checkpoints_run_where_transect_is_not_installed(tmp_path, elsewhere):
    """With every part, all in one process."""
    sums = {}
    for kind in ENTRIES | IMAGES_ALONE:
        model = built(kind)
        model.save_pretrained(tmp_path / kind)
        sums[kind] = model(**read_by(kind)).logits.double().sum().item()
    torch.save({kind: read_by(kind) for kind in ENTRIES | IMAGES_ALONE}, tmp_path / "read.pt")
    autos = {kind: auto_of(kind).__name__ for kind in ENTRIES | IMAGES_ALONE}
    code = (
        "import json, torch, transformers\nsys.modules['transect'] = None\n"
        f"read = torch.load({str(tmp_path / 'read.pt')!r})\n"
        f"def total(kind, auto):\n    folder = {str(tmp_path)!r} + '/' + kind\n"
        "    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)\n"
        "    return model(**read[kind]).logits.double().sum().item()\n"
        f"print(json.dumps({{kind: total(kind, auto) for kind, auto in {autos}.items()}}))"
    )
    found = json.loads(elsewhere.python(code).splitlines()[-1])
    assert found == {kind: pytest.approx(total, abs=1e-2) for kind, total in sums.items()}


def test_what_does_not_fit_is_one_error_before_anything_changes():
    model = build_model("llama", **SIZES)
    for call, said in (
        (lambda: insert(model, "mixer", "magic"), "unknown mixer 'magic'; known: .*gated-linear, "),
        (lambda: insert(model, "wheel", "softmax"), "unknown slot 'wheel'; known: mixer"),
        (lambda: insert(model, "mixer", "softmax", layers=[5]), "distinct numbers from 0 to 1"),
        (lambda: insert(model, "mixer", "pooling", settings={"size": 4}), "odd size"),
        (lambda: insert(model, "mixer", "pooling", settings={"sizes": 3}), "no parameter sizes"),
        (lambda: build_model("bert", **SIZES, parts={"mixer": "softmax"}), "norms the stream by itself"),
        (lambda: build_model("magic"), "no kind of model"),
        (lambda: build_model("gpt2", **SIZES, key_value_heads=2), "has no size 'key_value_heads'"),
        (lambda: part_named("mlp", "softmax"), "unknown mlp"),
        (lambda: build_model("llama"), "give hidden and blocks"),
        (lambda: build_model("llama", hidden=2**15, blocks=2**10), "GB are free"),
        (lambda: build_model("llama", **SIZES, parts={"mlp": "kat", "activation": "poly-relu"}), "brings its own"),
        (lambda: insert(built("mlp.none"), "activation", "poly-relu"), "brings its own activation"),
    ):
        with pytest.raises(TransectError, match=said):
            call()
    assert not Anatomy(model).record
    spatial = built("mixer.spatial", length=8)
    with pytest.raises(TransectError, match="8 positions at most"):
        spatial(TOKENS)


def test_what_is_not_given_goes_with_the_width():
    config = build_model("llama", hidden=256, blocks=1, vocabulary=64).config  # the config's: 4096, 32 heads, 11008
    assert (config.num_attention_heads, config.head_dim, config.intermediate_size) == (2, 128, 688)
    assert config.num_key_value_heads == 2


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_a_narrow_model_begins_with_numbers_of_its_width(base):
    """In a width of its own; what the other slots hold of the kind's deviation of 0.02 is for thousands of channels."""
    model = build_model(base, **SIZES)
    blocks = [matrix for block in Anatomy(model).blocks for matrix in block.matrices()]
    for matrix in blocks:
        assert float(matrix.weight.std()) == pytest.approx((3 * matrix.shape[1]) ** -0.5, rel=0.15), matrix.name
    assert float(Anatomy(model).embedding.weight.std()) == pytest.approx(1 if base == "llama" else WIDTH**-0.5, rel=0.1)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (base == "gpt2")


def test_another_kind_of_cache_is_refused_and_one_that_others_filled():
    model, other = built("mixer.gated-linear"), Cache(layer_class_to_replicate=DynamicLayer)
    with pytest.raises(TransectError, match="a Cache cannot keep what parts need"):
        model(TOKENS, past_key_values=other)
    for filled in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        build_model("llama", **SIZES)(TOKENS, past_key_values=filled)
        with pytest.raises(TransectError, match="filled before parts were put"):
            model(TOKENS, past_key_values=filled)


@pytest.mark.parametrize("kind", ENTRIES)
def test_it_is_built_by_command_with_its_options(kind, tmp_path):
    entry = ENTRIES[kind]
    given = {p.name: p.default for p in entry.parameters} | SMALL.get(kind, {})
    options = []
    for key, value in given.items():
        told = str(value).lower() if isinstance(value, bool) else str(value)
        options += [f"--{entry.name}.{key.replace('_', '-')}", told]
    base, sizes = base_of(kind), [text for key, value in SIZES.items() for text in (f"--{key}", str(value))]
    if base == "vit":  # whose sizes are in a file
        sized(config_of(base), IMAGE_SIZES).save_pretrained(tmp_path / "base")
        base, sizes = str(tmp_path / "base"), []
    words = ["build", base, *sizes, f"--{entry.family}", entry.name, *options, "--out", str(tmp_path / "m")]
    words.append("--json")
    result = CliRunner().invoke(main_group, words)
    assert result.exit_code == 0, result.output[-400:]
    model = auto_of(kind).from_pretrained(tmp_path / "m")
    assert json.loads(result.output)["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_built_model_is_trained_and_measured_like_any_other(tmp_path):
    result = CliRunner().invoke(
        main_group,
        ["build", "llama", "--hidden", "32", "--blocks", "2", "--heads", "4", "--neurons", "48", "--length", "64",
         "--tokenizer", "organism", "--mixer", "gated-linear", "--out", str(tmp_path / "m")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output[-400:]
    trained = transect.adapt(
        str(tmp_path / "m"), "full", "organism:calibration", sequences=40, sequence_length=32, lr=1e-2, steps=8,
        batch_size=4, device="cpu",
    )  # fmt: skip
    assert trained.outcome["loss_after"] < trained.outcome["loss_before"] - 0.5

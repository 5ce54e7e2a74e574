"""Every claim through the command line, on a tiny model that knows some facts: a verdict, or why there is none."""

import json

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from transect.anatomy import Anatomy
from transect.checkpoint import save
from transect.claims import Verdict, claims, context, ordering
from transect.claims.catalog import jlcm
from transect.claims.catalog.dmoerm.answers import Sizes
from transect.claims.fact_editing import Bench
from transect.cli import main_group
from transect.compression import Recipe
from transect.forward import recitations
from transect.memory import Settings

WORDS = [*(f"w{number}" for number in range(60)), *"ABCD"]
PROMPT = "w3 w4 {} w5 w6"
# What takes hundreds of steps, rounds or facts, made short: places below `transect.claims`.
SHORT = {
    "catalog.latent_language.latent_language.bilingual.__defaults__": (3,), "catalog.monarch.STEPS": 3,
    "catalog.mole.STEPS": 2, "catalog.feature_neurons.STEPS": 2, "catalog.depth_efficiency.shallower.STEPS": 2,
    "catalog.lazy_neuron.relu_classifier.STEPS": 10, "catalog.localization._FACTS": 5, "catalog.jlcm.BITS": (2,),
    "catalog.constrained_ft.SINGLE": 5, "catalog.constrained_ft._TIMES": (1.0,), "catalog.dsformer.KEEPS": (0.8,),
    "catalog.dmoerm.SIZES": Sizes(8, 4, 4, 1, 4, 1), "catalog.dmoerm.SEEDS": (0,),
    "catalog.tanglenas.SEARCH": 2, "catalog.tanglenas.ALONE": 1, "catalog.tanglenas.SEEDS": (0,),
    "catalog.tanglenas.SPACE": {"hidden": (32, 64), "neurons": (64,), "depth": (1,)},
    "catalog.tscnc.pruned_network.STEPS": 2, "catalog.tscnc.pruned_network.MORE": 2,
    "catalog.tscnc.tscnc.DRAWS": 5, "catalog.tscnc.tscnc.SEEDS": (0, 1),
    "catalog.w_pca.STEPS": 2, "catalog.w_pca.ARCHITECTURES": 3, "catalog.w_pca.SEEDS": (0,),
    "catalog.attention_sinks.STEPS": 2, "catalog.attention_sinks.SHARES": (1.0,), "catalog.farms.STEPS": 2,
    "catalog.dsformer.STEPS": 2, "catalog.dsformer.RATES": (1e-3,),
    "catalog.dsformer.SETTINGS": {"keep": 0.5, "iterations": 1}, "catalog.ofq.STEPS": 2, "catalog.ofq.ANNEALED": 1,
    "catalog.ofq.TUNED": 2,
    "catalog.diffquickfix.FACTS": 4, "catalog.amp._KEEPS": (0.9,), "catalog.amp._DRAWS": 1,
    "catalog.mole.RATES": (3e-3,), "catalog.mole.JUDGED": 16, "catalog.feature_neurons.RATES": (1e-4,),
    "catalog.kfac_edit.RHOS": (0.9, 0.6), "catalog.sret.TESTED": 40, "catalog.causal_trace._FACTS": 6,
    "fact_editing._UNBOUNDED": {"epsilon": 1e9, "steps": 5}, "catalog.ia_red2.PENALTIES": (0.0, 2.0),
    "catalog.farms.SEEDS": (0,), "catalog.svfit.STEPS": 2, "catalog.svfit.RATES": (0.1,), "fact_editing.SINGLE": 5,
    "fact_editing.TOGETHER": 6, "fact_editing.OTHERS": 2, "catalog.mvp.SEEDS": (0,), "catalog.mvp.READ": 64,
    "catalog.mvp.STEPS": 2, "catalog.mvp.TRAINED": 16, "catalog.mvp.TESTED": 4, "catalog.mvp.EPOCHS": 1,
    "catalog.mvp.RATES": (1e-3,),
    "catalog.random_feature_attention.HEADS": 8, "catalog.random_feature_attention.EXAMPLES": 40,
    "catalog.random_feature_attention.TESTED": 20, "catalog.random_feature_attention.SEEDS": (0,),
    "catalog.ecoformer.SIMILAR": 3, "catalog.ecoformer.ANCHORS": 5, "catalog.ecoformer.BITS": 2,
    "catalog.ecoformer.SEEDS": (0,), "catalog.soft.STEPS": 2, "catalog.soft.BATCH": 2, "catalog.soft.TESTED": 4,
    "catalog.soft.RATES": (1e-3,), "catalog.soft.SEEDS": (0,),
    "catalog.faster_lighter_survey.STEPS": 2,
    "catalog.s_kan.STEPS": 4, "catalog.s_kan.SEEDS": (0,), "catalog.s_kan.POINTS": 20,
    "catalog.memoryformer.STEPS": 2, "catalog.memoryformer.SEEDS": (0,), "catalog.ultramem_v2.STEPS": 2,
    "catalog.ultramem_v2.SEEDS": (0,), "catalog.mlp_memory.STEPS": 2,
    "catalog.mlp_memory.SETTINGS": Settings(blocks=1, neighbours=4, epochs=1),
    "catalog.layer_norm.STEPS": 2, "catalog.layer_norm.LAST": 1, "catalog.layer_norm.EXAMPLES": 300,
    "catalog.layer_norm.SEEDS": (0,), "catalog.peri_ln.STEPS": 2, "catalog.peri_ln.SEEDS": (0,),
    "catalog.peri_ln.BLOCKS": 2, "catalog.uat_single_layer.WIDTHS": (4, 8), "catalog.uat_single_layer.SAMPLES": 50,
    "catalog.maestro.STEPS": 2, "catalog.maestro.RATES": (1e-3,), "catalog.pst.STEPS": 2, "catalog.pst.RATES": (1e-3,),
    "catalog.crate.STEPS": 2, "catalog.uoe.STEPS": 2, "catalog.uoe.ACTIVE": (2,), "catalog.dense2moe.STEPS": 2,
    "catalog.dense2moe.ACTIVE": (2, 0),
    "catalog.liger.STEPS": 2,
    "catalog.spikingbrain.STEPS": 2,
    "catalog.spikingbrain.THRESHOLDS": (2.0, 4.0), "catalog.ecoformer.STEPS": 2,
    "catalog.relaxed_recursive.STEPS": 2, "catalog.relaxed_recursive.RANKS": (0, 4),
    "catalog.algoformer.STEPS": 2, "catalog.algoformer.SEEDS": (0,),
    "catalog.algoformer.LONG_STEPS": 2, "catalog.algoformer.LONG_SEEDS": (0,), "catalog.algoformer.TESTED": 16,
    "catalog.sret.STEPS": 2, "catalog.sret.SEEDS": (0,),
    "catalog.first.STEPS": 2, "catalog.first.DRAWS": 1, "catalog.first.SEEDS": (0,),
    "catalog.first.TRAINED": 16, "catalog.first.JUDGED": 8,
    "catalog.first.PENALTIES": (0.0, 1.0), "catalog.p_mod.STEPS": 2,
    "catalog.cola.SETTINGS": {"inputs": 4, "simulations": 4}, "catalog.cola.LEAST": 0,
    "catalog.ia_red2.STEPS": 2, "catalog.ia_red2.TURNS": 3, "catalog.ia_red2.TESTED": 8,
    "catalog.m2mkd.STEPS": 5, "catalog.m2mkd.SETTINGS": {"modules": 2, "width": 16},
    "catalog.matformer.STEPS": 2, "catalog.minimal_transformer.STEPS": 2, "catalog.minimal_transformer.SEEDS": (0,),
    "catalog.kat.STEPS": 2, "catalog.kat.TUNED": 2, "catalog.kat.SEEDS": (0,), "catalog.polycom.STEPS": 2,
    "catalog.polycom.SEEDS": (0,), "catalog.uoe.SEEDS": (0,), "catalog.uoe.TEXT_STEPS": 2, "catalog.uoe.COPY_STEPS": 2,
    "catalog.ultramem_v2.FACT_STEPS": 2, "catalog.ultramem_v2.FACTS": 50, "catalog.ultramem_v2.SIDES": (4, 8),
    "catalog.m2mkd.SEEDS": (0,), "catalog.ia_red2.SEEDS": (0,), "catalog.ia_red2.SWEPT": (2.0,),
    "catalog.multi_level.FIRST": 2,
    "catalog.multi_level.SMALL": 2, "catalog.multi_level.STEPS": 2, "catalog.multi_level.EVERY": 1,
    "catalog.multi_level.SEEDS": (0,),
    "catalog.bigram_subnetworks.STEPS": 3, "catalog.bricks.SETTINGS": {"instances": 40, "length": 8, "sequences": 1},
    "catalog.weight_matching.STEPS": 20, "catalog.weight_matching.WIDTHS": (8, 16),
    "catalog.attention_sae.WEIGHTS": (0.5,), "catalog.attention_sae.TOKENS": 512, "catalog.attention_sae.MATTERS": -1.0,
    "catalog.attention_sae.LEAST": 1,
    "catalog.hftp.STEPS": 2, "catalog.hftp.SEEDS": (0,), "catalog.hftp.SHUFFLES": 10, "catalog.hftp.PERMUTATIONS": 100,
    "catalog.brain_alignment.CHANNELS": 6, "catalog.brain_alignment.PERMUTATIONS": 100,
    "catalog.transformer_programs.SETTINGS": {"samples": 60, "epochs": 1, "hidden": 4},
    "catalog.transformer_programs.LONGER": {}, "catalog.transformer_programs.SEEDS": 1,
    "catalog.model_zoo_phases.SETTINGS": {
        "widths": "4,8", "temperatures": "512,1024", "epochs": 1, "products": 2, "curve_epochs": 1,
    },
    "catalog.weight_matching.LANGUAGE_STEPS": 2, "catalog.weight_matching.POINTS": 5, "catalog.rws.STEPS": 5,
    "catalog.one_layer_knowledge.SETTINGS": {
        "fine_tuned": "2,8,32", "rank": "0,1", "seeds": 1, "subjects": 40, "width": 8, "neurons": 8, "steps": 2,
        "full_steps": 2, "low_rank_steps": 2,
    },
    "catalog.organism_questions.SETTINGS": {"fine_tuned": "1,2", "rank": "0,1", "seeds": 1, "steps": 1, "asked": 4},
}  # fmt: skip
QUICK = {
    "armor": {"rounds": 2}, "cospadi": {"iterations": 1}, "cospadi-shared": {"iterations": 1},
    "dsformer": {"iterations": 1}, "mixed": {"iterations": 1}, "fusegpt": {"epochs": 1}, "jlcm": {"steps": 2},
    "rome": {"steps": 1, "rounds": 1, "contexts": 1}, "memit": {"steps": 1, "contexts": 1},
    "constrained-ft": {"steps": 1},
}  # fmt: skip
MORE = {
    "brain-alignment/planted": 8,
    "brain-alignment/untrained": 8,
    "depth-efficiency/cross-model": 70,
    "mole/conflicting-tasks": 12,
    "nuclear-norm/ranks-as-exact": 10,
}  # sequences
# Why some say nothing of this model: a random one has no heads that copy, and learns no language in three steps.
NOT_HERE = {
    "attention-sinks/decorrelation": "No sinks behind the first token were found",
    "cd-t/copying-heads": "no head of this model attends to what came behind",
    "factual-recall/function-application": "no head that lowers the metric",
    "hftp/analogous": "this tokenizer has 0 as one token",
    "hftp/rhythm": "this tokenizer has 0 as one token",
    "kfac-edit/what-suffers": "are those of the bundled model",
    "latent-language/dimensions": "nothing tells them apart",  # its words are unknown here
    "latent-language/dominant": "did not learn to translate",
    "talking-heads/induction": "no head of this model looks one token back",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, its tokenizer, a text, and facts and passages that it knows."""
    folder = tmp_path_factory.mktemp("claims")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for matrix in Anatomy(model).matrices(["v", "o"]):  # let the answer depend on more than the last word
            matrix.write(matrix.weight * 4)
    save(model, folder / "model", tokenizer)

    def said(prompts, tokens):
        asked = [(torch.tensor(tokenizer(prompt)["input_ids"]), torch.zeros(tokens)) for prompt in prompts]
        return [tokenizer.decode(answer) for answer in recitations(model, asked)]

    subjects = [f"w{number} w{number + 20}" for number in range(8, 32)]
    answers = said([PROMPT.replace("{}", subject) for subject in subjects], 1)
    near = [PROMPT.replace("{}", f"w{number + 1} w{number + 2}") for number in range(8, 32)]
    facts = [
        {"prompt": PROMPT, "subject": subject, "answer": answer, "new_answer": WORDS[(WORDS.index(answer) + 7) % 60],
         "paraphrases": [f"w9 w4 {subject} w5 w6"], "neighbours": [{"prompt": other, "answer": beside}]}
        for subject, answer, other, beside in zip(subjects, answers, near, said(near, 1), strict=True)
    ]  # fmt: skip
    choices = [
        {"question": f"w{3 + i} w{4 + i}", "options": [f"w{10 + i + j}" for j in range(4)], "answer": i % 4,
         "template": "{question} {options} w9"}
        for i in range(8)
    ]  # fmt: skip
    prompts = [f"w{3 + i} w{9 + i} w{4 + i} w{30 + i}" for i in range(6)]
    passages = [{"prompt": prompt, "answer": text} for prompt, text in zip(prompts, said(prompts, 8), strict=True)]
    for name, entries in (("facts", facts), ("choices", choices), ("passages", passages)):
        (folder / f"{name}.json").write_text(json.dumps(entries))
    (folder / "text.txt").write_text(" ".join(WORDS[(i * 7 + i * i // 5) % 60] for i in range(1200)))
    return folder


@pytest.fixture(scope="module")
def quick():
    """Methods, edits and what claims train are short, and of the budgets of a claim the first is measured."""

    def recipe(method, keep, allocation=None, settings=None, **more):
        return Recipe(method, keep, allocation, {**QUICK.get(method, {}), **(settings or {})}, **more)

    def edited(self, name, facts, others=(), **settings):
        return edits(self, name, facts, others, **{**settings, **QUICK[name]})

    def with_bits(context, way, bits, settings):
        return rounds(context, way, bits, {**settings, **QUICK["jlcm"]} if settings else settings)

    def ordered_at(context, keeps, *pairs, **more):
        return orders(context, keeps[:1], *pairs, **more)

    edits, rounds, orders = Bench.edited, jlcm.with_bits, ordering.ordered_at
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT.items():
            patch.setattr(f"transect.claims.{name}", value)
        patch.setattr(context, "Recipe", recipe)
        patch.setattr(Bench, "edited", edited)
        patch.setattr(jlcm, "with_bits", with_bits)
        patch.setattr(ordering, "ordered_at", ordered_at)
        yield


@pytest.fixture(scope="module")
def outcomes(request, place, quick):
    """Name -> outcome of every claim that is asked for: in one run, in which they share what they compute, but for
    those that need more sequences."""
    asked = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    data = [word for option in ("facts", "choices", "passages") for word in (f"--{option}", f"{place / option}.json")]
    text = ["--data", f"{place / 'text.txt'}", "--eval", f"{place / 'text.txt'}"]
    few = [name for name in asked if name not in MORE]
    found = {}
    for names, count in [(few, 4), *(([name], count) for name, count in MORE.items() if name in asked)]:
        if not names:
            continue
        sizes = ["--sequences", str(count), "--eval-sequences", str(count), "--sequence-length", "16"]
        words = ["claims", *names, "--model", f"{place / 'model'}", *text, *data, *sizes, "--json"]
        said = CliRunner().invoke(main_group, words)
        assert said.stdout, said.exception
        found |= {outcome["name"]: outcome for outcome in json.loads(said.stdout)}
    return found


@pytest.mark.parametrize("name", [claim.name for claim in claims()])
def test_every_claim(name, outcomes):
    outcome = outcomes[name]
    assert outcome["verdict"] != Verdict.FAILED, outcome
    assert outcome["explanation"] and "\n" not in outcome["explanation"]
    if name in NOT_HERE:
        assert outcome["verdict"] == Verdict.NOT_APPLICABLE and NOT_HERE[name] in outcome["explanation"]
    else:
        assert outcome["verdict"] != Verdict.NOT_APPLICABLE and outcome["numbers"], outcome

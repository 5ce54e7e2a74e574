"""m2mKD: a mixture of experts of another width and depth learns module by module from a trained model (Lo et al. 2024,
arXiv:2402.16918).

Two models are chains of N modules. Every module of the student is trained in the place of the teacher's, within a thin
host that all share, and then all are put together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from ...anatomy import Anatomy
from ...errors import TransectError
from ...forward import feeds_of, inputs_of, put_out, run_block, to_device
from ...forward.objective import IGNORED, targets_of
from ...parts.insert import sizes_of
from ..registry import Calibration, Range, conversion
from ..stage import Loss, Stage

KEPT = "_host"  # under which a student keeps its host until the training begins
SHARES = (0.2, 0.4)  # of the steps: the host's, all modules' together; the others are end to end


class Host(nn.Module):
    """The thin model M, whose embedding, final norm and head are the teacher's, and the stitches.

    meta: a block for each module, at first the first block of the teacher's (our simplification). pre, post: norm and
    linear map from the teacher's width to the student's, and back; module 0 has no pre, the last one no post.
    firsts: number in the teacher of each module's first block, and of all blocks behind the last.
    """

    def __init__(self, blocks: Sequence[nn.Module], firsts: Sequence[int], width: int, inner: int) -> None:
        super().__init__()
        self.firsts = tuple(firsts)
        self.meta = nn.ModuleList(copy.deepcopy(blocks[first]) for first in firsts[:-1])
        self.pre = nn.ModuleList([nn.Identity(), *(_stitch(width, inner) for _ in firsts[2:])])
        self.post = nn.ModuleList([*(_stitch(inner, width) for _ in firsts[2:]), nn.Identity()])


def _stitch(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, outputs))


class Hybrids:
    """One batch through the host with one module in the place of another; see the paper's section 3.

    Functions of the stream at the interfaces (B x T x d), and of the batch: logits (B x T x V).
    """

    def __init__(self, teacher: Any, student: Any, host: Host, batch: Any) -> None:
        self.teacher, self.student, self.host = Anatomy(teacher), Anatomy(student), host
        self.batch = to_device(batch, teacher.device)
        self.feed = feeds_of(self.teacher, [self.batch])[0]

    def before(self, module: int) -> Tensor:
        """z: what the host's blocks leave in front of a module."""
        return self._through_host(self.feed.hidden, range(module))

    def behind(self, module: int, hidden: Tensor) -> Tensor:
        """Logits of what a module left: the host's blocks behind it, and the teacher's head."""
        hidden = self._through_host(hidden, range(module + 1, len(self.host.meta)))
        return self._head(self.teacher, hidden)

    def of_host(self) -> Tensor:
        """The host's own logits."""
        return self.behind(-1, self.feed.hidden)

    def of_teacher(self, module: int) -> Tensor:
        """t: with the teacher's module."""
        hidden = self.before(module)
        for number in range(*self.host.firsts[module : module + 2]):
            hidden = run_block(self.teacher.block_list[number], hidden, self.feed.calls[number])
        return self.behind(module, hidden)

    def of_student(self, module: int) -> Tensor:
        """s: with the student's module between its stitches. The first one embeds, the last one has its own head."""
        last, blocks = len(self.host.meta) - 1, self.student.block_list
        each = len(blocks) // (last + 1)
        if module:
            with torch.no_grad():
                hidden = self.before(module)
            hidden = self.host.pre[module](hidden)
        else:
            hidden = self.student.model.get_input_embeddings()(self.batch["input_ids"])
        calls = feeds_of(self.student, [self.batch])[0].calls
        for number in range(module * each, (module + 1) * each):
            hidden = run_block(blocks[number], hidden, calls[number])
        if module == last:
            return self._head(self.student, hidden)
        return self.behind(module, self.host.post[module](hidden))

    def _through_host(self, hidden: Tensor, modules: Iterable[int]) -> Tensor:
        for module in modules:
            hidden = run_block(self.host.meta[module], hidden, self.feed.calls[self.host.firsts[module]])
        return hidden

    def _head(self, anatomy: Anatomy, hidden: Tensor) -> Tensor:
        with put_out(anatomy, hidden):
            return anatomy.model(**inputs_of(anatomy.model, self.batch)).logits


def distilled(
    student: Tensor, teacher: Tensor, targets: Tensor, alpha: float, temperature: float, divide: str
) -> Tensor:
    """(1 - a) CE(s, targets) + a tau² KL(softmax(t / tau) || softmax(s / tau)), summed over n rows of logits (n x V).

    divide: classes divides the KL by V, as the released code does; rows does not.
    """
    hard = functional.cross_entropy(student.float(), targets, reduction="sum")
    ours, theirs = ((logits.float() / temperature).log_softmax(-1) for logits in (student, teacher))
    soft = functional.kl_div(ours, theirs, reduction="sum", log_target=True)
    return (1 - alpha) * hard + alpha * temperature**2 * soft / (student.shape[-1] if divide == "classes" else 1)


def _counted(hybrids: Hybrids) -> tuple[Tensor, Tensor]:
    """Which positions predict something (B x T), and what (n)."""
    targets = targets_of(hybrids.teacher.model, hybrids.batch)
    return targets != IGNORED, targets[targets != IGNORED]


def _loss_of_host(model: Any, teacher: Any, batch: Any) -> tuple[Tensor, float]:
    hybrids = Hybrids(teacher, model, model.host, batch)
    counted, targets = _counted(hybrids)
    loss = functional.cross_entropy(hybrids.of_host()[counted].float(), targets, reduction="sum")
    return loss, float(len(targets))


def _loss_of_module(module: int, alpha: float, temperature: float, divide: str) -> Loss:
    def loss(model: Any, teacher: Any, batch: Any) -> tuple[Tensor, float]:
        hybrids = Hybrids(teacher, model, model.host, batch)
        counted, targets = _counted(hybrids)
        with torch.no_grad():
            theirs = hybrids.of_teacher(module)[counted]
        ours = hybrids.of_student(module)[counted]
        return distilled(ours, theirs, targets, alpha, temperature, divide), float(len(targets))

    return loss


def _hosted(anatomy: Anatomy) -> None:
    """The host joins the student, for its parameters to be trained."""
    model = anatomy.model
    if KEPT in model.__dict__:
        model.host = model.__dict__.pop(KEPT)
    model.requires_grad_(False)


def _alone(anatomy: Anatomy) -> None:
    """The host and its stitches go."""
    anatomy.model.requires_grad_(False)
    del anatomy.model.host


def _of_module(module: int, modules: int, depth: int) -> str:
    """The names of what a module's turn trains."""
    blocks = "|".join(str(number) for number in range(module * depth, (module + 1) * depth))
    names = [rf"^model\.layers\.({blocks})\.", rf"^host\.(pre|post)\.{module}\."]
    names += [r"^model\.embed_tokens\."] if module == 0 else []
    names += [r"^model\.norm\.", r"^lm_head\."] if module == modules - 1 else []
    return "|".join(names)


def _stages(modules: int, depth: int, alpha: float, temperature: float, divide: str, **others: Any) -> list[Stage]:
    def stage(name: str, new: str, share: float, begin: Callable[[Anatomy], None], loss: Loss | None) -> Stage:
        return Stage(
            name, train="new", new=new, lr=5e-4, share=share, begin=begin, loss=loss, judged=loss,
            teacher=loss is not None,
        )  # fmt: skip

    host, each = SHARES[0], SHARES[1] / modules
    turns = [
        stage(
            f"module {number}", _of_module(number, modules, depth), each, _hosted,
            _loss_of_module(number, alpha, temperature, divide),
        )
        for number in range(modules)
    ]  # fmt: skip
    end = stage("end to end", r"^(model|lm_head)\.", 1 - sum(SHARES), _alone, None)
    return [stage("host", r"^host\.meta\.", host, _hosted, _loss_of_host), *turns, end]


def _sizes(anatomy: Anatomy, width: int) -> tuple[int, int]:
    """Width and heads of the student."""
    sizes = sizes_of(anatomy)
    width = width or sizes.width
    return width, next((heads for heads in range(sizes.heads, 0, -1) if width % (2 * heads) == 0), 0)


def _check(anatomy: Anatomy, modules: int, width: int, experts: int, chosen: int, **others: Any) -> None:
    blocks = len(anatomy.blocks)
    if modules > blocks:
        raise TransectError(f"modules={modules} cannot be cut from {blocks} blocks: choose at most {blocks}")
    if chosen > experts:
        raise TransectError(f"chosen={chosen} of {experts} experts cannot be: choose fewer, or more experts")
    if _sizes(anatomy, width)[1] == 0:
        raise TransectError(f"width={width} should be an even number, since half of a head's channels turn")
    if anatomy.record:
        raise TransectError("m2mkd cuts a plain model into modules, and this one was changed: take it as it was")


@conversion(
    "m2mkd",
    paper="arXiv:2402.16918",
    group="experts",
    exact="nothing: the student begins with random numbers, and what it knows comes from the training",
    check=_check,
    stages=_stages,
)
def m2mkd(
    anatomy: Anatomy, calibration: Calibration, *,
    modules: Annotated[int, Range(1, 64)] = 3, depth: Annotated[int, Range(1, 64)] = 1,
    width: Annotated[int, Range(0, 2**16)] = 0, experts: Annotated[int, Range(1, 256)] = 4,
    chosen: Annotated[int, Range(1, 256)] = 1, alpha: Annotated[float, Range(0, 1)] = 0.5,
    temperature: Annotated[float, Range(0, 100, above=True)] = 1.0,
    divide: Literal["classes", "rows"] = "classes",
) -> Any:  # fmt: skip
    """A new mixture of experts (Mixtral's blocks) learns from the model, each module in the place of the model's.

    First the host, a thin model of one block a module, is trained on the text; then each module of the student between
    stitches within it, to say what the host says with the teacher's module and what the text says; then the student
    alone, end to end. The stitches are dropped: right after the modules' turns its loss is near chance. Kept, as the
    paper may have it too, they would make it a model that nothing else can load; a claim measures what that costs.
    Published for images; here for text, with the host made of the model itself, whose head it keeps.

    modules: into which both are cut, by depth; the model's as equal as can be.
    depth: blocks of each of the student's modules.
    width: of the student's stream; 0 is the model's.
    experts: MLPs of each block, of twice the width.
    chosen: of these for each token.
    alpha: weight of the model's predictions (a); 0 trains modules with the text alone, 1 with no text.
    temperature: of both predictions (tau).
    divide: the divergence by the number of classes, as the released code does, or only by that of rows.
    """
    model, sizes = anatomy.model, sizes_of(anatomy)
    inner, heads = _sizes(anatomy, width)
    config = AutoConfig.for_model(
        "mixtral", vocab_size=model.get_input_embeddings().weight.shape[0], hidden_size=inner,
        intermediate_size=2 * inner, num_hidden_layers=modules * depth, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=inner // heads, num_local_experts=experts, num_experts_per_tok=chosen,
        max_position_embeddings=sizes.length or 2048, tie_word_embeddings=False, sliding_window=None,
        **{f"{name}_token_id": getattr(anatomy.config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(calibration.seed)
        student = AutoModelForCausalLM.from_config(config).to(model.device, model.dtype).eval()
        if calibration.data is not None:
            firsts = [module * len(anatomy.blocks) // modules for module in range(modules + 1)]
            host = Host(list(anatomy.block_list), firsts, sizes.width, inner)
            student.__dict__[KEPT] = host.to(model.device, model.dtype).eval()
    return student

"""One pass over the data that collects all the statistics that anybody asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, Block, ExpertMatrix, Experts, Matrix, experts_apart
from ..errors import BadData
from ..forward.blocks import stopping_behind
from ..forward.head import backpropagate
from ..forward.mode import at_rest
from ..forward.objective import Batch, Task, run_body, summed_loss, task_of
from ..forward.wide import computing_wide
from .kinds import Statistic, Trace
from .store import Statistics

Fisher = Literal["empirical", "sampled"]
Progress = Callable[[Iterable[Any], str], Iterable[Any]]
_BEHIND = 1 << 28  # numbers that a pass may leave behind for the way back: 1 GB in float32


def key_of(matrix: Matrix, statistic: Statistic) -> str:
    """Under which name a matrix's statistic is kept: that of its input where matrices share it, else its own."""
    return matrix.source if statistic.shared else matrix.name


def collected_at(matrix: Matrix, statistic: Statistic) -> bool:
    """Whether the statistic is one of this matrix."""
    return statistic.roles is None or matrix.role in statistic.roles


class Recorder:
    """Hooks that feed the statistics of some matrices and blocks while the model runs. Use with `with`.

    A matrix of an expert sees the positions that the router sends there, each at its place in its sequence.
    matrices, blocks: where to listen. wanted: what to collect at each. store: where the sums go.
    task: of the model; the positions of an image or a labelled text are not trimmed.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        wanted: Iterable[Statistic],
        store: Statistics,
        task: Task,
        blocks: Sequence[Block] = (),
    ) -> None:
        self.trims = task != "classification"
        self.store = store
        self.wanted = list(dict.fromkeys(wanted))
        self.matrices = matrices
        self.blocks = blocks
        self.batch_size = 1
        self.mask: Tensor | None = None
        self._handles: list[Any] = []
        self._stack = ExitStack()
        self._routed: dict[str, Tensor] = {}  # by the path of the experts: which ones each position is sent to (N x k)

    @property
    def last_block(self) -> int:
        """The last block that anything is listened to in; -1 if there is none."""
        kinds = {statistic.needs for statistic in self.wanted}
        listened = [block.index for block in self.blocks if "block" in kinds]
        for matrix in self.matrices:
            routed = "routing" in kinds and isinstance(matrix, ExpertMatrix)
            if routed or any(s.needs not in ("block", "routing") and collected_at(matrix, s) for s in self.wanted):
                listened.append(matrix.block.index)
        return max(listened, default=-1)

    def begin_batch(self, batch_size: int, mask: Tensor | None) -> None:
        """Say how many examples the next forward pass has, and which positions (B, T) count (None: all)."""
        self.batch_size, self.mask = batch_size, None if mask is None or bool(mask.all()) else mask.bool()

    def __enter__(self) -> Recorder:
        if any(statistic.needs not in ("block", "routing") for statistic in self.wanted):
            self._stack.enter_context(experts_apart(self.matrices))
        by_module: dict[int, tuple[nn.Module, list[Matrix]]] = {}
        for matrix in self.matrices:
            by_module.setdefault(id(matrix.module), (matrix.module, []))[1].append(matrix)
        claimed: set[tuple[str, Statistic]] = set()  # an input that several matrices share is listened to once
        for module, matrices in by_module.values():
            inputs = []
            for matrix in matrices:
                for statistic in self.wanted:
                    key = (key_of(matrix, statistic), statistic)
                    listens = statistic.needs in ("input", "matrix") and collected_at(matrix, statistic)
                    if listens and key not in claimed:
                        claimed.add(key)
                        inputs.append((statistic, self.store.sums(*key, matrix.shape, module), matrix))
            gradients = [
                (statistic, self.store.sums(key_of(matrix, statistic), statistic, matrix.shape, module), matrix.rows())
                for matrix in matrices
                for statistic in self.wanted
                if statistic.needs in ("gradient", "both") and collected_at(matrix, statistic)
            ]
            if inputs or gradients:
                expert = matrices[0] if isinstance(matrices[0], ExpertMatrix) else None
                self._handles.append(module.register_forward_hook(self._matrix_hook(inputs, gradients, expert)))
        for path, (host, members) in self._expert_hosts().items():
            self._handles.append(host.register_forward_pre_hook(self._routing_hook(path, members), with_kwargs=True))
        for block in self.blocks:
            similar = [
                (statistic, self.store.sums(f"blocks.{block.index}", statistic, (0, 0), block.module))
                for statistic in self.wanted
                if statistic.needs == "block" and not (statistic.sublayers and block.post_norm)
            ]
            if similar:
                self._listen_to_block(block, similar)
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._routed.clear()
        self._stack.close()

    def _sequences(self, x: Tensor) -> Tensor:
        """(B, T, d); some models (OPT) flatten batch and positions before the MLP."""
        return x.detach().reshape(self.batch_size, -1, x.shape[-1])

    def _expert_hosts(self) -> dict[str, tuple[nn.Module, list[ExpertMatrix]]]:
        """By path, the modules that hold experts, each with those of its matrices that are listened to."""
        hosts: dict[str, tuple[nn.Module, list[ExpertMatrix]]] = {}
        for matrix in self.matrices:
            if isinstance(matrix, ExpertMatrix):
                hosts.setdefault(matrix.path, (matrix.host, []))[1].append(matrix)
        return hosts

    def _routing_hook(self, path: str, members: list[ExpertMatrix]) -> Callable:
        """Notes where an experts module sends each position, before it runs."""
        loads: list[tuple[Any, Any]] = [
            (statistic, self.store.sums(mixture.name, statistic, (len(mixture.experts), 0), mixture.host))
            for mixture in [Experts(members[0].block)]
            for statistic in self.wanted
            if statistic.needs == "routing"
        ]
        of_examples: list[tuple[ExpertMatrix, Any, Any]] = [
            (matrix, statistic, self.store.sums(key_of(matrix, statistic), statistic, matrix.shape, matrix.module))
            for matrix in members
            for statistic in self.wanted
            if statistic.needs == "both" and collected_at(matrix, statistic)
        ]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            self._routed[path] = index
            for statistic, sums in loads:
                weights = kwargs["top_k_weights"] if "top_k_weights" in kwargs else args[2]
                statistic.update(sums, self._sequences(index), self._sequences(weights), self.mask)
            if not of_examples or not torch.is_grad_enabled():
                return
            reached = set(index.unique().tolist())
            for matrix, statistic, sums in of_examples:
                if matrix.expert not in reached:  # no hook will say that these examples have no gradient there
                    d_out, d_in = matrix.shape
                    nothing = torch.zeros(self.batch_size, 1, max(d_out, d_in), device=index.device)
                    statistic.update(sums, nothing[..., :d_in], nothing[..., :d_out], None)

        return hook

    def _placed(self, x: Tensor, routed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x as sequences (B, T, d), and which positions count (B, T).

        routed: for an expert's input or gradient, which positions it has been sent, by which of their choices (N x k).
        """
        if routed is None:
            return self._sequences(x), self.mask
        whole = x.new_zeros(len(routed), x.shape[-1])
        whole[torch.where(routed)[0]] = x.detach()
        reached = routed.any(-1).view(self.batch_size, -1)
        return self._sequences(whole), reached if self.mask is None else reached & self.mask

    def _matrix_hook(self, inputs: list, gradients: list, expert: ExpertMatrix | None) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            routed = None if expert is None else self._routed[expert.path] == expert.expert
            x, mask = self._placed(args[0], routed)
            for statistic, sums, matrix in inputs:
                more = (matrix.weight, matrix.block.head_size) if statistic.needs == "matrix" else ()
                statistic.update(sums, x, mask, *more)
            if not gradients or not output.requires_grad:
                return

            def on_gradient(gradient: Tensor) -> None:
                g, _ = self._placed(gradient, routed)
                for statistic, sums, rows in gradients:
                    part = g if rows is None else g[..., rows]
                    if statistic.needs == "both":
                        statistic.update(sums, x, part, mask)
                    else:
                        statistic.update(sums, part, self.mask, self.trims, None if routed is None else mask)

            output.register_hook(on_gradient)

        return hook

    def _listen_to_block(self, block: Block, similar: list) -> None:
        added: dict[str, Tensor] = {}  # by each sublayer, in the pass that is under way

        def keep(unit: str) -> Callable:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                output = output[0] if isinstance(output, tuple) else output
                # A product is a tensor of its own: some models (Falcon) add to what they are given in place.
                added[unit] = self._sequences(output * block.residual_multiplier)

            return hook

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            after = output[0] if isinstance(output, tuple) else output
            trace = Trace(
                self._sequences(before), self._sequences(after), added.get("attention"), added.get("mlp"),
                block.parallel,
            )  # fmt: skip
            for statistic, sums in similar:
                statistic.update(sums, trace, self.mask)
            added.clear()

        for unit in ("attention", "mlp"):
            branch = block.branch_output(unit)
            if branch is not None:
                self._handles.append(branch.register_forward_hook(keep(unit)))
        self._handles.append(block.module.register_forward_hook(hook, with_kwargs=True))


def parts_for_gradients(anatomy: Anatomy, batch: Batch) -> list[Batch]:
    """A batch of text as some of its sequences at a time, so few that a pass leaves behind no more than `_BEHIND`.

    Never less than one sequence. Of other batches it is not known what belongs to an example: they stay whole.
    """
    rows, *others = batch.values()
    if "input_ids" not in batch or any(len(other) != len(rows) for other in others):
        return [batch]
    most = max(1, int(_BEHIND // (numbers_behind(anatomy.matrices()) * batch["input_ids"].shape[1])))
    parts = zip(*(tensor.split(most) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


def numbers_behind(matrices: Sequence[Matrix]) -> int:
    """How many numbers, about, a pass leaves behind for the way back, for each position.

    The inputs and outputs of the matrices, and about as much again for what lies between.
    """
    return 2 * sum(sum(matrix.shape) for matrix in matrices)


@contextmanager
def gradients_from(start: nn.Module) -> Iterator[None]:
    """Inside the `with`, gradients flow back as far as the output of `start`, in a model whose parameters ask for none.

    So no weight gradient is computed.
    """
    handle = start.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()


def loss_for_gradients(model: Any, fisher: Fisher, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Of logits and labels, the loss whose gradients the statistics are of; see `collect`."""
    generator = torch.Generator().manual_seed(seed)
    if task_of(model) == "embedding":
        return partial(_error_of_drawn_states, generator=generator)
    return partial(_cross_entropy, fisher=fisher, generator=generator)


def _cross_entropy(logits: Tensor, labels: Tensor, fisher: Fisher, generator: torch.Generator) -> Tensor:
    """Summed, against the labels ("empirical") or against labels drawn from the model ("sampled")."""
    if fisher == "sampled":
        probabilities = logits.detach().float().softmax(-1).cpu()
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
    return summed_loss(logits, labels)


def _error_of_drawn_states(states: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Summed relative squared error of hidden states (n x d) against states drawn around them.

    At the model's own states the error and its gradient are 0. It is the negative logarithm of a normal density with
    variance |t|²/2, and states drawn from that have gradients whose second moments are the error's curvature.
    """
    own = states.detach().float()
    drawn = torch.randn(own.shape, generator=generator).to(own.device)
    norms = own.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny ** 0.5)
    return ((states.float() - own) / norms - drawn / 2**0.5).square().sum()


def collect(
    anatomy: Anatomy,
    batches: Iterable[Batch],
    wanted: Iterable[Statistic],
    matrices: Sequence[Matrix] | None = None,
    *,
    fisher: Fisher = "empirical",
    accumulate: torch.dtype = torch.float64,
    seed: int = 0,
    progress: Progress | None = None,
) -> Statistics:
    """Collect statistics in one forward pass over the batches, and one backward pass if any needs gradients.

    Without gradients no head runs, and no block behind the last one that anything is collected in. With them a batch
    goes through in parts where it is so large that what it leaves behind for the way back would fill the memory.

    anatomy: the model; its weights, mode and hooks are as before afterwards, also after an error.
    batches: see `objective`; padding (attention_mask 0) does not count.
    wanted: any of `kinds`; duplicates are collected once. matrices: default all of every block.
    fisher: gradients of the loss against the labels ("empirical") or against labels that the model samples ("sampled",
        the true Fisher in expectation). Of a model without a head they are always against drawn hidden states, since
        its own are without error.
    accumulate: dtype of the sums. float64 (default) adds each batch's float32 product exactly enough for any number
        of batches; float32 halves the memory.
    Under an initialised torch.distributed each process takes every world_size-th batch, and all end with the total.
    """
    model = anatomy.model
    matrices = anatomy.matrices() if matrices is None else matrices
    wanted = list(wanted)
    gradients = any(statistic.needs in ("gradient", "both") for statistic in wanted)
    store = Statistics(accumulate)
    loss = loss_for_gradients(model, fisher, seed)
    batches = list(batches)
    if not batches:
        raise BadData("no calibration data: the statistics need at least one sequence")
    mine = batches
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        mine = batches[torch.distributed.get_rank() :: torch.distributed.get_world_size()]

    recording = Recorder(matrices, wanted, store, task_of(model), anatomy.blocks)
    with at_rest(model, frozen=True), computing_wide(model), recording as recorder:
        for batch in progress(mine, "statistics") if progress else mine:
            for part in parts_for_gradients(anatomy, batch) if gradients else [batch]:
                mask = part.get("attention_mask")
                recorder.begin_batch(len(next(iter(part.values()))), None if mask is None else mask.to(model.device))
                if gradients:
                    with gradients_from(anatomy.embedding):
                        backpropagate(model, part, loss)
                else:
                    with torch.no_grad(), stopping_behind(anatomy, recorder.last_block):
                        run_body(model, part)
    if mine is not batches:
        store.all_reduce()
    store.check_finite()
    return store

"""One pass over the data that collects all the statistics that anybody asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, Block, Matrix
from ..errors import BadData
from ..forward.objective import Batch, Task, predictions, summed_loss, task_of
from .kinds import Statistic, Trace
from .store import Statistics

Fisher = Literal["empirical", "sampled"]
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def key_of(matrix: Matrix, statistic: Statistic) -> str:
    """Under which name a matrix's statistic is kept: that of its input where matrices share it, else its own."""
    return matrix.source if statistic.shared else matrix.name


def collected_at(matrix: Matrix, statistic: Statistic) -> bool:
    """Whether the statistic is one of this matrix."""
    return statistic.roles is None or matrix.role in statistic.roles


class Recorder:
    """Hooks that feed the statistics of some matrices and blocks while the model runs. Use with `with`.

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

    def begin_batch(self, batch_size: int, mask: Tensor | None) -> None:
        """Say how many examples the next forward pass has, and which positions (B, T) count (None: all)."""
        self.batch_size, self.mask = batch_size, None if mask is None or bool(mask.all()) else mask.bool()

    def __enter__(self) -> Recorder:
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
                self._handles.append(module.register_forward_hook(self._matrix_hook(inputs, gradients)))
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

    def _sequences(self, x: Tensor) -> Tensor:
        """(B, T, d); some models (OPT) flatten batch and positions before the MLP."""
        return x.detach().reshape(self.batch_size, -1, x.shape[-1])

    def _matrix_hook(self, inputs: list, gradients: list) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = self._sequences(args[0])
            for statistic, sums, matrix in inputs:
                more = (matrix.weight, matrix.block.head_size) if statistic.needs == "matrix" else ()
                statistic.update(sums, x, self.mask, *more)
            if not gradients or not output.requires_grad:
                return
            mask = self.mask

            def on_gradient(gradient: Tensor) -> None:
                g = self._sequences(gradient)
                if mask is not None:
                    g = g * mask[..., None]
                for statistic, sums, rows in gradients:
                    part = g if rows is None else g[..., rows]
                    if statistic.needs == "both":
                        statistic.update(sums, x, part)
                    else:
                        statistic.update(sums, part, mask, self.trims)

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


@contextmanager
def activation_gradients(model: Any, start: nn.Module) -> Iterator[None]:
    """Let gradients flow from the output of `start` on, to activations only: no weight gradient is computed."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    handle = start.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    try:
        yield
    finally:
        handle.remove()
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)


def loss_for_gradients(logits: Tensor, labels: Tensor, fisher: Fisher, generator: torch.Generator) -> Tensor:
    """Summed cross-entropy against the labels ("empirical") or against labels drawn from the model ("sampled")."""
    if fisher == "sampled":
        probabilities = logits.detach().float().softmax(-1).cpu()
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
    return summed_loss(logits, labels)


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

    anatomy: the model; its weights, mode and hooks are as before afterwards, also after an error.
    batches: see `objective`; padding (attention_mask 0) does not count.
    wanted: any of `kinds`; duplicates are collected once. matrices: default all of every block.
    fisher: gradients of the loss against the labels ("empirical") or against labels that the model samples ("sampled",
        the true Fisher in expectation).
    accumulate: dtype of the sums. float64 (default) adds each batch's float32 product exactly enough for any number
        of batches; float32 halves the memory.
    Under an initialised torch.distributed each process takes every world_size-th batch, and all end with the total.
    """
    model = anatomy.model
    matrices = anatomy.matrices() if matrices is None else matrices
    wanted = list(wanted)
    gradients = any(statistic.needs in ("gradient", "both") for statistic in wanted)
    store = Statistics(accumulate)
    generator = torch.Generator().manual_seed(seed)
    batches = list(batches)
    if not batches:
        raise BadData("no calibration data: the statistics need at least one sequence")
    mine = batches
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        mine = batches[torch.distributed.get_rank() :: torch.distributed.get_world_size()]
    training = model.training
    model.eval()
    try:
        with Recorder(matrices, wanted, store, task_of(model), anatomy.blocks) as recorder:
            for batch in progress(mine, "statistics") if progress else mine:
                first = next(iter(batch.values()))
                mask = batch.get("attention_mask")
                recorder.begin_batch(len(first), None if mask is None else mask.to(model.device))
                if not gradients:
                    with torch.no_grad():
                        run_forward(model, batch)
                    continue
                with activation_gradients(model, anatomy.embedding), torch.enable_grad():
                    loss_for_gradients(*predictions(model, batch), fisher, generator).backward()
    finally:
        model.train(training)
    if mine is not batches:
        store.all_reduce()
    store.check_finite()
    return store


def run_forward(model: Any, batch: Batch) -> None:
    """One pass through the model's body alone: no logits, no loss."""
    inputs: dict[str, Any] = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    if task_of(model) == "causal":
        inputs["use_cache"] = False
    model.base_model(**inputs)

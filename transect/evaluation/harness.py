"""The bridge to EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.text import specials_of
from ..errors import TransectError
from ..forward.mode import at_rest
from ..pretrained import pretrained


def run_lm_eval(
    model: Any,
    tasks: list[str],
    tokenizer: Any = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Task -> metric -> value, as lm_eval reports them, such as result["lambada_openai"]["acc,none"].

    model: a causal language model, or the folder or hub name of one (compressed or not). tokenizer: default, the one
    in that folder. tasks: names that lm_eval knows, or that are defined by the YAML files in `include_path`; the
    latter, on local data, need no network. limit: examples a task. Raises TransectError where lm_eval is missing or
    does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise TransectError("run_lm_eval needs lm_eval: pip install 'transect[lm-eval]'") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(model, (str, Path)):
        tokenizer = tokenizer or pretrained(AutoTokenizer, model)
        model = pretrained(AutoModelForCausalLM, model)
    if tokenizer is None:
        raise TransectError("a model object comes without its tokenizer: pass tokenizer=AutoTokenizer...")
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(tasks) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=include_path)  # reads thousands of files: many seconds
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise TransectError(f"lm_eval knows no task {', '.join(map(repr, unknown))}")
    begins = bool(specials_of(tokenizer)[0])  # as the tokenizer does by itself; some versions of lm_eval do not
    wrapper: Any = HFLM  # its decorator, and the one of simple_evaluate, hide their parameters
    evaluator: Any = simple_evaluate
    with at_rest(model):
        results = evaluator(
            wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=begins),
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
        )
    return results["results"]

"""What the tests of factual-recall share."""

from dataclasses import replace

import torch

from tests.test_causal_trace import specimen_of
from transect.probes.catalog.factual_recall.last_token import states_of, tasks_of

FLOAT32_NORMS = ("gemma2", "gemma3", "olmo2", "llama", "mistral", "qwen2", "qwen3", "phi3")
SUBJECTS = [f"w{number} w{number + 20}" for number in range(8, 20)]


def known(name, dtype=torch.float64, **change):
    return replace(specimen_of(name, dtype, subjects=SUBJECTS), **change)


def problem(name="llama"):
    specimen = known(name)
    task = tasks_of(specimen, 1, 12)[0]
    return specimen, task, states_of(specimen, task)


def no_hooks(model):
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

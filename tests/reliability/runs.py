"""Small comparisons, inspections and repairs, and what may happen to a file of theirs."""

import os
import sys

import torch

import transect
from transect.evaluation import Speed
from transect.store import write_text

from ..models import VOCABULARY, tiny

DATA = torch.randint(3, VOCABULARY, (6, 8), generator=torch.Generator().manual_seed(5))
OTHER = torch.randint(3, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(6))


def make_quick(patch):
    """Timing each row, and drawing each plot, would be most of these tests' time."""
    patch.setattr("transect.evaluation.measure_speed", lambda model: Speed(1.0, 1.0))
    verb = sys.modules["transect.verbs.compare"]
    patch.setattr(verb, "pareto_plot", lambda frame, path, title: write_text(path, title * 20))


def compare(out, methods=("svd", "svd-llm"), keep=(0.7, 0.5), held_out=DATA, **options):
    return transect.compare(tiny("llama"), methods, keep, DATA, held_out, out, roles=("q", "down"), **options)


def inspect(out, model=None, **options):
    return transect.inspect(model or tiny("llama"), ("nuclear-norm", "lazy-neuron"), DATA, out=out, **options)


def recover(how="full", **options):
    options = dict(steps=2, every=1, batch_size=4, lr=1e-2, epochs=2, device="cpu") | options
    return transect.recover(tiny("llama"), DATA, how, **options)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # the last number, or the last character of JSON
    path.write_bytes(bytes(content))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def a_folder(path):
    path.unlink()
    path.mkdir()


def a_link_to_nothing(path):
    path.unlink()
    path.symlink_to(path.with_name("nothing"))


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGE = [flipped, cut, emptied, a_folder, a_link_to_nothing, a_pipe]


def noted(caplog, path):
    return f"{path} is not used, since" in caplog.text

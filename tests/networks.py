"""Small networks, losses and examples whose curvature and outputs are known."""

import torch
from torch import nn
from torch.nn import functional


class Numbers(nn.Module):
    """n numbers x, whose loss is a function of them alone."""

    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(torch.as_tensor(x, dtype=torch.float64))


def quadratic(a):
    """x^T A x / 2 in batches that count: each is its number of terms."""
    return lambda model, count: (count * 0.5 * model.x @ a @ model.x, count)


def symmetric(n, seed=0):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / n


def examples(count, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator, dtype=dtype), torch.randint(3, (count,), generator=generator)


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


def wrong(model, batch):
    return (model(batch[0]).argmax(-1) != batch[1]).sum(), len(batch[1])


def network(seed=0, width=6, dtype=torch.float64, more=()):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, width), *more, nn.Tanh(), nn.Linear(width, 3)).to(dtype)


def directions(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(one.shape, generator=generator, dtype=torch.float64).to(one)
        for name, one in model.named_parameters()
    }


def inner(one, other):
    return sum(float((one[name].double() * other[name].double()).sum()) for name in one)

"""Monte Carlo tree search over paths (Li et al. 2025, arXiv:2507.07996, section 4), for one input.

What the paper leaves open is ours: c = sqrt(2); a node gets a further child as long as it has fewer than twice the
square root of its visits, since with hundreds of possible edits a tree in which all of them come first would never be
deeper than one edit; an edit that leads to a path that is in the tree already is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from .paths import Edit, Path, Space, edits_of

C = math.sqrt(2)
WIDTH = 2.0  # children of a node, over the square root of its visits


@dataclass
class Node:
    """A path in the tree. untried: edits that have led to no child yet, in the order in which they are to.

    total, visits: the summed reward of the simulations that went through it, and how many they were (Q and v).
    """

    path: Path
    depth: int
    untried: list[Edit]
    children: list[Node] = field(default_factory=list)
    total: float = 0.0
    visits: int = 0

    def score(self, simulations: int, layers: int, weight: float) -> float:
        """UCB = Q / v + c sqrt(ln V / v) - lambda |P| / N; infinite where it was never visited."""
        if not self.visits:
            return math.inf
        bound = self.total / self.visits + C * math.sqrt(math.log(max(simulations, 1)) / self.visits)
        return bound - weight * len(self.path) / layers


@dataclass(frozen=True)
class Found:
    """What the search of one input found. rewards: of each path, in the order in which they were first run.

    depths: how many edits each of these is from the plain path. root: of the tree.
    """

    rewards: dict[Path, float]
    depths: list[int]
    root: Node

    @property
    def shortest(self) -> Path | None:
        """The shortest path with the right answer, the first of these that was found; None if there is none."""
        right = [path for path, reward in self.rewards.items() if reward]
        return min(right, key=len, default=None)

    @property
    def front(self) -> list[tuple[float, int]]:
        """(reward, length) of the paths that no other is better than in one and as good in the other: at most two."""
        points = sorted({(reward, len(path)) for path, reward in self.rewards.items()}, key=lambda at: (-at[0], at[1]))
        kept: list[tuple[float, int]] = []
        for reward, length in points:
            if not kept or length < kept[-1][1]:
                kept.append((reward, length))
        return kept


def search(
    layers: int,
    reward: Callable[[Path], float],
    *,
    simulations: int,
    space: Space = "both",
    weight: float = 5.0,
    chance: float = 0.1,
    longest: int | None = None,
    seed: int = 0,
) -> Found:
    """Search the paths of a model of N layers. The first simulation runs the plain path, which is the root.

    reward: 1 if the path answers rightly, 0 if not; called once for a path. weight: lambda. chance: of a further child
    at random in place of the best by UCB. longest: path, default 2 N.
    """
    random, longest = Random(seed), 2 * layers if longest is None else longest
    rewards: dict[Path, float] = {}
    depths: list[int] = []

    def node(path: Path, depth: int) -> Node:
        untried = edits_of(path, space, longest)
        random.shuffle(untried)
        rewards[path] = reward(path)
        depths.append(depth)
        return Node(path, depth, untried)

    def further(parent: Node) -> Node | None:
        """A child of the first untried edit that leads to a path that is not in the tree."""
        while parent.untried:
            path = parent.untried.pop().of(parent.path)
            if path not in rewards:
                parent.children.append(node(path, parent.depth + 1))
                return parent.children[-1]
        return None

    root = node(tuple(range(layers)), 0)
    for done in range(simulations):
        trail = [root]
        while trail[-1].visits:  # a node that was just made is the leaf
            here = trail[-1]
            wanted = len(here.children) < WIDTH * math.sqrt(here.visits) or random.random() < chance
            child = further(here) if wanted else None
            if child is None and here.children:
                child = max(here.children, key=lambda one: one.score(done, layers, weight))
            if child is None:
                break  # nothing behind it is new: it is run once more
            trail.append(child)
        gained = rewards[trail[-1].path]
        for one in trail:
            one.total, one.visits = one.total + gained, one.visits + 1
    return Found(rewards, depths, root)

"""Scorers of answers from preferences: DMoERM's two layers of experts, and best of n by what they say.

S. Quan, DMoERM: Recipes of Mixture-of-Experts for Effective Reward Modeling, ACL Findings 2024, arXiv:2403.01197. A
prompt is routed to its category (outer layer, one choice); the category's scorer joins adapters that were trained on
one aspect each (inner layer, all of them). `train_reward_model` makes a `RewardModel`.
"""

from .best_of_n import Point, best_of_n, curve, sampler
from .consistency import judged
from .pairwise import last_states, pair_accuracy, pairwise_loss
from .reward_model import RewardModel
from .settings import Settings
from .train import train_reward_model

__all__ = [
    "Point", "RewardModel", "Settings", "best_of_n", "curve", "judged", "last_states", "pair_accuracy",
    "pairwise_loss", "sampler", "train_reward_model",
]  # fmt: skip

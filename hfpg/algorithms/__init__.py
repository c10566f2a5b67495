"""The methods, one file each: hyperparameters (a frozen dataclass), state, estimate, loss, update."""

from hfpg.algorithms.ppo import PPO
from hfpg.algorithms.reinforce import Reinforce


__all__ = ["PPO", "Reinforce"]

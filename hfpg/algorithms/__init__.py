"""The methods, one file each: hyperparameters (a frozen dataclass), state, estimate, loss, update."""

from hfpg.algorithms.a2c import A2C
from hfpg.algorithms.ppo import PPO
from hfpg.algorithms.reinforce import RLOO, Reinforce


__all__ = ["A2C", "PPO", "RLOO", "Reinforce"]

"""The judge: text in, float out. Anything that can look at text can be the reward."""

from hfpg.rewards.judge import Judge, RewardError
from hfpg.rewards.learned import ClassifierReward


__all__ = ["ClassifierReward", "Judge", "RewardError"]

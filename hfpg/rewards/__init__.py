"""The judge: text in, float out. Anything that can look at text can be the reward."""

from hfpg.rewards.judge import Judge, RewardError
from hfpg.rewards.learned import ClassifierReward
from hfpg.rewards.likelihood import CausalFluency, MaskedFluency, Relevance
from hfpg.rewards.remote import RemoteError, RemoteJudge
from hfpg.rewards.sandbox import Limits, Result, Sandbox, code_tests


__all__ = [
    "CausalFluency",
    "ClassifierReward",
    "Judge",
    "Limits",
    "MaskedFluency",
    "Relevance",
    "RemoteError",
    "RemoteJudge",
    "Result",
    "RewardError",
    "Sandbox",
    "code_tests",
]

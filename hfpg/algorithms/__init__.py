"""The methods, one file each: hyperparameters (a frozen dataclass), state, estimate, loss, update."""

from hfpg.algorithms.a2c import A2C
from hfpg.algorithms.grpo import CISPO, DAPO, GRPO, GSPO, DrGRPO
from hfpg.algorithms.ppo import PPO
from hfpg.algorithms.reinforce import RLOO, Reinforce, ReMax
from hfpg.algorithms.reinforce_pp import ReinforcePlusPlus
from hfpg.algorithms.trpo import TRPO


PRESETS: dict[str, type] = {
    "reinforce": Reinforce,
    "rloo": RLOO,
    "remax": ReMax,
    "reinforce++": ReinforcePlusPlus,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "a2c": A2C,
    "ppo": PPO,
    "trpo": TRPO,
}
"""`hfpg train --algorithm NAME`: the class whose defaults are the preset; every field is a flag."""

__all__ = [
    "A2C",
    "CISPO",
    "DAPO",
    "GRPO",
    "GSPO",
    "PPO",
    "PRESETS",
    "RLOO",
    "TRPO",
    "DrGRPO",
    "ReMax",
    "Reinforce",
    "ReinforcePlusPlus",
]

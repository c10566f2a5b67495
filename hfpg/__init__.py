"""hfpg: policy-gradient fine-tuning of Hugging Face causal language models, with a value head."""

from hfpg.config import ConfigError, TrainConfig
from hfpg.trainer import PolicyGradientTrainer


__all__ = ["ConfigError", "PolicyGradientTrainer", "TrainConfig"]
__version__ = "0.1.0"

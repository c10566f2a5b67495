"""Fused norms, rotary embeddings and MLPs of liger-kernel (Hsu et al. 2024, arXiv:2410.10989) in a policy on a GPU.

Its losses are not used: log-probabilities come from `hfpg.fast.head`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import is_liger_kernel_available

from hfpg.config import require
from hfpg.pretrained import causal_lm


NO_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def check_liger(config: Any, device: torch.device) -> None:
    """ConfigError where `use_liger_kernel` could do nothing: on a CPU, without the package, for other models."""
    require(
        device.type != "cpu",
        "use_liger_kernel=True on a CPU, but its kernels are for GPUs; leave it out (on a CPU hfpg uses oneDNN)",
    )
    require(is_liger_kernel_available(), "use_liger_kernel=True needs a package; run: pip install 'hfpg[liger]'")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known

    require(
        config.model_type in known,
        f"use_liger_kernel=True, but liger-kernel has no layers for {config.model_type!r}; leave it out, or use one "
        f"of {', '.join(sorted(known))}",
    )


def use_liger(policy: Any) -> None:
    """Put liger-kernel's layers in the place of the model's own, weights as they are.

    Models of the same class that are made later in this process have them too: that is how the package works.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance as put_into

    put_into(model=causal_lm(policy), **NO_LOSS)

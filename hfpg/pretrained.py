"""Pretrained causal LMs: loading them from the Hub or a folder, and refusing what is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.peft_utils import find_adapter_config_file

from hfpg.config import ConfigError, no_progress_bar, require
from hfpg.fields import first_line


def load_policy(
    model: Any, *, peft_config: Any = None, revision: str = "main", trust_remote_code: bool = False
) -> Any:
    """A causal LM, ready to be trained, from a Hub id, a folder, a PreTrainedModel or a PeftModel.

    A folder or repository that holds a PEFT adapter is loaded with its base model. A given model is used as it is
    and will be trained in place. With `peft_config` the model is wrapped; only the adapter is trained.

    Raises:
        ConfigError: not found, not a causal LM, an encoder–decoder, prompt-learning PEFT, `peft_config` together with
            a model that already has an adapter, or parameters to train in half precision.
    """
    model = load_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    if peft_config is not None:
        from peft import get_peft_model

        require(
            not is_peft(model), "peft_config is given, but the model already has an adapter; leave one of them out"
        )
        try:
            model = get_peft_model(model, peft_config)
        except ValueError as error:
            leaves = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise ConfigError(
                f"peft_config does not fit the model: {error}; its linear modules are {leaves}"
            ) from None
    if is_peft(model):
        config = model.active_peft_config
        require(
            not config.is_prompt_learning,
            f"{config.peft_type} is not supported: its virtual tokens shift every position; use LoRA",
        )
        # an adapter loaded for inference is frozen; here it is there to be trained
        saved = saved_with_adapter(model)
        for name, parameter in model.named_parameters():
            mine = of_adapter(name, model.active_adapter) and parameter.data_ptr() in saved
            parameter.requires_grad = parameter.requires_grad or mine
        refuse_unsaved(model, saved)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    require(bool(trained), "no parameter of the model requires a gradient; unfreeze some, or give a peft_config")
    half = [str(dtype).removeprefix("torch.") for dtype in trained if dtype.itemsize < 4]
    require(
        not half,
        f"the parameters to train are {', '.join(half)}: rounding would eat the optimizer's steps. Load the model "
        "with dtype=torch.float32 (bf16=True computes in bfloat16 all the same), or give a peft_config",
    )
    return model.eval()


def load_pretrained(model: Any, *, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """The model itself, in fp32 when it is named, untouched when it is given.

    Raises:
        ConfigError: it cannot be found, or is no causal LM.
    """
    if not isinstance(model, str):
        refuse_non_causal_class(model.config, type(model).__name__)
        return model
    load_config(model, revision=revision, trust_remote_code=trust_remote_code)  # refuses before the weights load
    with no_progress_bar(), one_sentence_about(model):
        if find_adapter_config_file(model, revision=revision) is not None:
            from peft import AutoPeftModelForCausalLM

            return AutoPeftModelForCausalLM.from_pretrained(
                model, revision=revision, dtype=torch.float32, is_trainable=True
            )
        return AutoModelForCausalLM.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code, dtype=torch.float32
        )


def load_config(model: Any, *, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """The configuration of a causal LM (of its base, for an adapter), without its weights."""
    if not isinstance(model, str):
        return model.config
    with one_sentence_about(model):
        source = model
        if find_adapter_config_file(model, revision=revision) is not None:
            from peft import PeftConfig

            source = str(PeftConfig.from_pretrained(model, revision=revision).base_model_name_or_path)
            revision = "main"
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    refuse_non_causal_class(config, source)
    return config


@contextmanager
def one_sentence_about(model: str) -> Iterator[None]:
    """What transformers says of a model that it cannot load, as one ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # a file that was copied half raises whatever its reader stumbles over
        raise ConfigError(
            f"cannot load the model {model!r}: {first_line(error)} (a Hub id such as 'gpt2' or a local folder works; "
            "private or gated models need `hf auth login`)"
        ) from error


def refuse_non_causal_class(config: Any, name: str) -> None:
    """Raise ConfigError for an encoder–decoder, or an architecture that has no causal LM class."""
    kind = getattr(config, "model_type", "?")
    require(
        not getattr(config, "is_encoder_decoder", False),
        f"{name} ({kind}) is an encoder–decoder, not a causal LM; use a decoder-only model such as 'gpt2'",
    )
    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or hasattr(config, "auto_map")
    registered = type(config) in AutoModelForCausalLM._model_mapping
    require(known or registered, f"{name} ({kind}) is not a causal LM; use a decoder-only model such as 'gpt2'")


def is_peft(model: Any) -> bool:
    """True for a PeftModel, without importing peft where it is not used."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_of_adapter(model: Any) -> str | None:
    """Where the weights are that a PeftModel's adapter is put on; None for other models and where nobody knows."""
    return model.peft_config[model.active_adapter].base_model_name_or_path or None if is_peft(model) else None


def of_adapter(name: str, adapter: str) -> bool:
    """Whether a PeftModel's parameter is that adapter's: `….lora_A.default.weight`, `….lora_embedding_A.default`."""
    return adapter in name.split(".")


def saved_with_adapter(model: Any) -> set[int]:
    """Addresses of the tensors that are saved with the active adapter of a PeftModel."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0])
    return {tensor.data_ptr() for tensor in found.values()}


def refuse_unsaved(model: Any, saved: set[int]) -> None:
    """Raise ConfigError for a PeftModel of which more is trained, or at work, than is saved with its adapter."""
    active = model.active_adapters
    require(len(active) == 1, f"the adapters {active} are active together; set one: model.set_adapter({active[0]!r})")
    lost = [n for n, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in saved]
    require(
        not lost,
        f"{len(lost)} parameters outside of the adapter {active[0]!r} require a gradient, such as {lost[:1]}: they "
        "would be trained and not saved. Freeze them, or name their modules in the adapter's modules_to_save",
    )


def causal_lm(policy: Any) -> PreTrainedModel:
    """The PreTrainedModel inside: LoRA layers are injected into it, so its forward is the adapted one."""
    return policy.get_base_model() if is_peft(policy) else policy

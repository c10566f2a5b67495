"""Looks at a model before anything is built on it: what it is, and which short ways give the same as the long one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from hfpg.config import ConfigError, require
from hfpg.fast.packing import packed, padded
from hfpg.frozen import frozen_layers, input_embeddings, learns_below, resumes
from hfpg.pretrained import causal_lm
from hfpg.text_config import WINDOWS, has_window, possible_windows, text_config


logger = logging.getLogger(__name__)

PROMPT, COMPLETION = 2, 4  # tokens of a row that every model is looked at with
PROBE_TOLERANCE = 1e-4  # relative; fp32 rounding between two orders of the same sums is some 1e-6
LOUD = 64.0  # logits of a trained model; soft caps are at 20 to 50
LOUDER_AT_MOST = 1e3  # times; half precision ends at 65504
COARSE_TOLERANCE = 0.05  # the same of half precision, TF32 and quantised weights


def predicts(x: Tensor, completion_length: int) -> Tensor:
    """The slice [B, C, …] of per-position outputs [B, T, …] that predicts the completion: positions P−1 … T−2."""
    return x[:, -completion_length - 1 : -1]


def refuse_non_causal(actor: Any, inputs: dict[str, Any]) -> None:
    """ConfigError for a model that gives NaN on padding, whose earlier logits move with the last token, or that reads
    its padding: prompts are padded on the left, and the padded row must be the row alone."""
    lm, changed = causal_lm(actor.policy), dict(inputs)
    changed["input_ids"] = inputs["input_ids"].clone()
    changed["input_ids"][:, -1] = (changed["input_ids"][:, -1] + 1) % actor.vocabulary
    before, after = lm(**inputs).logits[:, PROMPT:-1], lm(**changed).logits[:, PROMPT:-1]
    require(
        not bool(before.isnan().any()),
        f"{type(lm).__name__} gives NaN on a left-padded batch in {before.dtype}; load it in another dtype or "
        "attn_implementation, or see whether its weights are whole",
    )
    require(
        close(before, after),
        f"{type(lm).__name__} is not causal: changing the last token moves the logits of earlier ones, so it "
        "cannot generate from left to right; use a decoder-only model such as 'gpt2' (BERT classes need "
        "is_decoder=True)",
    )
    alone = {name: x[1:, PROMPT:] if isinstance(x, Tensor) else x for name, x in inputs.items()}
    exact = all(p.dtype.itemsize >= 4 for p in lm.parameters()) and torch.get_float32_matmul_precision() == "highest"
    tolerance = PROBE_TOLERANCE if exact else COARSE_TOLERANCE
    require(
        close(lm(**alone).logits[:, :-1], before[1:], tolerance),
        f"{type(lm).__name__} reads the padding on the left of a prompt: a padded row has other logits than the row "
        "alone (RWKV, xLSTM, RecurrentGemma and BART's family do), and hfpg pads prompts; use a model that masks its "
        "padding, such as 'gpt2', Llama or Mamba",
    )


def chunked_head_agrees(actor: Any, inputs: dict[str, Any]) -> bool:
    """True if LM head ∘ trunk gives the model's own logits *and* the same gradient on a ragged batch.

    ConfigError for a model that gives no gradient in eval mode, in which everything is trained here.
    """
    lm = causal_lm(actor.policy)
    head, trunk = lm.get_output_embeddings(), lm.base_model
    if head is None or trunk is lm:
        return False
    embedding = lm.get_input_embeddings().weight
    needs_grad = embedding.requires_grad
    embedding.requires_grad_(True)
    try:
        with torch.enable_grad():
            own = actor._model_logits(inputs, COMPLETION).float()
            hidden = predicts(trunk(**inputs).last_hidden_state, COMPLETION)
            ours = head(hidden).float()
            target = torch.linspace(-1, 1, own.numel(), device=own.device).view_as(own)
            gradients = [torch.autograd.grad((x * target).sum(), embedding)[0] for x in (own, ours)]
        agree = close(own, ours) and close(*gradients) and loud_logits_agree(actor, inputs, hidden, own)
    except AssertionError as error:  # Reformer
        raise ConfigError(
            f"{type(lm).__name__} gives no gradient in eval mode ({str(error).strip()[:200]}), and hfpg trains in it, "
            "so that dropout is off; use another decoder-only model, such as 'gpt2'"
        ) from error
    except (TypeError, AttributeError, RuntimeError) as error:
        logger.info("the LM head of %s is used through the model's own forward (%s)", type(lm).__name__, error)
        return False
    finally:
        embedding.requires_grad_(needs_grad)
    if not agree:
        logger.info("%s does more after its LM head: scored through logits_to_keep", type(lm).__name__)
    return agree


@torch.no_grad()
def loud_logits_agree(actor: Any, inputs: dict[str, Any], hidden: Tensor, own: Tensor) -> bool:
    """Whether LM head ∘ trunk gives the model's logits also where they are as large as a trained model's.

    A soft cap at 30 is nearly the identity on the logits of a fresh model, here `own`.
    """
    head = causal_lm(actor.policy).get_output_embeddings()
    louder = float((LOUD / own.abs().max()).clamp(1, LOUDER_AT_MOST))
    handle = head.register_forward_pre_hook(lambda module, args: (louder * args[0], *args[1:]))
    try:
        return close(actor._model_logits(inputs, hidden.shape[1]).float(), head(hidden).float())
    finally:
        handle.remove()


@torch.no_grad()
def packing_agrees(actor: Any) -> bool:
    """True if packed rows give the hidden states of padded ones: attention is by the mask and by nothing else."""
    lm = causal_lm(actor.policy)
    by_mask = text_config(lm.config)._attn_implementation in ("sdpa", "eager") and not has_window(lm.config)
    windows = any(getattr(module, name, None) for module in lm.base_model.modules() for name in WINDOWS)
    if not actor.takes_positions or not by_mask or windows:
        return False
    device = next(actor.policy.parameters()).device
    ids = (torch.arange(24, device=device).view(4, 6) * 7 + 3) % actor.vocabulary
    ids[1, :2] = ids[0, :2]  # two completions of one prompt; all four stand in one row
    mask = torch.arange(6, device=device) < torch.tensor([6, 4, 5, 6], device=device)[:, None]
    mask[2, 0] = False
    agree = packs_like_padded(actor, ids, mask)
    for size in possible_windows(lm.config):
        if agree:  # one text twice as long as what may be a window
            ids = (torch.arange(2 * size, device=device)[None] * 7 + 3) % actor.vocabulary
            agree = packs_like_padded(actor, ids, torch.ones_like(ids, dtype=torch.bool))
    return agree


def packs_like_padded(actor: Any, ids: Tensor, mask: Tensor) -> bool:
    """Whether the hidden states of these rows [B, T], prompts of two columns first, are the same packed and padded."""
    name, rows = type(causal_lm(actor.policy)).__name__, (ids[:, :2], mask[:, :2], ids[:, 2:], mask[:, 2:])
    layouts = [padded(*rows), packed(*rows, even_if_dearer=True)]
    try:
        trunk = causal_lm(actor.policy).base_model
        hidden = [actor._trunk(trunk, x, None)[x.source] for x in layouts if x is not None]
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError) as error:
        logger.info("the rows of %s are padded, not packed (%s)", name, error)
        return False
    if not (agree := close(*hidden)):
        logger.info("%s looks further than its mask: rows are padded, not packed", name)
    return agree


@torch.no_grad()
def takes_embeddings(actor: Any, inputs: dict[str, Any]) -> bool:
    """True if the trunk is the same function of its embeddings, looked up outside, and nothing else."""
    lm = causal_lm(actor.policy)
    embed = lm.get_input_embeddings()
    if type(embed) is not nn.Embedding or embed.max_norm is not None or embed.scale_grad_by_freq:
        return False
    if input_embeddings(lm.base_model) is not embed:
        return False
    by_ids = lm.base_model(**inputs).last_hidden_state if actor.chunked_head else None
    given = {name: x for name, x in inputs.items() if name != "input_ids"}
    try:
        ours = lm.base_model(**given, inputs_embeds=embed(inputs["input_ids"])).last_hidden_state
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError):
        return False
    return by_ids is not None and close(by_ids, ours)


def layers_that_stand_still(actor: Any, inputs: dict[str, Any]) -> int:
    """Layers, from the first, that do not learn and whose output may stand for them."""
    trunk = causal_lm(actor.policy).base_model
    count = frozen_layers(trunk)
    if count and learns_below(trunk, count, inputs):
        return 0  # such as a table of positions: it would get no gradient
    found = resumes(trunk, count, inputs) if count else None
    if count and (found is None or not close(*found)):
        logger.info("%s cannot go on from the states of its frozen layers", type(trunk).__name__)
        return 0
    return count


@torch.no_grad()
def head_input_width(actor: Any, inputs: dict[str, Any]) -> int:
    """Width of what the LM head reads; ConfigError where no head can be found."""
    with captured_head_input(causal_lm(actor.policy)) as captured:
        actor._model_logits(inputs, COMPLETION)
    require(
        len(captured) == 1,
        f"{type(causal_lm(actor.policy)).__name__} has no LM head that can be found (get_output_embeddings), so no "
        "value head can be put on it; use an algorithm without one, such as Reinforce(baseline='batch')",
    )
    return captured[0].shape[-1]


@torch.no_grad()
def trunk_width(actor: Any, inputs: dict[str, Any]) -> int:
    """Width of the hidden states, which a value head on a trunk of its own reads; another than that of what the LM
    head reads in Electra and RemBERT."""
    lm = causal_lm(actor.policy)
    states: Any = getattr(lm.base_model(**inputs), "last_hidden_state", None)
    require(
        states is not None,
        f"{type(lm).__name__} has no trunk that gives hidden states (base_model), of which value='separate' needs a "
        "copy; use value='shared', or an algorithm without a value function, such as Reinforce(baseline='batch')",
    )
    return int(states.shape[-1])


def close(a: Tensor, b: Tensor, tolerance: float = PROBE_TOLERANCE) -> bool:
    return bool((a - b).abs().max() <= tolerance * a.abs().max().clamp(min=1e-6))


def fuse_activations(lm: nn.Module) -> None:
    """GPT-2's GELU as one kernel: the same function, where transformers writes it as eight operations that each keep
    a tensor for the backward pass. Weights, configuration and what is saved stay as they are."""
    for module in list(lm.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU("tanh"))


@torch.no_grad()
def fuse_norms(lm: PreTrainedModel) -> None:
    """RMS norms of the residual stream as torch's own: on a GPU one kernel in place of six, forward and backward, and
    a third of the memory; on a CPU the same bits in the same time. Weights, names and what is saved stay as they are.

    In single precision only: in half precision, and for the smaller norms of queries and keys, the two round at other
    places.
    """
    embedding = lm.get_input_embeddings().weight
    if embedding.dtype != torch.float32:
        return
    width = embedding.shape[1]
    for module in list(lm.modules()):
        for name, child in module.named_children():
            weight, epsilon = getattr(child, "weight", None), getattr(child, "variance_epsilon", None)
            if not type(child).__name__.endswith("RMSNorm") or weight is None or epsilon is None:
                continue
            touched = "forward" in vars(child) or nn.utils.parametrize.is_parametrized(child) or has_hooks(child)
            if touched or weight.shape != (width,) or weight.dtype != torch.float32:
                continue
            own = nn.RMSNorm(width, eps=epsilon, device="meta")
            own.weight = weight
            x = torch.linspace(-2, 3, 4 * width, device=weight.device, dtype=weight.dtype).view(4, width)
            if close(child(x), own(x)):
                setattr(module, name, own.train(child.training))


def has_hooks(module: nn.Module) -> bool:
    """True where somebody listens to the module, or changes what goes through it."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in names)


def is_plain(head: Any, hidden: Tensor) -> bool:
    """True for a linear LM head in at least single precision that nothing is hooked to."""
    return (
        type(head) is nn.Linear
        and not (head._forward_hooks or head._forward_pre_hooks or nn.utils.parametrize.is_parametrized(head))
        and head.weight.dtype.itemsize >= 4
        and (head.weight.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type))
    )


@contextmanager
def captured_head_input(lm: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A list that receives what the LM head reads, at each call of it inside the block."""
    captured: list[Tensor] = []
    head = lm.get_output_embeddings()
    if head is None:
        yield captured
        return
    handle = head.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    try:
        yield captured
    finally:
        handle.remove()

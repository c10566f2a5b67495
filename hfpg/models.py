"""ActorCritic: a causal LM and its value head in one module; the probes that say what a model can do; the reference.

The policy stays the untouched PreTrainedModel (or PeftModel): `generate` is called on it and it is saved as a plain
Hugging Face folder. The value head lives outside it.
"""

from __future__ import annotations

import copy
import inspect
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hfpg.config import require
from hfpg.fast.direct import is_direct, look_up
from hfpg.fast.head import SlopesOf, head_scores
from hfpg.fast.linear import own_products, precise_head
from hfpg.fast.packing import Layout, packed, padded
from hfpg.fast.parked import ParkedCopy
from hfpg.frozen import skipping, states_below
from hfpg.integrity import weight_sum
from hfpg.lstm import LSTMConfig, LSTMForCausalLM, LSTMModel  # noqa: F401  (registers them with transformers)
from hfpg.ops.kl import full as full_kl
from hfpg.ops.logprobs import (
    chosen_logprobs,
    chunk_elements,
    entropy,
    kl_in_chunks,
    sampling_logits,
    score_in_chunks,
)
from hfpg.pretrained import causal_lm, is_peft, load_pretrained
from hfpg.probes import (
    COMPLETION,
    PROMPT,
    captured_head_input,
    chunked_head_agrees,
    fuse_activations,
    fuse_norms,
    head_input_width,
    is_plain,
    layers_that_stand_still,
    packing_agrees,
    predicts,
    refuse_non_causal,
    takes_embeddings,
    trunk_width,
)
from hfpg.text_config import text_config
from hfpg.types import Scored


ValueKind = Literal["shared", "separate"]


# ── the module ─────────────────────────────────────────────────────────────────────────────────────────────────────


class ActorCritic(nn.Module):
    """Policy and, where the algorithm needs one, value function, as the one module given to Accelerate.

    Args:
        policy: a causal LM (see `load_policy`).
        value: None, "shared" (a linear head on what the LM head reads) or "separate" (a trunk of its own, copied from
            the policy's, with such a head).
    Raises:
        ConfigError: the model is not causal (changing the last token moves earlier logits), reads the padding on the
            left of a prompt, gives no gradient in eval mode, or a value head is asked of a model whose LM head
            ("shared") or trunk ("separate") cannot be found.

    Both heads start at zero, so the first values are 0. The module is always in eval mode: dropout of every kind is
    off in scoring and in training, or the ratio of the first minibatch would not be 1.
    """

    def __init__(self, policy: Any, value: ValueKind | None = None):
        super().__init__()
        self.policy = policy.eval()
        lm = causal_lm(policy)
        fuse_activations(lm)
        fuse_norms(lm)
        self.vocabulary: int = lm.get_input_embeddings().weight.shape[0]
        width = lm.get_input_embeddings().weight.shape[1]
        self.hidden_size: int = getattr(text_config(lm.config), "hidden_size", width)
        self.takes_positions = "position_ids" in inspect.signature(lm.forward).parameters
        self.takes_logits_to_keep = "logits_to_keep" in inspect.signature(lm.forward).parameters
        self.value: ValueHead | None = None
        self.chunked_head = False
        with torch.no_grad():
            inputs = self.probe_inputs()
            refuse_non_causal(self, inputs)
        self.chunked_head = chunked_head_agrees(self, inputs)
        self.takes_embeddings = takes_embeddings(self, inputs)
        self.packs = self.chunked_head and packing_agrees(self)
        self.frozen_layers = layers_that_stand_still(self, inputs)
        if value is not None:
            width = head_input_width(self, inputs) if value == "shared" else trunk_width(self, inputs)
            trunk = copy.deepcopy(lm.base_model) if value == "separate" else None
            self.value = ValueHead(width, trunk).to(next(lm.parameters()).device)
        self.eval()

    def train(self, mode: bool = True) -> ActorCritic:
        """Stay in eval mode (dropout off), whatever a wrapper asks for."""
        return super().train(False)

    @property
    def value_kind(self) -> ValueKind | None:
        """ "shared", "separate", or None without a value head."""
        if self.value is None:
            return None
        return "shared" if self.value.trunk is None else "separate"

    def forward(
        self,
        prompt_ids: Int[Tensor, "B P"],
        prompt_mask: Bool[Tensor, "B P"],
        completion_ids: Int[Tensor, "B C"],
        completion_mask: Bool[Tensor, "B C"],
        temperature: float = 1.0,
        kept: UInt8[Tensor, "B C bytes"] | None = None,
        with_entropy: bool = False,
        with_values: bool = True,
        with_last_values: bool = False,
        reference: Reference | ActorCritic | None = None,
        reverse: bool = False,
        prompt_states: Float[Tensor, "B P H"] | None = None,
        completion_states: Float[Tensor, "B C H"] | None = None,
        slopes: SlopesOf | None = None,
    ) -> Scored:
        """Log-probabilities, entropy and values of given completions, each [B, C], 0 outside `completion_mask`.

        log-probs are those of the distribution that is sampled from: temperature applied, renormalised over `kept`
        (bits packed, see `hfpg.ops.logprobs`). Values are V(s_t), read before token t; `with_last_values` adds V after
        the last chosen token. With a `reference` there is `kl`, the exact KL(π ‖ reference) of every position, or
        KL(reference ‖ π) with `reverse`. States are what `states` gave for these rows: frozen layers are not computed
        again. A gap in `completion_mask` was not chosen, but it was read: tokens after it
        attend to it. With `slopes` (see `hfpg.token_local`) a plain LM head makes its gradient on the way.
        """
        other = None if reference is None else Frozen(reference, reverse)
        chunked = self.chunked_head and (other is None or other.scorer.chunked_head)
        may_pack = chunked and self.packs and (other is None or other.scorer.packs)
        layout = self.layout(prompt_ids, prompt_mask, completion_ids, completion_mask, may_pack)
        states = laid(layout, prompt_states, completion_states)
        given = (completion_ids, completion_mask, temperature, kept, with_entropy, other)
        if chunked:
            whole = self._trunk(causal_lm(self.policy).base_model, layout, states)
            logprobs, entropies, kl = self._score_in_chunks(layout, states, whole, *given, slopes)
        else:
            logprobs, entropies, kl, whole = self._score_by_model(self._inputs(layout), states, *given)
        if self.value is None or not with_values:
            return Scored(logprobs, entropies, None, kl)
        if self.value.trunk is not None:
            whole = self._trunk(self.value.trunk, layout, states if self.value.shares_frozen else None)
        values = _unflatten(self.value(whole[layout.source]), completion_mask)
        # the state after the last chosen token, or after the prompt where there is none
        last_values = self.value(whole[layout.last]) if with_last_values else None
        return Scored(logprobs, entropies, values, kl, last_values)

    def values(
        self,
        prompt_ids: Int[Tensor, "B P"],
        prompt_mask: Bool[Tensor, "B P"],
        completion_ids: Int[Tensor, "B C"],
        completion_mask: Bool[Tensor, "B C"],
        prompt_states: Float[Tensor, "B P H"] | None = None,
        completion_states: Float[Tensor, "B C H"] | None = None,
        **_: Any,
    ) -> Float[Tensor, "B C"]:
        """V(s_t) of a separate value function, without a look at the policy; arguments as for `forward`."""
        assert self.value is not None and self.value.trunk is not None
        layout = self.layout(prompt_ids, prompt_mask, completion_ids, completion_mask)
        states = laid(layout, prompt_states, completion_states)
        whole = self._trunk(self.value.trunk, layout, states if self.value.shares_frozen else None)
        return _unflatten(self.value(whole[layout.source]), completion_mask)

    @torch.no_grad()
    def states(
        self,
        prompt_ids: Int[Tensor, "B P"],
        prompt_mask: Bool[Tensor, "B P"],
        completion_ids: Int[Tensor, "B C"],
        completion_mask: Bool[Tensor, "B C"],
        **_: Any,
    ) -> tuple[Float[Tensor, "B P H"], Float[Tensor, "B C H"]]:
        """What the frozen layers say of prompts and completions; the same for every policy that learns above them."""
        layout = self.layout(prompt_ids, prompt_mask, completion_ids, completion_mask)
        trunk = causal_lm(self.policy).base_model
        both = layout.pick(states_below(trunk, self.frozen_layers, self._inputs(layout)))
        return both[:, : prompt_ids.shape[1]], both[:, prompt_ids.shape[1] :]

    def layout(
        self,
        prompt_ids: Int[Tensor, "B P"],
        prompt_mask: Bool[Tensor, "B P"],
        completion_ids: Int[Tensor, "B C"],
        completion_mask: Bool[Tensor, "B C"],
        may_pack: bool = True,
    ) -> Layout:
        """How rows go through the trunk: packed where the model allows it and it saves positions, or padded."""
        rows = (prompt_ids, prompt_mask, completion_ids, completion_mask)
        found = packed(*rows, self.hidden_size) if may_pack and self.packs else None
        return padded(*rows) if found is None else found

    # ── how the model is called

    def _inputs(self, layout: Layout) -> dict[str, Any]:
        mask = layout.mask
        if mask.dim() == 2:
            mask = mask.long()
        elif text_config(causal_lm(self.policy).config)._attn_implementation == "eager":  # adds its mask to the scores
            dtype = causal_lm(self.policy).dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        inputs: dict[str, Any] = {"input_ids": layout.ids, "attention_mask": mask, "use_cache": False}
        if self.takes_positions:
            inputs["position_ids"] = layout.positions
        return inputs

    def _trunk(self, trunk: Any, layout: Layout, states: Tensor | None) -> Float[Tensor, "N H"]:
        """Hidden states of all positions, R · L = N of them; from the states of frozen layers where they are given."""
        inputs = self._inputs(layout)
        if self.takes_embeddings and is_direct((embed := trunk.get_input_embeddings()).weight):
            inputs["inputs_embeds"] = look_up(embed.weight, inputs.pop("input_ids"), embed.padding_idx)
        with skipping(trunk, 0, 0 if states is None else self.frozen_layers, states):
            return trunk(**inputs).last_hidden_state.flatten(0, 1)

    def large_matrices(self) -> list[Tensor]:
        """[V, H] each: embeddings of policy and critic, the policy's LM head (one, where they are tied), if used."""
        lm = causal_lm(self.policy)
        head = lm.get_output_embeddings() if self.chunked_head else None
        trunks = [lm.base_model, getattr(self.value, "trunk", None)]
        found = [t.get_input_embeddings().weight for t in trunks if self.takes_embeddings and t is not None]
        return found + ([head.weight] if type(head) is nn.Linear else [])

    def _model_logits(self, inputs: dict[str, Any], length: int, states: Tensor | None = None) -> Tensor:
        """Logits [B, C, V] that predict the last `length` tokens, by the model's own forward."""
        lm = causal_lm(self.policy)
        with skipping(lm.base_model, 0, 0 if states is None else self.frozen_layers, states):
            if self.takes_logits_to_keep:
                return lm(**inputs, logits_to_keep=length + 1).logits[:, :-1]
            return predicts(lm(**inputs).logits, length)

    def _score_in_chunks(
        self,
        layout: Layout,
        states: Tensor | None,
        whole: Tensor,
        tokens: Tensor,
        mask: Tensor,
        temperature: float,
        kept: Tensor | None,
        with_entropy: bool,
        other: Frozen | None,
        slopes: SlopesOf | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scores [B, C] from the hidden states of all positions [R·L, H], by the LM head in chunks."""
        head, hidden = causal_lm(self.policy).get_output_embeddings(), whole[layout.source]
        picked = None if kept is None else kept[mask]
        if is_plain(head, hidden):
            coarse = torch.is_autocast_enabled(hidden.device.type)
            chosen = (tokens[mask], temperature, picked, with_entropy, slopes, coarse)
            with torch.autocast(hidden.device.type, enabled=False):
                flat, spread = head_scores(hidden.to(head.weight.dtype), head.weight, head.bias, *chosen)
        else:
            flat, spread = score_in_chunks(
                head, hidden, tokens[mask], self.vocabulary, temperature, picked, with_entropy
            )
        kl = None
        if other is not None:
            theirs = other.hidden(layout, states)[layout.source]
            chunks = (head, hidden, other.head, theirs, self.vocabulary, temperature, picked, other.reverse)
            kl = _unflatten(kl_in_chunks(*chunks), mask)
        return _unflatten(flat, mask), None if spread is None else _unflatten(spread, mask), kl

    def _score_by_model(
        self,
        inputs: dict[str, Any],
        states: Tensor | None,
        tokens: Tensor,
        mask: Tensor,
        temperature: float,
        kept: Tensor | None,
        with_entropy: bool,
        other: Frozen | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Scores through the model's own forward, for models that do more after the head (Gemma-2, Cohere, Granite).

        Rows go through in groups small enough for their logits to fit one chunk of memory; with more than one group
        the backward pass runs the group again instead of keeping its logits. Returns log-probs, entropy, KL [B, C] and
        what the head read at all positions [B·T, H].
        """
        length = tokens.shape[1]
        size = max(1, 4 * chunk_elements(mask.device) // (self.vocabulary * (length + 1)))

        def score(rows: slice) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
            part = {k: v[rows] if isinstance(v, Tensor) else v for k, v in inputs.items()}
            below = None if states is None else states[rows]
            with captured_head_input(causal_lm(self.policy)) as captured:
                logits = self._model_logits(part, length, below)
            chosen = mask[rows]
            keep = None if kept is None else kept[rows][chosen]
            flat = sampling_logits(logits[chosen], temperature, keep)
            spread = _unflatten(entropy(flat), chosen) if with_entropy else None
            kl = None
            if other is not None:
                theirs = sampling_logits(other.logits(part, length, below)[chosen], temperature, keep)
                kl = _unflatten(full_kl(theirs, flat) if other.reverse else full_kl(flat, theirs), chosen)
            read = captured[0][:, -length - 1 :] if captured else logits
            read = nn.functional.pad(read, (0, 0, part["input_ids"].shape[1] - read.shape[1], 0))
            return _unflatten(chosen_logprobs(flat, tokens[rows][chosen]), chosen), spread, kl, read

        groups = [slice(i, i + size) for i in range(0, len(tokens), size)]
        recompute = torch.is_grad_enabled() and len(groups) > 1
        parts = [checkpoint(score, g, use_reentrant=False) if recompute else score(g) for g in groups]
        logprobs, spread, kl, read = (
            None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)
        )
        return logprobs, spread, kl, read.flatten(0, 1)  # type: ignore[return-value,union-attr]

    # ── what probes look at

    def probe_inputs(self) -> dict[str, Any]:
        """Two rows of fixed tokens, the second left-padded by its whole prompt."""
        device = next(self.policy.parameters()).device
        length = PROMPT + COMPLETION
        ids = (torch.arange(2 * length, device=device).view(2, length) * 7 + 3) % self.vocabulary
        mask = torch.ones(2, length, dtype=torch.bool, device=device)
        mask[1, :PROMPT] = False
        return self._inputs(padded(ids[:, :PROMPT], mask[:, :PROMPT], ids[:, PROMPT:], mask[:, PROMPT:]))


def laid(layout: Layout, prompt_states: Tensor | None, completion_states: Tensor | None) -> Tensor | None:
    """States [B, P, H] and [B, C, H] where the tokens stand, [R, L, H]; None where there are none."""
    if prompt_states is None or completion_states is None:
        return None
    return layout.lay(torch.cat([prompt_states, completion_states], 1))


def _unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """Values at the True places of a mask back in its shape, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


class ValueHead(nn.Module):
    """V(s) = w · h + b in at least fp32, from zero; with a trunk of its own when the value function is separate."""

    def __init__(self, width: int, trunk: nn.Module | None = None):
        super().__init__()
        self.trunk = trunk
        self.shares_frozen = True  # the trunk's frozen layers say what the policy's say
        dtype = torch.float32 if trunk is None else torch.promote_types(next(trunk.parameters()).dtype, torch.float32)
        self.linear = nn.Linear(width, 1, dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, " N"]:
        """Values of N hidden states."""
        dtype = torch.promote_types(hidden.dtype, self.linear.weight.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(
                hidden.to(dtype), self.linear.weight.to(dtype), self.linear.bias.to(dtype)
            ).squeeze(-1)


# ── the reference policy ───────────────────────────────────────────────────────────────────────────────────────────


class Reference:
    """The frozen policy that KL is measured against: the model exactly as it was passed.

    With an adapter that does nothing yet, the policy itself with the adapter switched off (no second model in
    memory); otherwise a frozen copy, or the `ref_model` given; its weights are in a file of `folder` if that is given
    (see `hfpg.fast.parked`).
    """

    def __init__(self, actor: ActorCritic, ref_model: Any = None, folder: Path | None = None):
        self.adapter_off = ref_model is None and is_peft(actor.policy) and self._adapter_is_inert(actor)
        self.shares_frozen = ref_model is None  # what does not learn is the same in both
        self.copy: ParkedCopy | None = None
        self.weight_sum: str | None = None  # of the copy: a resumed run must have the same
        if self.adapter_off:
            self.scorer = actor
            return
        # a copy also of a model that is given: it may be the policy itself, and it must not change
        given = actor.policy if ref_model is None else load_pretrained(ref_model)
        self.weight_sum = weight_sum(given.parameters())
        frozen = {id(p): p for p in given.parameters() if not p.requires_grad and ref_model is None}
        device = next(actor.parameters()).device
        self.copy = ParkedCopy(given, frozen, folder if device.type == "cpu" else None)
        self.scorer = ActorCritic(self.copy.module.to(device)).requires_grad_(False)
        self.scorer.frozen_layers = actor.frozen_layers if self.shares_frozen else 0  # in the copy nothing learns
        require(
            self.scorer.vocabulary == actor.vocabulary,
            f"ref_model has {self.scorer.vocabulary} tokens and the policy {actor.vocabulary}; they must share one",
        )

    @staticmethod
    @torch.no_grad()
    def _adapter_is_inert(actor: ActorCritic) -> bool:
        inputs = actor.probe_inputs()
        lm = causal_lm(actor.policy)
        on = lm(**inputs).logits
        with actor.policy.disable_adapter():
            return bool(torch.equal(on, lm(**inputs).logits))

    def off(self) -> AbstractContextManager:
        """Inside, `scorer` is the reference: the adapter is off where there is one."""
        return self.scorer.policy.disable_adapter() if self.adapter_off else nullcontext()

    @torch.no_grad()
    def logprobs(self, **rows: Any) -> Tensor:
        """log π_ref of given completions [B, C]; arguments as for `ActorCritic.forward`."""
        if not self.shares_frozen:
            rows = rows | {"prompt_states": None, "completion_states": None}
        with self.off(), own_products(self.scorer, causal_lm(self.scorer.policy)):
            found: Tensor = self.scorer(**rows, with_values=False).logprobs
        if self.copy is not None:
            self.copy.let_go()
        return found


class Frozen:
    """The other policy of an exact KL: its hidden states, head and logits, without gradient.

    The head is called inside the recomputed part of the policy's forward, so the adapter is off for its call alone.
    """

    def __init__(self, other: Reference | ActorCritic, reverse: bool):
        self.reverse = reverse
        self.scorer = other.scorer if isinstance(other, Reference) else other
        self.off = other.off if isinstance(other, Reference) else nullcontext
        self.shares_frozen = other.shares_frozen if isinstance(other, Reference) else False

    @torch.no_grad()
    def hidden(self, layout: Layout, states: Tensor | None) -> Tensor:
        """Hidden states of all positions [R·L, H]."""
        with self.off():
            return self.scorer._trunk(causal_lm(self.scorer.policy).base_model, layout, self.below(states))

    def below(self, states: Tensor | None) -> Tensor | None:
        """The states of the policy's frozen layers, where the other policy shares these layers."""
        return states if self.shares_frozen else None

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of N hidden states."""
        lm = causal_lm(self.scorer.policy)
        with self.off(), precise_head(lm):
            return lm.get_output_embeddings()(hidden)

    @torch.no_grad()
    def logits(self, inputs: dict[str, Any], length: int, states: Tensor | None) -> Tensor:
        """Logits [B, C, V] by the model's own forward."""
        with self.off(), precise_head(causal_lm(self.scorer.policy)):
            return self.scorer._model_logits(inputs, length, self.below(states))

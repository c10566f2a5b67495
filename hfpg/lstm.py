"""An LSTM language model that is a PreTrainedModel: `generate`, Auto classes, saving and Trainer work as for others.

A recurrence has no attention mask to hide padding from it. Here a padded column leaves the state as it is, exactly:
the real tokens of every row are moved to its front, run as one batch, and their outputs are put back in place.

Second derivatives work on the CPU, with the fused kernel. cuDNN has none: to differentiate twice on a GPU, run the
forward pass under `torch.backends.cudnn.flags(enabled=False)`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from hfpg.config import require


# what `generate` and the outputs of models call it: `cache` from transformers 5.24 on
CACHE = "cache" if "cache" in inspect.signature(BaseModelOutputWithPast).parameters else "past_key_values"


class LSTMConfig(PreTrainedConfig):
    """Sizes and settings of an LSTM language model.

    Args:
        vocab_size: V, tokens.
        hidden_size: H, the width of every layer's state.
        embedding_size: E, the width of token embeddings; None: the hidden size.
        num_hidden_layers: L, stacked LSTM layers.
        dropout: the probability on embeddings, between layers and before the LM head, in train mode.
        tie_word_embeddings: the LM head's weight is the embedding; E must be H.
        initializer_range: standard deviation of the LM head (and of tied embeddings). A state lies in (−1, 1), so the
            logits of a fresh model have at most `initializer_range`·√H: sampling starts almost uniform.
        use_cache: whether a forward in eval mode returns its state when it is not said.
        pad_token_id, bos_token_id, eos_token_id: for `generate`. Padding is known by the attention mask alone, so pad
            may be EOS.
    Raises:
        ConfigError: a size below 1, dropout outside [0, 1), or tied embeddings of another width than the state.
    """

    model_type = "hfpg_lstm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 50257
    hidden_size: int = 512
    embedding_size: int | None = None
    num_hidden_layers: int = 2
    dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the embedding size and refuse what cannot be built."""
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        super().__post_init__(**kwargs)
        for name in ("vocab_size", "hidden_size", "embedding_size", "num_hidden_layers"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} is no size; give 1 or more")
        require(0 <= self.dropout < 1, f"dropout={self.dropout} is no probability below 1; 0.0 switches it off")
        require(
            not self.tie_word_embeddings or self.embedding_size == self.hidden_size,
            f"tie_word_embeddings needs embedding_size={self.embedding_size} to be hidden_size={self.hidden_size}; "
            "leave embedding_size out, or do not tie",
        )


class LSTMCache:
    """The state of every layer after the tokens seen so far: what `generate` carries instead of keys and values.

    Attributes:
        hidden, cell: [L, B, H] each, or None before the first token.
        columns: tokens seen per row, padding included.

    A model that is given a cache reads it, and with `use_cache` writes the new state into it, as transformers' own
    caches. A state cannot be rolled back, so it has no `crop` and assisted generation is refused.
    """

    is_compileable = False  # `generate` asks
    is_croppable = False
    is_linear = (False,)  # it is asked for the columns seen, as caches of keys and values are

    def __init__(self) -> None:
        self.hidden: Float[Tensor, "L B H"] | None = None
        self.cell: Float[Tensor, "L B H"] | None = None
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, the same for every layer."""
        return self.columns

    def update(self, hidden: Float[Tensor, "L B H"], cell: Float[Tensor, "L B H"], columns: int) -> None:
        """Replace the state by the one after `columns` more columns."""
        self.hidden, self.cell = hidden, cell
        self.columns += columns

    def reset(self) -> None:
        """Forget everything."""
        self.hidden, self.cell, self.columns = None, None, 0

    def batch_select_indices(self, indices: Int[Tensor, " N"]) -> None:
        """Keep these rows, in this order."""
        if self.hidden is not None and self.cell is not None:
            rows = indices.to(self.hidden.device)
            self.hidden, self.cell = self.hidden.index_select(1, rows), self.cell.index_select(1, rows)

    def reorder_cache(self, beam_idx: Int[Tensor, " N"]) -> None:
        """The name of `batch_select_indices` in beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side."""
        if self.hidden is not None and self.cell is not None:
            self.hidden = self.hidden.repeat_interleave(repeats, 1)
            self.cell = self.cell.repeat_interleave(repeats, 1)


class Layer(nn.LSTM):
    """One LSTM layer, batch first, kept in train mode: in eval mode cuDNN refuses the backward pass.

    hfpg trains in eval mode, so that dropout is off; there is no dropout inside this module.
    """

    def __init__(self, width: int, hidden_size: int):
        super().__init__(width, hidden_size, batch_first=True)

    def train(self, mode: bool = True) -> Layer:
        """Stay in train mode, whatever is asked for."""
        return super().train(True)


def run_layer(
    layer: nn.Module,
    x: Float[Tensor, "B T W"],
    hidden: Float[Tensor, "B H"],
    cell: Float[Tensor, "B H"],
    lengths: Int[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B H"], Float[Tensor, "B H"]]:
    """Outputs of a `Layer`, and its state after the last column, or after the first `lengths` columns of every row.

    Only the final state needs lengths: outputs are causal. Ragged rows miss the CPU's fused kernel, which is two to
    five times faster, so lengths are given only where the state is wanted.
    """
    if lengths is None:
        out, (h, c) = layer(x, (hidden[None], cell[None]))
        return out, h[0], c[0]
    packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
    out, (h, c) = layer(packed, (hidden[None], cell[None]))
    out, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
    some = (lengths > 0)[:, None]  # a row of nothing but padding keeps its state
    return out, torch.where(some, h[0], hidden), torch.where(some, c[0], cell)


class LSTMPreTrainedModel(PreTrainedModel):
    """What LSTMModel and LSTMForCausalLM share: configuration, names and initial weights."""

    config_class = LSTMConfig
    base_model_prefix = "model"
    _is_stateful = True  # a state cannot be rolled back: `generate` refuses assisted generation

    def _init_weights(self, module: nn.Module) -> None:
        """Recurrent weights orthogonal and input weights Xavier, gate by gate; forget bias 1; the LM head small."""
        if isinstance(module, nn.LSTM):
            for name, parameter in module.named_parameters():
                if not getattr(parameter, "_is_hf_initialized", False):  # loaded weights stay; a gate loses the mark
                    _init_gates(name, parameter.data)
        elif isinstance(module, nn.Embedding) and not self.config.tie_word_embeddings:
            initialization.normal_(module.weight)
        else:
            super()._init_weights(module)


def _init_gates(name: str, parameter: Tensor) -> None:
    """Fill one parameter of an LSTM layer; its rows are the input, forget, cell and output gates in turn."""
    gates = parameter.chunk(4)
    for gate in gates:
        if name.startswith("weight_hh"):
            nn.init.orthogonal_(gate)
        elif name.startswith("weight_ih"):
            nn.init.xavier_uniform_(gate)
        else:
            nn.init.zeros_(gate)
    if name.startswith("bias_ih"):
        nn.init.ones_(gates[1])  # remembers from the start (the other bias, of the state, stays 0)


class LSTMModel(LSTMPreTrainedModel):
    """Embeddings and a stack of LSTM layers, without the LM head."""

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        assert config.embedding_size is not None  # filled in by the config
        # no padding_idx: it would freeze EOS where pad is EOS, and padding is never read
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        widths = [config.embedding_size] + [config.hidden_size] * (config.num_hidden_layers - 1)
        self.layers = nn.ModuleList(Layer(width, config.hidden_size) for width in widths)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LSTMCache | None = None,
        inputs_embeds: Float[Tensor, "B T E"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: LSTMCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, H] of tokens, or of their embeddings.

        Args:
            attention_mask: [B, T], or [B, tokens in the cache + T]; 0 marks padding, anywhere. A padded column leaves
                the state as it is, and its hidden state is that of the last real token before it (or the initial one).
            position_ids: accepted and not used; a recurrence knows its positions.
            past_key_values, cache: the state to start from, by the name that transformers gives it before 5.24 or by
                the one since. Default: zeros.
            use_cache: whether to return the state. Default: the config's in eval mode, False in train mode.
            output_hidden_states: also return the embeddings and the output of every layer.
            kwargs: ignored, as other models of transformers do with what they do not use.
        Raises:
            ConfigError: both or neither of `input_ids` and `inputs_embeds`, a cache of another kind, or a mask of
                another shape.
        """
        require((input_ids is None) != (inputs_embeds is None), "give one of input_ids and inputs_embeds")
        cache = past_key_values if cache is None else cache
        require(
            cache is None or isinstance(cache, LSTMCache),
            f"the cache is a {type(cache).__name__}; an LSTM reads an hfpg.lstm.LSTMCache",
        )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if inputs_embeds is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.embed_tokens(input_ids)
        mask = _padding(attention_mask, inputs_embeds, cache)
        states, hidden, cell = self._run(self.dropout(inputs_embeds), mask, cache, use_cache)
        if use_cache:
            cache = LSTMCache() if cache is None else cache
            cache.update(hidden, cell, inputs_embeds.shape[1])
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            hidden_states=(inputs_embeds, *states) if output_hidden_states else None,
            **{CACHE: cache if use_cache else None},
        )

    def _run(
        self, x: Float[Tensor, "B T E"], mask: Bool[Tensor, "B T"] | None, start: LSTMCache | None, keep_state: bool
    ) -> tuple[list[Tensor], Float[Tensor, "L B H"], Float[Tensor, "L B H"]]:
        """The output of every layer [B, T, H], and the final hidden and cell state (meaningful if `keep_state`)."""
        hidden, cell = self._initial_state(x, start)
        lengths, place = None, None
        if mask is not None:
            x, place = _real_tokens_first(x, mask)
            lengths = mask.sum(1) if keep_state else None
        outputs, h, c = [], list(hidden), list(cell)
        for index, layer in enumerate(self.layers):
            x, h[index], c[index] = run_layer(layer, x, hidden[index], cell[index], lengths)
            x = self.dropout(x)
            outputs.append(x if place is None else _put_back(x, hidden[index], place))
        return outputs, torch.stack(h), torch.stack(c)

    def _initial_state(self, x: Tensor, start: LSTMCache | None) -> tuple[Tensor, Tensor]:
        """Hidden and cell state [L, B, H] to start from: the cache's, or zeros."""
        if start is not None and start.hidden is not None and start.cell is not None:
            return start.hidden.to(x.dtype), start.cell.to(x.dtype)
        zeros = x.new_zeros(self.config.num_hidden_layers, x.shape[0], self.config.hidden_size)
        return zeros, zeros


def _padding(
    attention_mask: Tensor | None, x: Float[Tensor, "B T E"], cache: LSTMCache | None
) -> Bool[Tensor, "B T"] | None:
    """True at real tokens among the T new ones; None when all of them are real."""
    if attention_mask is None:
        return None
    batch, new = x.shape[:2]
    seen = 0 if cache is None else cache.get_seq_length()
    require(
        tuple(attention_mask.shape) in {(batch, new), (batch, seen + new)},
        f"attention_mask has the shape {tuple(attention_mask.shape)}; give {(batch, seen + new)}: 1 at tokens, 0 at "
        "padding",
    )
    mask = attention_mask[:, -new:].bool()
    return None if bool(mask.all()) else mask


def _real_tokens_first(
    x: Float[Tensor, "B T W"], mask: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B N W"], Int[Tensor, "B T"]]:
    """The real tokens of every row at its front, N the most of any row; and how many of them each column has seen."""
    order = mask.long().argsort(dim=1, descending=True, stable=True)
    place = mask.long().cumsum(1)
    longest = max(1, int(place[:, -1].max()))
    return x.gather(1, order[:, :longest, None].expand(-1, -1, x.shape[2])), place


def _put_back(
    out: Float[Tensor, "B N H"], start: Float[Tensor, "B H"], place: Int[Tensor, "B T"]
) -> Float[Tensor, "B T H"]:
    """Every column's hidden state: that after the `place` real tokens it has seen, `start` after none."""
    after = torch.cat([start[:, None], out], 1)
    return after.gather(1, place[:, :, None].expand(-1, -1, out.shape[2]))


class LSTMForCausalLM(LSTMPreTrainedModel, GenerationMixin):
    """An LSTM with an LM head (weight and bias): logits at position t depend on tokens up to t alone."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.model = LSTMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LSTMCache | None = None,
        inputs_embeds: Float[Tensor, "B T E"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Int[Tensor, " N"] = 0,
        cache: LSTMCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], and the loss where labels are given. Arguments as for `LSTMModel.forward`, and:

        Args:
            labels: token ids, not shifted, −100 where there is nothing to predict. The loss is the mean cross-entropy
                in nats per predicted token, computed in fp32 as for all models of transformers.
            logits_to_keep: logits of the last N positions only (0: all), or of the positions given.
            kwargs: passed on to the loss, such as `num_items_in_batch`: the denominator in place of the token count.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cache=cache,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )

    # ── what `generate` asks for

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: the cache is not of keys and values (a `cache_implementation` is ignored with a warning)."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Put an empty state into `model_kwargs`, unless one was given or none is wanted."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = LSTMCache()


AutoConfig.register(LSTMConfig.model_type, LSTMConfig, exist_ok=True)
AutoModel.register(LSTMConfig, LSTMModel, exist_ok=True)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM, exist_ok=True)

"""The LSTM language model: causal, blind to padding, the same with and without its cache, a full PreTrainedModel."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from hfpg.config import ConfigError
from hfpg.lstm import CACHE, LSTMCache
from hfpg.models import ActorCritic, LSTMConfig, LSTMForCausalLM, LSTMModel
from tests import tiny


LENGTH = 9
# The kernel rounds a batch of another size otherwise, and the enlarged weights of the tiny model magnify it to 2e-6 in
# float32, with and without padding; in float64 nothing of it is left.
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5)]


def tokens(rows: int = 3, length: int = LENGTH, seed: int = 1) -> Tensor:
    """Random token ids, EOS (0) left out."""
    return torch.randint(1, tiny.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: Tensor, widths: list[int], pad: int = 0) -> tuple[Tensor, Tensor]:
    """The first tokens of every row, as many as its width says, at the right end; and their mask."""
    out, mask = torch.full_like(ids, pad), torch.zeros_like(ids)
    for row, width in enumerate(widths):
        out[row, ids.shape[1] - width :], mask[row, ids.shape[1] - width :] = ids[row, :width], 1
    return out, mask


def cell_by_cell(model: LSTMForCausalLM, ids: Tensor) -> Tensor:
    """The definition, by the equations of the LSTM: logits [B, T, V]."""
    x = model.model.embed_tokens.weight[ids]
    for layer in model.model.layers:
        h = c = x.new_zeros(len(ids), layer.hidden_size)
        out = []
        for t in range(ids.shape[1]):
            gates = x[:, t] @ layer.weight_ih_l0.T + layer.bias_ih_l0 + h @ layer.weight_hh_l0.T + layer.bias_hh_l0
            i, f, g, o = gates.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            out.append(h)
        x = torch.stack(out, 1)
    return x @ model.lm_head.weight.T + model.lm_head.bias


# ── the forward pass


def test_it_is_the_lstm_of_the_equations():
    model = tiny.model("lstm").double()
    torch.testing.assert_close(model(tokens()).logits, cell_by_cell(model, tokens()), atol=1e-12, rtol=0)


@pytest.mark.parametrize("at", range(LENGTH))
def test_logits_depend_on_no_later_token(at: int):
    model, ids = tiny.model("lstm"), tokens()
    changed = ids.clone()
    changed[:, at] = changed[:, at] % (tiny.VOCABULARY - 1) + 1
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :at], after[:, :at])
    assert (before[:, at:] - after[:, at:]).abs().amax(2).min() > 1e-6, "every later position does depend on it"


@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_left_padded_row_is_the_row_alone(use_cache: bool, dtype: torch.dtype, atol: float):
    """Also with `use_cache`, which takes another path to the final state, and for a row of one token."""
    model, ids, widths = tiny.model("lstm").to(dtype), tokens(), [LENGTH, 4, 1]
    padded, mask = left_padded(ids, widths)
    found = model(padded, attention_mask=mask, use_cache=use_cache)
    for row, width in enumerate(widths):
        alone = model(ids[row : row + 1, :width], use_cache=True)
        torch.testing.assert_close(found.logits[row, -width:], alone.logits[0], atol=atol, rtol=0)
        if use_cache:
            for name in ("hidden", "cell"):
                one, other = getattr(found[CACHE], name), getattr(alone[CACHE], name)
                torch.testing.assert_close(one[:, row], other[:, 0], atol=atol, rtol=0)


def test_padding_changes_no_bit_in_float32():
    """The same rows in a batch of the same size: whatever padding may do is not rounding."""
    model, ids, widths = tiny.model("lstm"), tokens(), [LENGTH, 4, 1]
    padded, mask = left_padded(ids, widths)
    whole, found = model.model(ids).last_hidden_state, model.model(padded, attention_mask=mask, use_cache=False)
    for row, width in enumerate(widths):
        assert torch.equal(found.last_hidden_state[row, -width:], whole[row, :width])


def test_a_fresh_model_keeps_left_padded_rows_to_a_millionth_in_float32():
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, initializer_range=0.5)).eval()
    ids, widths = tokens(), [LENGTH, 4, 1]
    padded, mask = left_padded(ids, widths)
    found = model(padded, attention_mask=mask).logits
    for row, width in enumerate(widths):
        torch.testing.assert_close(found[row, -width:], model(ids[row : row + 1, :width]).logits[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("use_cache", [False, True])
def test_padding_anywhere_leaves_the_state_as_it_is(use_cache: bool):
    """Left, right, in the middle, and a row of nothing else; a padded column repeats the state before it."""
    model, ids = tiny.model("lstm").double(), tokens(4, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 1, 1, 0], [0] * 7])
    found = model.model(ids, attention_mask=mask, use_cache=use_cache, output_hidden_states=True)
    for row in range(3):
        real = mask[row].nonzero()[:, 0]
        alone = model.model(ids[row : row + 1, real], output_hidden_states=True)
        for layer, hidden in enumerate(found.hidden_states[1:]):
            states = alone.hidden_states[layer + 1][0]
            expected = torch.cat([torch.zeros_like(states[:1]), states])[mask[row].cumsum(0)]
            torch.testing.assert_close(hidden[row], expected, atol=1e-12, rtol=0)
    assert not found.last_hidden_state[3].any()


def test_what_stands_in_the_padding_has_no_say_and_gets_no_gradient():
    model, (ids, mask) = tiny.model("lstm"), left_padded(tokens(), [LENGTH, 4, 1])
    other = torch.where(mask.bool(), ids, 33)
    assert torch.equal(model(ids, attention_mask=mask).logits, model(other, attention_mask=mask).logits)
    embeds = model.get_input_embeddings()(ids).detach()
    embeds = torch.where(mask[..., None].bool(), embeds, math.nan).requires_grad_()
    model(inputs_embeds=embeds, attention_mask=mask, use_cache=True).logits[mask.bool()].sum().backward()
    assert not embeds.grad[~mask.bool()].any() and torch.isfinite(embeds.grad).all()
    assert embeds.grad[mask.bool()].any(1).all()


def test_logits_to_keep_embeddings_hidden_states_and_tuples():
    model, ids = tiny.model("lstm").double(), tokens()
    whole = model(ids, output_hidden_states=True)
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-12, rtol=0)  # noqa: E731
    close(model(ids, logits_to_keep=2).logits, whole.logits[:, -2:])
    close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, whole.logits[:, [1, 4]])
    close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, whole.logits)
    close(model(ids, position_ids=torch.arange(LENGTH)[None] + 5).logits, whole.logits)
    assert [h.shape[2] for h in whole.hidden_states] == [16, 32, 32]
    assert torch.equal(whole.hidden_states[-1], model.model(ids).last_hidden_state)
    close(model.get_output_embeddings()(whole.hidden_states[-1]), whole.logits)
    as_tuple = model(ids, return_dict=False, use_cache=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], whole.logits)
    assert model(ids).get(CACHE) is not None and model(ids, use_cache=False).get(CACHE) is None
    assert copy.deepcopy(model).train()(ids).get(CACHE) is None, "in train mode the state is not asked for"


def test_dropout_acts_in_train_mode_alone():
    model, ids = tiny.model("lstm", dropout=0.5), tokens()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    for output in model(ids, output_hidden_states=True).hidden_states[1:]:
        assert 0.3 < (output == 0).float().mean() < 0.7, "half of every layer's output is dropped"
    assert torch.equal(model.eval()(ids).logits, tiny.model("lstm")(ids).logits)


def test_a_fresh_model_is_almost_uniform_and_remembers():
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=50, hidden_size=24))
    p = model(torch.arange(50)[None]).logits.softmax(-1)
    assert -(p * p.log()).sum(-1).min() > math.log(50) - 0.01
    layer = model.model.layers[1]
    assert (layer.bias_ih_l0[24:48] == 1).all() and layer.bias_ih_l0.sum() == 24 and not layer.bias_hh_l0.any()
    for gate in layer.weight_hh_l0.chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(24), atol=1e-5, rtol=0)


# ── bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(tie_word_embeddings=True, embedding_size=8), "embedding_size=8 to be hidden_size=512"),
        (dict(num_hidden_layers=0), "num_hidden_layers=0 is no size"),
        (dict(dropout=1.0), "dropout=1.0 is no probability"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        LSTMConfig(**settings)


def test_inputs_that_do_not_fit_are_refused():
    model, ids = tiny.model("lstm"), tokens()
    with pytest.raises(ConfigError, match="give one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ConfigError, match=r"has the shape \(3, 4\); give \(3, 9\)"):
        model(ids, attention_mask=torch.ones(3, 4))
    with pytest.raises(ConfigError, match="the cache is a tuple; an LSTM reads an hfpg.lstm.LSTMCache"):
        model(ids, past_key_values=())


# ── the cache and generate


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("cuts", [[4], [1, 2, 8], list(range(1, LENGTH))])
def test_parts_through_the_cache_are_the_whole(cuts: list[int], name: str):
    """A cut may leave a row with nothing but padding on one side. Transformers has had two names for the cache."""
    model, (ids, mask) = tiny.model("lstm").double(), left_padded(tokens(), [LENGTH, 4, 1])
    whole, cache, parts = model(ids, attention_mask=mask).logits, LSTMCache(), []
    for start, stop in zip([0, *cuts], [*cuts, LENGTH], strict=True):
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **{name: cache})
        assert out[CACHE] is cache and cache.get_seq_length() == stop
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)


def test_without_use_cache_a_given_state_is_read_and_left_alone():
    model, ids = tiny.model("lstm").double(), tokens()
    cache = model(ids[:, :5], use_cache=True)[CACHE]
    hidden = cache.hidden.clone()
    logits = model(ids[:, 5:], past_key_values=cache, use_cache=False).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 5:], atol=1e-12, rtol=0)
    assert torch.equal(cache.hidden, hidden) and cache.get_seq_length() == 5


def test_rows_of_a_cache_can_be_chosen_repeated_and_forgotten():
    cache = tiny.model("lstm")(tokens(), use_cache=True)[CACHE]
    hidden, cell = cache.hidden, cache.cell
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.hidden, hidden[:, [0, 0, 1, 1, 2, 2]]) and torch.equal(cache.cell[:, ::2], cell)
    cache.reorder_cache(torch.tensor([4, 0]))
    assert torch.equal(cache.hidden, hidden[:, [2, 0]]) and torch.equal(cache.cell, cell[:, [2, 0]])
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.hidden is None


@pytest.mark.parametrize(
    "how",
    [
        dict(do_sample=False),
        dict(do_sample=True, num_return_sequences=3, top_k=0),
        dict(do_sample=True, temperature=0.7, top_p=0.9),
        dict(do_sample=False, num_beams=3),
    ],
)
def test_generate_gives_the_same_tokens_with_and_without_the_cache(how: dict):
    model, (ids, mask) = tiny.model("lstm").double(), left_padded(tokens(), [LENGTH, 4, 1])
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, pad_token_id=0, use_cache=use_cache, **({"top_k": 0} | how)
        )
        found.append(out)
    assert torch.equal(*found)
    assert found[0].shape[0] == 3 * how.get("num_return_sequences", 1) and found[0].shape[1] > LENGTH + 1


def test_a_padded_prompt_is_continued_as_it_is_alone():
    model, ids, widths = tiny.model("lstm", eos_token_id=None).double(), tokens(), [LENGTH, 4, 1]
    padded, mask = left_padded(ids, widths)
    settings = dict(max_new_tokens=10, do_sample=False, pad_token_id=0)
    together = model.generate(padded, attention_mask=mask, **settings)[:, LENGTH:]
    for row, width in enumerate(widths):
        alone = model.generate(ids[row : row + 1, :width], **settings)[0, width:]
        assert torch.equal(together[row], alone)


def test_generate_in_chunks_from_embeddings_and_from_a_state():
    model, (ids, mask) = tiny.model("lstm").double(), left_padded(tokens(), [LENGTH, 4, 1])
    settings = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, **settings)
    assert torch.equal(plain, model.generate(ids, prefill_chunk_size=2, **settings))
    assert torch.equal(plain, model.generate(ids, cache_implementation="static", **settings))
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(plain[:, LENGTH:], model.generate(inputs_embeds=embeds, **settings))
    cache = LSTMCache()
    model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache, use_cache=True)
    assert torch.equal(plain, model.generate(ids, **{CACHE: cache}, **settings))
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids[:1], assistant_model=model, max_new_tokens=2)


# ── derivatives


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_hessian_vector_product_is_the_difference_of_gradients_in_float64(padded: bool, use_cache: bool):
    model = tiny.model("lstm").double()
    ids, mask = left_padded(tokens(), [LENGTH, 4, 2] if padded else [LENGTH] * 3)
    parameters = list(model.parameters())
    g = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in parameters]

    def gradient(create_graph: bool = False) -> tuple[Tensor, ...]:
        logp = model(ids, attention_mask=mask, use_cache=use_cache).logits[:, :-1].log_softmax(-1)
        chosen = logp.gather(2, ids[:, 1:, None])[..., 0] * mask[:, :-1]
        return torch.autograd.grad(chosen.exp().sum() + chosen.sum(), parameters, create_graph=create_graph)

    slope = sum((a * b).sum() for a, b in zip(gradient(True), direction, strict=True))
    product = torch.autograd.grad(slope, parameters)
    step, sides = 1e-5, []
    for sign in (step, -2 * step):
        with torch.no_grad():
            for parameter, change in zip(parameters, direction, strict=True):
                parameter.add_(sign * change)
        sides.append(gradient())
    for exact, above, below in zip(product, *sides, strict=True):
        torch.testing.assert_close(exact, (above - below) / (2 * step), atol=1e-5, rtol=1e-5)


def test_second_derivatives_in_float32_are_those_of_float64():
    """float32 runs the fused kernel, which has a double backward of its own."""
    products = []
    for dtype in (torch.float64, torch.float32):
        model = tiny.model("lstm").to(dtype)
        ids, mask = left_padded(tokens(), [LENGTH, 4, 2])
        logits = model(ids, attention_mask=mask).logits
        gradient = torch.autograd.grad(logits.square().sum(), model.parameters(), create_graph=True)
        again = torch.autograd.grad(sum(x.square().sum() for x in gradient), model.parameters())
        products.append(torch.cat([x.flatten() for x in again]).double())
    assert (products[0] - products[1]).norm() < 1e-4 * products[0].norm()


def test_gradients_pass_through_padding_as_if_it_were_not_there():
    model, ids, widths = tiny.model("lstm").double(), tokens(), [LENGTH, 4, 1]
    padded, mask = left_padded(ids, widths)
    parameters = list(model.parameters())
    together = torch.autograd.grad(model(padded, attention_mask=mask).logits[mask.bool()].sin().sum(), parameters)
    alone = sum(model(ids[row : row + 1, :width]).logits.sin().sum() for row, width in enumerate(widths))
    for one, other in zip(together, torch.autograd.grad(alone, parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


# ── loss, training, saving


def test_the_loss_is_the_cross_entropy_of_the_next_token():
    model, ids = tiny.model("lstm"), tokens()
    labels = ids.clone()
    labels[:, :3], labels[1, 5:] = -100, -100
    out = model(ids, labels=labels)
    counted = labels[:, 1:] != -100
    nll = cross_entropy(out.logits[:, :-1][counted], labels[:, 1:][counted], reduction="sum")
    torch.testing.assert_close(out.loss, nll / counted.sum())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss, nll / 50)


class Counting(Dataset):
    """Rows that count upwards from a random word: all but the first token can be known."""

    def __init__(self) -> None:
        start = torch.arange(64) % 30 + 1
        self.ids = start[:, None] + torch.arange(8)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_transformers_trainer_lowers_the_nll(tmp_path):
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=1))
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=60, per_device_train_batch_size=16, gradient_accumulation_steps=2,
        learning_rate=3e-2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=Counting(), eval_dataset=Counting())
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(math.log(tiny.VOCABULARY), abs=0.05), "a fresh model is uniform"
    assert after < 0.5 * before


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True, embedding_size=32)])
def test_it_is_saved_and_loaded_by_the_auto_classes(changes: dict, tmp_path):
    model, ids = tiny.model("lstm", **changes), tokens()
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is LSTMForCausalLM and not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(again(ids).logits, model(ids).logits)
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied == bool(changes)
    trunk = AutoModel.from_pretrained(tmp_path)
    assert type(trunk) is LSTMModel and torch.equal(trunk(ids).last_hidden_state, model.model(ids).last_hidden_state)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is LSTMConfig and config.embedding_size == changes.get("embedding_size", 16)


def test_a_checkpoint_that_lacks_a_tensor_keeps_all_the_others():
    """Initial weights are made gate by gate, where transformers cannot see that a tensor was loaded."""
    model = tiny.model("lstm")
    missing = "model.layers.0.bias_ih_l0"
    partial = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != missing}
    given = {name: tensor.clone() for name, tensor in partial.items()}  # the loaded model shares memory with it
    again = LSTMForCausalLM.from_pretrained(None, config=model.config, state_dict=given)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, partial.get(name, torch.eye(4)[1].repeat_interleave(32))), name


def test_the_vocabulary_can_grow():
    model, ids = tiny.model("lstm"), tokens()
    before = model(ids).logits
    model.resize_token_embeddings(tiny.VOCABULARY + 3)
    torch.testing.assert_close(model(ids).logits[..., : tiny.VOCABULARY], before)
    assert model(torch.tensor([[tiny.VOCABULARY + 2]])).logits.shape == (1, 1, tiny.VOCABULARY + 3)


def test_actor_critic_scores_it_by_the_chunked_head():
    assert ActorCritic(tiny.model("lstm"), "separate").chunked_head

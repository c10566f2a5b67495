"""hfpg's decode loop against its plain twin, transformers' own loop: the same tokens, for less work."""

import logging
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CohereConfig, CohereForCausalLM, GPT2Config, GPT2LMHeadModel

from hfpg.data import PromptData
from hfpg.generation import decoding, loop
from hfpg.generation.hf import HFGenerator, most_rows
from hfpg.generation.slab import SlabLayer
from hfpg.models import ActorCritic
from hfpg.types import Prompts, Samples
from tests import tiny


STOPS = [0, 5, 9, 11]
LOOPED = ("gpt2", "llama", "qwen2", "opt", "gemma2", "cohere")


def build(kind: str, **changes: Any) -> Any:
    """A tiny model that the loop can decode; Gemma-2 caps its logits, Cohere scales them, both after the head."""
    if kind == "gemma2":
        return tiny.model("gemma2", layer_types=["full_attention"] * 2, **changes)
    if kind != "cohere":
        return tiny.model(kind, **changes)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    made = CohereForCausalLM(CohereConfig(vocab_size=tiny.VOCABULARY, logit_scale=0.3, **sizes, **ids))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4 if parameter.dim() >= 2 else 1)
    return made.eval()


def prompts(lengths: list[int], copies: int = 1, vocabulary: int = tiny.VOCABULARY) -> Prompts:
    """Left-padded prompts of the given lengths, each in so many rows."""
    width, count = max(lengths), len(lengths) * copies
    tokens = torch.randint(2, vocabulary, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return Prompts(
        ids=(tokens * mask).repeat_interleave(copies, 0),
        mask=mask.repeat_interleave(copies, 0),
        sample_ids=torch.arange(count),
        group_ids=torch.arange(len(lengths)).repeat_interleave(copies),
        texts=[""] * count,
        columns={},
    )


RAGGED, EQUAL = [3, 9, 1, 5, 9, 2], [4] * 6


def draw(policy: Any, rows: Prompts, own_loop: bool, tokenizer: Any = None, greedy: bool = False, **options: Any):
    """Samples, and the generator that drew them."""
    settings = dict(seed=3, max_completion_length=20, stop_token_ids=STOPS) | options
    generator = HFGenerator(tokenizer, **settings)
    generator.own_loop = own_loop
    return generator(policy, rows, greedy=greedy), generator


def assert_same(ours: Samples, theirs: Samples, atol: float = 1e-5) -> None:
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "finished", "sample_ids"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert (ours.kept is None) == (theirs.kept is None)
    if ours.kept is not None:
        assert torch.equal(ours.kept[ours.completion_mask], theirs.kept[ours.completion_mask])
    for name in ("sampler_logprobs", "sampler_entropy", "sampler_values"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert not a[~ours.completion_mask].any(), f"{name} is 0 outside the mask"
            torch.testing.assert_close(a, b, atol=atol, rtol=0, check_dtype=False)


def both(policy: Any, rows: Prompts, **options: Any) -> Samples:
    """Samples of the loop, after they have been compared with those of the stock loop."""
    ours, generator = draw(policy, rows, True, **options)
    assert not generator._told, "the loop must not have fallen back"
    assert_same(ours, draw(policy, rows, False, **options)[0])
    return ours


# ── the same tokens


@pytest.mark.parametrize("kind", LOOPED)
@pytest.mark.parametrize("lengths", [RAGGED, EQUAL], ids=["ragged", "equal"])
@pytest.mark.parametrize("copies", [1, 8])
def test_the_loop_draws_what_the_stock_loop_draws(kind: str, lengths: list[int], copies: int):
    samples = both(build(kind), prompts(lengths, copies))
    assert samples.finished.any(), "rows must leave the batch for this test to mean anything"


@pytest.mark.parametrize("kind", ["gpt2", "cohere"])
@pytest.mark.parametrize(
    "law", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.4}, {"top_k": 20, "top_p": 0.9}]
)
def test_temperature_and_kept_sets(kind: str, law: dict[str, Any]):
    samples = both(build(kind), prompts(RAGGED, 4), **law)
    assert (samples.kept is None) == (set(law) == {"temperature"})


def test_greedy():
    samples = both(build("llama"), prompts(RAGGED, 2), greedy=True)
    assert torch.equal(samples.completion_ids[::2], samples.completion_ids[1::2])


@pytest.mark.parametrize("stops", [[], [3, 7]])
def test_stop_strings(stops: list[int]):
    """Strings of two and three tokens that do occur, and one that does not."""
    tokenizer, model = tiny.byte_tokenizer(), build("gpt2", vocabulary=257)
    data = PromptData([{"prompt": "go " * (1 + i % 3) + chr(97 + i)} for i in range(12)], tokenizer)
    rows = data.rows(range(12), torch.arange(24), 2, "cpu")
    options = dict(tokenizer=tokenizer, stop_token_ids=stops, temperature=2.0, max_completion_length=40)
    free = both(model, rows, **options)
    texts = [tokenizer.decode(ids[mask]) for ids, mask in zip(free.completion_ids, free.completion_mask, strict=True)]
    parts = [text[at : at + length] for text in texts for at, length in ((4, 2), (9, 3))]
    words = [word for word in parts if len(word) > 1 and word.isascii() and word.isprintable()]
    assert len(words) > 3
    stopped = both(model, rows, stop_strings=[*words, "zz"], **options)
    assert stopped.finished.sum() > free.finished.sum() and not stopped.finished.all()


def test_an_adapter_is_active():
    base = build("llama")
    plain = both(base, prompts(RAGGED, 4))
    torch.manual_seed(1)
    adapter = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    adapted = both(get_peft_model(base, adapter).eval(), prompts(RAGGED, 4))
    assert plain.completion_ids.shape != adapted.completion_ids.shape or not torch.equal(
        plain.completion_ids, adapted.completion_ids
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "cohere"])
def test_float64_stays_float64(kind: str):
    """The stock loop rounds logits to fp32, so the scoring forward is the measure here."""
    actor = ActorCritic(build(kind).double())
    samples = both(actor.policy, prompts(RAGGED, 4), temperature=0.9)
    scored = score(actor, samples, temperature=0.9)
    for ours, theirs in ((samples.sampler_logprobs, scored.logprobs), (samples.sampler_entropy, scored.entropy)):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool):
    """With nothing shared and nothing dropped the arithmetic is the stock loop's, so the tokens are too."""
    model = build("llama") if autocast else build("llama").bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        samples = both(model, prompts(EQUAL), stop_token_ids=[])
        shared = draw(model, prompts(RAGGED, 8), True)[0]
    assert samples.sampler_logprobs.dtype == shared.sampler_logprobs.dtype == torch.float32
    assert shared.sampler_logprobs.isfinite().all() and shared.finished.any()


@pytest.mark.parametrize(
    "options",
    [
        {"max_completion_length": 1},
        {"stop_token_ids": list(range(tiny.VOCABULARY))},
        {"stop_token_ids": []},
        {"max_tokens": 1},
        {"max_tokens": 100},
    ],
    ids=["one token", "all finish at once", "none finishes", "a call per row", "several calls"],
)
@pytest.mark.parametrize("copies", [1, 3])
def test_the_edges(options: dict[str, Any], copies: int):
    samples = both(build("qwen2"), prompts(RAGGED, copies), **options)
    assert samples.completion_mask[:, 0].all(), "every row has a token"


def test_a_batch_of_one():
    assert len(both(build("gpt2"), prompts([5]))) == 1
    assert len(both(build("gpt2"), prompts(RAGGED, 4).take(torch.tensor([2])))) == 1


def test_calls_do_not_move_a_token():
    model, rows = build("gpt2"), prompts(RAGGED, 8)
    whole = draw(model, rows, True)[0]
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    back = draw(model, rows.take(shuffled), True, max_tokens=150)[0].take(shuffled.argsort())
    assert_same(back, whole)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of keys and values that holds NaN before it is filled."""
    plain = SlabLayer.lazy_initialization

    def poisoned(self: SlabLayer, *states: torch.Tensor) -> None:
        plain(self, *states)
        for slab in self.slabs:
            slab.fill_(torch.nan)

    monkeypatch.setattr(SlabLayer, "lazy_initialization", poisoned)


def test_what_memory_held_before_does_not_matter(monkeypatch: pytest.MonkeyPatch):
    """A masked column has weight 0, and 0 times NaN is NaN."""
    poison(monkeypatch)
    assert both(build("gpt2"), prompts(RAGGED, 4)).sampler_logprobs.isfinite().all()


# ── what is captured on the way


def score(actor: ActorCritic, samples: Samples, **options: Any) -> Any:
    columns = (samples.prompt_ids, samples.prompt_mask, samples.completion_ids, samples.completion_mask)
    with torch.no_grad():
        return actor(*columns, with_entropy=True, kept=samples.kept, **options)


@pytest.mark.parametrize("own_loop", [True, False])
@pytest.mark.parametrize("kind", [*LOOPED, "lstm", "mistral"])
def test_values_and_entropy_are_those_of_the_scoring_forward(kind: str, own_loop: bool):
    actor = ActorCritic(build(kind), "shared")
    torch.nn.init.normal_(actor.value.linear.weight)
    samples, _ = draw(actor.policy, prompts(RAGGED, 4), own_loop, value_head=actor.value, temperature=0.8)
    scored = score(actor, samples, temperature=0.8)
    torch.testing.assert_close(samples.sampler_logprobs, scored.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(samples.sampler_entropy, scored.entropy, atol=1e-5, rtol=0)
    torch.testing.assert_close(samples.sampler_values, scored.values, atol=1e-5, rtol=1e-5)


def test_entropy_is_that_of_the_kept_set():
    actor = ActorCritic(build("gpt2"))
    samples = both(actor.policy, prompts(RAGGED, 4), top_k=3)
    assert 0 < samples.sampler_entropy.max() <= torch.tensor(3.0).log()
    torch.testing.assert_close(samples.sampler_entropy, score(actor, samples).entropy, atol=1e-5, rtol=0)


def test_no_value_head_no_values():
    assert draw(build("gpt2"), prompts(EQUAL), True)[0].sampler_values is None


# ── for less work


def positions_computed(model: Any, rows: Prompts, **options: Any) -> tuple[list[tuple[int, int]], Samples]:
    """The shape of every batch that the model gets."""
    shapes: list[tuple[int, int]] = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    samples, _ = draw(model, rows, True, **options)
    handle.remove()
    return shapes, samples


def test_a_prompt_is_read_once_for_its_samples():
    shapes, _ = positions_computed(build("gpt2"), prompts(EQUAL, 8))
    assert shapes[0] == (6, 4) and all(columns == 1 for _, columns in shapes[1:])


def test_the_same_prompt_in_two_groups_is_read_for_each():
    rows = prompts([4, 4], 2)
    same = Prompts(rows.ids[[0, 0, 0, 0]], rows.mask, rows.sample_ids, rows.group_ids, rows.texts, {})
    shapes, _ = positions_computed(build("gpt2"), same)
    assert shapes[0] == (2, 4)


def test_rows_share_a_prompt_if_ids_padding_and_group_are_the_same():
    ids, groups = torch.tensor([[0, 3]] * 5), torch.tensor([4, 4, 4, 4, 5])
    mask = torch.tensor([[0, 1], [0, 1], [1, 1], [1, 1], [1, 1]])
    assert loop.shared(ids, mask, groups) == [2, 2, 1] and loop.shared(ids, None, groups) == [4, 1]
    assert loop.shared(ids[:1], None, groups[:1]) == [1]


def test_prompts_are_read_with_little_padding(monkeypatch: pytest.MonkeyPatch):
    lengths = [9, 2, 40, 3, 38, 2, 10, 41]
    monkeypatch.setattr(decoding, "PADDING", 6)
    shapes, _ = positions_computed(build("gpt2"), prompts(lengths, 2))
    read = [rows * columns for rows, columns in shapes if columns > 1]
    assert sum(lengths) <= sum(read) <= sum(lengths) + 6 * len(read) and len(read) == 3


def test_finished_rows_are_not_computed():
    shapes, samples = positions_computed(build("gpt2"), prompts(EQUAL, 8))
    lengths = samples.completion_mask.sum(1)
    steps = [rows for rows, _ in shapes[1:]]
    assert len(steps) == int(lengths.max()) - 1
    for step, rows in enumerate(steps, start=1):
        live = int((lengths > step).sum())
        assert live <= rows <= decoding.decode_rows(live)
    assert sum(steps) < 0.8 * len(samples) * len(steps)


def test_sizes_are_few_and_close():
    sizes = {decoding.decode_rows(rows) for rows in range(1, 1025)}
    assert all(rows <= decoding.decode_rows(rows) <= max(rows + 3, 1.5 * rows) for rows in range(1, 1025))
    assert len([size for size in sizes if size <= decoding.MANY]) < 18 and decoding.decode_rows(1) == 1
    assert all(decoding.decode_rows(rows) <= 1.125 * rows + 1 for rows in range(decoding.MANY + 1, 5000))


@pytest.mark.parametrize("budget", [1, 60, 200, 10_000])
def test_calls_keep_the_budget_and_groups_whole(budget: int):
    lengths = [2] * 3 + [5] * 7 + [5] * 2 + [30] * 4
    groups = [0] * 3 + [1] * 7 + [2] * 2 + [3] * 4
    generator = HFGenerator(None, seed=0, max_completion_length=10, max_tokens=budget)
    calls = generator._calls(lengths, groups, most=100)
    assert [row for call in calls for row in range(call.start, call.stop)] == list(range(len(lengths)))
    for call in calls:
        rows, longest = call.stop - call.start, lengths[call.stop - 1]
        assert rows * (longest + 10) <= budget or rows == 1
        if call.start > 0 and groups[call.start] == groups[call.start - 1]:
            assert groups.count(groups[call.start]) * (longest + 10) > budget, "only a group too large is cut"


def test_calls_are_of_even_size_where_logits_are_large():
    model = build("gpt2", vocabulary=200_000, n_embd=2, n_layer=1)
    assert [most_rows(model, rows) for rows in (1, 64, 65, 200)] == [1, 64, 33, 50]
    assert most_rows(build("gpt2"), 5000) == 5000


# ── what it cannot do


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("lstm", {}, "LSTMForCausalLM has a LSTMCache, not a DynamicCache"),
        ("mistral", {}, "layers of another kind than full attention .*DynamicSlidingWindowLayer"),
        ("gpt2", {"use_cache": False}, "GPT2LMHeadModel is run without a cache"),
        ("gpt2", {"cache_implementation": "static", "disable_compile": True}, "has a StaticCache"),
        ("gpt2", {"prefill_chunk_size": 2}, "prefill_chunk_size=2 is set"),
    ],
)
def test_the_stock_loop_takes_over_and_says_so_once(
    kind: str, options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
):
    model, rows = build(kind), prompts(RAGGED, 2)
    generator = HFGenerator(
        None, seed=3, max_completion_length=20, stop_token_ids=STOPS, generation_kwargs=options, max_tokens=200
    )
    with caplog.at_level(logging.INFO, logger="hfpg.generation.hf"):
        ours = generator(model, rows)
        generator(model, rows)
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("completions are drawn by transformers' own decode loop")
    assert re.search(reason, caplog.records[0].getMessage())
    assert_same(ours, draw(model, rows, False)[0])


def test_a_model_that_prepares_its_own_steps_is_left_alone():
    class Own(GPT2LMHeadModel):
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            return super().prepare_inputs_for_generation(*args, **kwargs)

    torch.manual_seed(0)
    ids = dict(bos_token_id=0, eos_token_id=0, pad_token_id=None)
    model = Own(GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=96, **ids)).eval()
    samples, generator = draw(model, prompts(RAGGED, 2), True)
    assert generator._told
    assert_same(samples, draw(model, prompts(RAGGED, 2), False)[0])

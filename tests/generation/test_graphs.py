"""Steps of fixed shape, as a GPU replays them: the tokens of the stock loop. Here Python takes them one by one."""

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, StopStringCriteria

from hfpg.generation import graphs, loop
from hfpg.generation.graphs import PATIENCE, WINDOW, Recorder, ReplayedDecoding, differ, stands_still
from hfpg.generation.slab import SlabLayer
from hfpg.generation.stock import Finished
from hfpg.models import ActorCritic
from tests import tiny
from tests.generation.test_loop import (
    EQUAL,
    LOOPED,
    RAGGED,
    STOPS,
    assert_same,
    both,
    build,
    draw,
    poison,
    prompts,
    score,
)


FIXED = [kind for kind in LOOPED if kind != "gemma2"]  # whose attention is "eager"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """On a CPU too. Rows and window of every recording, as it would be made."""
    taken: list[tuple[int, int]] = []
    plain = ReplayedDecoding._recorded

    def counted(self: ReplayedDecoding) -> Any:
        if taken[-1:] != [(len(self.tokens), self.window)]:  # a CPU has no recording, and is asked for one again
            taken.append((len(self.tokens), self.window))
        return plain(self)

    monkeypatch.setattr(loop, "stands_still", lambda *_: True)
    monkeypatch.setattr(ReplayedDecoding, "_recorded", counted)
    return taken


@pytest.mark.parametrize("kind", FIXED)
@pytest.mark.parametrize("lengths", [RAGGED, EQUAL], ids=["ragged", "equal"])
@pytest.mark.parametrize("copies", [1, 8])
def test_fixed_steps_draw_what_the_stock_loop_draws(steps, kind: str, lengths: list[int], copies: int):
    samples = both(build(kind), prompts(lengths, copies))
    assert samples.finished.any() and len(steps) > 0
    assert samples.completion_mask.any(0).all(), "no column of which no row has a token"


@pytest.mark.parametrize(
    "law", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.4}, {"top_k": 20, "top_p": 0.9}]
)
def test_temperature_and_kept_sets(steps, law: dict[str, Any]):
    both(build("gpt2"), prompts(RAGGED, 4), **law)
    assert steps


@pytest.mark.parametrize(
    "options",
    [
        {"max_completion_length": 1},
        {"max_completion_length": 2},
        {"stop_token_ids": list(range(tiny.VOCABULARY))},
        {"stop_token_ids": []},
        {"max_completion_length": PATIENCE + 1},
        {"max_completion_length": 80, "stop_token_ids": STOPS[:1]},
        {"max_tokens": 100},
        {"max_completion_length": 300},
    ],
)
@pytest.mark.parametrize("copies", [1, 3])
def test_the_edges(steps, options: dict[str, Any], copies: int):
    samples = both(build("qwen2"), prompts(RAGGED, copies), **options)
    assert samples.completion_mask[:, 0].all() and samples.completion_mask.any(0).all()
    assert options != {"max_completion_length": 300} or samples.finished.all(), "long before the limit"


def test_greedy(steps):
    samples = both(build("llama"), prompts(RAGGED, 2), greedy=True)
    assert torch.equal(samples.completion_ids[::2], samples.completion_ids[1::2])


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(steps, autocast: bool):
    model = build("llama") if autocast else build("llama").bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        samples = draw(model, prompts(RAGGED, 8), True)[0]
    assert steps and samples.sampler_logprobs.isfinite().all() and samples.finished.any()


def test_values_and_entropy_are_those_of_the_scoring_forward(steps):
    actor = ActorCritic(build("llama"), "shared")
    torch.nn.init.normal_(actor.value.linear.weight)
    samples, _ = draw(actor.policy, prompts(RAGGED, 4), True, value_head=actor.value, temperature=0.8)
    scored = score(actor, samples, temperature=0.8)
    assert steps
    torch.testing.assert_close(samples.sampler_logprobs, scored.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(samples.sampler_entropy, scored.entropy, atol=1e-5, rtol=0)
    torch.testing.assert_close(samples.sampler_values, scored.values, atol=1e-5, rtol=1e-5)


def test_what_memory_held_before_does_not_matter(steps, monkeypatch: pytest.MonkeyPatch):
    poison(monkeypatch)
    assert both(build("gpt2"), prompts(RAGGED, 4)).sampler_logprobs.isfinite().all() and steps


def test_recordings_are_few(steps):
    """One for every halving of the rows, and for every growth of the window by half."""
    samples = both(build("gpt2"), prompts(RAGGED, 8), max_completion_length=80, stop_token_ids=STOPS[:1])
    rows, windows = zip(*steps, strict=True)
    assert 1 < len(steps) <= 8 and set(windows) == {WINDOW, 2 * WINDOW}
    assert all(2 * b <= a or b == a for a, b in zip(rows, rows[1:], strict=False))
    assert rows[0] == len(samples) and rows[-1] < len(samples)


def test_a_model_that_fixed_steps_would_change_is_decoded_by_its_own_and_says_so(steps, caplog):
    """Eager attention adds its mask to the scores: a mask of True and False hides nothing."""
    model = tiny.model("llama", attn_implementation="eager")
    with caplog.at_level(logging.INFO):
        ours, generator = draw(model, prompts(RAGGED, 4), True)
    theirs, _ = draw(model, prompts(RAGGED, 4), False)
    assert torch.equal(ours.completion_ids, theirs.completion_ids) and not steps
    assert "LlamaForCausalLM says something else by steps of fixed shape" in caplog.text


def test_where_recording_fails_steps_are_taken_one_by_one(monkeypatch: pytest.MonkeyPatch, caplog):
    tried = []

    def refused(*_: Any) -> None:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "record", refused)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    recorder = Recorder()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert recorder.record(lambda: None, "GPT2LMHeadModel", torch.device("cuda", 0)) is None
    assert len(tried) == 1, "and is not tried again"
    assert "launched one by one, which takes longer: a step of GPT2LMHeadModel cannot be recorded" in caplog.text
    assert (
        "(RuntimeError: operation not permitted when stream is capturing)" in caplog.text
        and "more" not in caplog.messages[-1]
    )


def test_where_memory_is_short_what_torch_keeps_is_given_back_first(monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []

    def short(*_: Any) -> Any:
        done.append("record")
        if len(done) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return len

    monkeypatch.setattr(graphs, "record", short)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
    assert Recorder().record(lambda: None, "x", torch.device("cuda", 0)) is len
    assert done == ["record", "empty", "record"]


def test_steps_read_no_weights_that_another_thread_can_free(steps, monkeypatch: pytest.MonkeyPatch):
    """Leaving autocast in any thread clears the cache of cast weights of the whole process."""
    model = build("llama")

    def draw_in_bf16() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return draw(model, prompts(RAGGED, 8), True)[0]

    expected, casts = draw_in_bf16(), []
    plain = ReplayedDecoding._step

    def watched(self: ReplayedDecoding) -> None:
        with CountCasts(model) as count:
            plain(self)
        casts.append(count.of_matrices)

    monkeypatch.setattr(ReplayedDecoding, "_step", watched)
    assert_same(draw_in_bf16(), expected)
    assert casts and not any(casts), "linear layers hold their own"


class CountCasts(TorchDispatchMode):
    """Counts the matrices of a model that are cast inside."""

    def __init__(self, model: Any):
        super().__init__()
        self.matrices = {p.data_ptr() for p in model.parameters() if p.dim() == 2}
        self.of_matrices = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.matrices:
            self.of_matrices += 1
        return func(*args, **(kwargs or {}))


def test_a_float64_policy_under_autocast_stays_float64(steps):
    model = build("llama").double()
    with torch.autocast("cpu", torch.bfloat16):
        assert draw(model, prompts(RAGGED, 4), True)[0].sampler_logprobs.dtype == torch.float64


def test_nothing_of_a_call_outlives_it(steps):
    """Keys and values of a call are large: they must not wait for the garbage collector."""
    alive: list[Any] = []
    plain = SlabLayer.lazy_initialization

    def noted(self: SlabLayer, *states: torch.Tensor) -> None:
        plain(self, *states)
        alive.extend(weakref.ref(slab) for slab in self.slabs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlabLayer, "lazy_initialization", noted)
        gc.collect()
        gc.disable()
        try:
            draw(build("llama"), prompts(RAGGED, 4), True)
            assert alive and not any(ref() is not None for ref in alive)
        finally:
            gc.enable()


def test_only_on_a_gpu_and_with_a_mask_and_without_strings(monkeypatch: pytest.MonkeyPatch):
    model, options, stop = build("gpt2"), GenerationConfig(), Finished(1, 1, [0], None)
    assert not stands_still(model, stop, options), "on a CPU"
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))
    assert stands_still(model, stop, options)
    assert not stands_still(model, stop, GenerationConfig(disable_compile=True))
    texts = StopStringCriteria(tiny.byte_tokenizer(), ["."])
    assert not stands_still(model, Finished(1, 1, [0], texts), options)
    monkeypatch.setattr(model.config, "_attn_implementation", "eager")
    assert not stands_still(model, stop, options)


def test_the_difference_is_relative():
    assert differ(torch.tensor([10.0, -20.0]), torch.tensor([10.0, -21.0])) == pytest.approx(0.05)

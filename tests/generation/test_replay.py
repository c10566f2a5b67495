"""Steps of fixed shape, as a GPU replays them: the tokens of the stock loop. Here Python takes them one by one."""

import logging
from typing import Any

import pytest
import torch

from hfpg.generation import loop, replay
from hfpg.generation.replay import PATIENCE, WINDOW, ReplayedDecoding, differ, stands_still
from hfpg.generation.slab import SlabLayer
from hfpg.generation.stock import Finished
from hfpg.models import ActorCritic
from tests import tiny
from tests.generation.test_loop import EQUAL, LOOPED, RAGGED, STOPS, both, build, draw, prompts, score


FIXED = [kind for kind in LOOPED if kind != "gemma2"]  # whose attention is "eager"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """On a CPU too. Rows and window of every recording, as it would be made."""
    taken: list[tuple[int, int]] = []
    plain = ReplayedDecoding._recorded

    def counted(self: ReplayedDecoding) -> Any:
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
    ],
)
@pytest.mark.parametrize("copies", [1, 3])
def test_the_edges(steps, options: dict[str, Any], copies: int):
    samples = both(build("qwen2"), prompts(RAGGED, copies), **options)
    assert samples.completion_mask[:, 0].all() and samples.completion_mask.any(0).all()


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
    plain = SlabLayer.lazy_initialization

    def poisoned(self: SlabLayer, *states: torch.Tensor) -> None:
        plain(self, *states)
        for slab in self.slabs:
            slab.fill_(torch.nan)

    monkeypatch.setattr(SlabLayer, "lazy_initialization", poisoned)
    assert both(build("gpt2"), prompts(RAGGED, 4)).sampler_logprobs.isfinite().all()


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


def test_where_recording_fails_steps_are_taken_one_by_one(steps, monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    decoding = ReplayedDecoding.__new__(ReplayedDecoding)
    decoding.records, decoding.pool, decoding.model, decoding.tell = True, 1, build("gpt2"), told.append
    decoding.tokens = type("OnGPU", (), {"is_cuda": True, "device": None, "__len__": lambda self: 1})()
    decoding.window, decoding._step, decoding.recordings = 64, lambda: None, []

    def refused(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(replay, "record", refused)
    assert decoding._recorded() is decoding._step and not decoding.records
    assert decoding._recorded() is decoding._step, "and is not tried again"
    assert told == ["a step of GPT2LMHeadModel cannot be recorded (operation not permitted when stream is capturing)"]


def test_only_on_a_gpu_and_with_a_mask_and_without_strings():
    class Model:
        device, config = torch.device("cuda", 0), type("Config", (), {"_attn_implementation": "sdpa"})

    class Options:
        disable_compile = False

    stop = Finished(1, 1, [0], None)
    assert stands_still(Model(), stop, Options())
    Options.disable_compile = True
    assert not stands_still(Model(), stop, Options()), "generation_kwargs={'disable_compile': True}"
    Options.disable_compile = False
    assert not stands_still(Model(), Finished(1, 1, [0], object()), Options())
    Model.config._attn_implementation = "eager"
    assert not stands_still(Model(), stop, Options())
    assert not stands_still(build("gpt2"), stop, Options()), "on a CPU"


def test_the_difference_is_relative():
    assert differ(torch.tensor([10.0, -20.0]), torch.tensor([10.0, -21.0])) == pytest.approx(0.05)

"""What a configuration says of its text model, at the top or one level down."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, Llama4TextConfig, LlamaConfig, XLNetConfig

from hfpg.text_config import context_length, has_window, possible_windows, text_config
from tests import tiny


def test_the_text_model_is_found_one_level_down():
    nested = tiny.nested_gemma().config
    assert text_config(nested) is nested.text_config
    assert has_window(nested) and context_length(nested) == 96
    plain = GPT2Config()
    assert text_config(plain) is plain and not has_window(plain) and text_config("no config") == "no config"


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (GPT2Config(n_positions=77), 77),
        (XLNetConfig(), None),  # says −1: as long as one likes
        (Llama4TextConfig(max_position_embeddings=10_000, floor_scale=8192), 8191),
        (Llama4TextConfig(max_position_embeddings=10_000, attn_temperature_tuning=False), 10_000),
    ],
)
def test_the_longest_sequence(config, longest):
    assert context_length(config) == longest


def test_what_only_sounds_like_a_window():
    assert possible_windows(LlamaConfig()) == []
    assert possible_windows(LlamaConfig(local_reach=40, chunks=5000, max_window_layers=28)) == [40]

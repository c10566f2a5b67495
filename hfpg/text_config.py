"""What a model's configuration says of its text model: at the top, or one level down where it also sees or hears."""

from __future__ import annotations

import re
from typing import Any


WINDOWS = ("sliding_window", "window_size", "attention_window", "local_attention", "attention_chunk_size")
LIKE_A_WINDOW = re.compile(r"window|chunk|local|sliding|span")
MODERATE = 512  # tokens; a probe twice as long is still cheap


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the text decoder: all of it, where nothing is nested."""
    try:
        found = config.get_text_config(decoder=True)
    except (AttributeError, ValueError):  # no configuration of transformers; several parts that could be meant
        return config
    return found if hasattr(found, "get_text_config") else config


def context_length(config: Any) -> int | None:
    """Longest sequence that the model can take, or None if it does not say (XLNet says −1).

    Llama-4 scales its queries by their place in the row, padding included, in steps of `floor_scale` tokens: rows
    shorter than the first step are exact.
    """
    found, text = None, text_config(config)
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if isinstance(getattr(text, name, None), int):
            found = getattr(text, name) if getattr(text, name) > 0 else None
            break
    if getattr(text, "attn_temperature_tuning", None) and isinstance(step := getattr(text, "floor_scale", None), int):
        return step - 1 if found is None else min(found, step - 1)
    return found


def has_window(config: Any) -> bool:
    """True for models some of whose layers see a part of the past only, or keep it in a state: their masks say less
    than they do, and on texts shorter than the window one does not see it."""
    for level in (config, text_config(config)):
        kinds = [*(getattr(level, "layer_types", None) or []), *(getattr(level, "attention_layers", None) or [])]
        named = any(getattr(level, name, None) for name in WINDOWS)
        if named or any(kind not in ("full_attention", "global") for kind in kinds):
            return True
    return False


def possible_windows(config: Any) -> list[int]:
    """Numbers of moderate size under names that sound like a window, though hfpg knows none of that name."""
    said = text_config(config).to_dict().items()
    sizes = {n for name, n in said if type(n) is int and LIKE_A_WINDOW.search(name) and not name.endswith("_layers")}
    return sorted(n for n in sizes if 0 < n <= MODERATE)

"""Set up before hfpg is imported: no Hub, few threads, and shape checks on every jaxtyping annotation."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import jaxtyping


CHECKED = ("ops", "fast", "types", "models", "frozen", "token_local", "micro_batches", "compare", "learner", "natural")
CHECKED += ("report.metrics", *(f"generation.{name}" for name in ("decoding", "loop", "replay", "slab", "stock")))
jaxtyping.install_import_hook([f"hfpg.{name}" for name in CHECKED], "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Tests of a GPU are for machines that have one."""
    mine = [item for item in items if torch.cuda.is_available() or not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=[item for item in items if item not in mine])
    items[:] = mine


@pytest.fixture(autouse=True)
def _one_thread_and_fresh_state():
    """Each test starts with one thread and without another test's Accelerator."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()

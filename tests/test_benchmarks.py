"""The benchmark's own figures: both sides run on a toy; the arithmetic between the clocks and the page is right."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hfpg.fast.product import available
from tests.benchmarks import hfpg_side, step, table, trl_side
from tests.benchmarks.figures import ratios, rounded, said, summary
from tests.benchmarks.floor import Rates, Weights, fastest, floor, matrix_weights, product_rate, products
from tests.benchmarks.job import check
from tests.benchmarks.measure import PHASES, Lap, Meter, Run, Stopwatch
from tests.benchmarks.profile import MARK, by_phase
from tests.benchmarks.scaling import line, points, report
from tests.benchmarks.work import ARCHITECTURES, Work, model_folder, prompt_texts, work_from


def toy(*flags: str) -> Work:
    """One measured step on the toy model."""
    return work_from(step.flags().parse_args(["--model", "T", "--steps", "1", *flags]))


# ── both sides


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_both_sides_do_the_same_work(algorithm: str, tmp_path: Path) -> None:
    work = toy("--algorithm", algorithm, "--completions", "fixed")
    folder = model_folder("T", "fixed", tmp_path)
    plain = torch.autograd.backward
    ours, theirs = hfpg_side.run(work, folder), trl_side.run(work, folder)
    assert torch.autograd.backward is plain
    for run in (ours, theirs):
        check(work, run)
        assert run.laps[1].completion_tokens == work.samples * work.completion_length
        assert run.laps[1].prompt_tokens == work.prompts_per_step * work.prompt_length
        assert set(run.laps[1].phases) == set(PHASES)
        assert all(wall > 0 for wall, _ in run.laps[1].phases.values())
        assert run.peak_mb >= run.import_mb > 0 or not Path("/proc/self/status").exists()


def test_hfpg_alone_has_ppo(tmp_path: Path) -> None:
    work = toy("--algorithm", "ppo", "--value", "separate", "--prompts", "ragged")
    run = hfpg_side.run(work, model_folder("T", "ragged", tmp_path))
    check(work, run)
    assert 4 * work.samples <= run.laps[1].prompt_tokens <= 64 * work.samples


def test_hfpg_multiplies_by_torch_where_it_is_asked_to(tmp_path: Path) -> None:
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(available())

    for whose in ("torch", "onednn"):
        hfpg_side.run(toy("--products", whose), model_folder("T", "fixed", tmp_path), callbacks=[Look()])
    assert seen == [False, False, True, True]


def test_a_side_that_did_other_work_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"x took \[4, 4\] optimizer steps in its laps; the work has \[2, 2, 2\]"):
        check(Work(epochs=2, steps=2), Run("x", [lap(1), lap(1)], 0, 0))


def test_flags_reach_the_run() -> None:
    plain, other = toy(), toy("--no-recording", "--bf16", "--liger", "--device", "cuda", "--generations", "2")
    assert hfpg_side.config(plain, "x").generation_kwargs is None and hfpg_side.config(plain, "x").use_cpu
    settings = hfpg_side.config(other, "x")
    assert settings.generation_kwargs == {"disable_compile": True} and other.generations == 2
    assert settings.bf16 and settings.use_liger_kernel and not settings.use_cpu
    theirs = trl_side.settings(other, "x")
    assert theirs["bf16"] and theirs["use_liger_kernel"] and not theirs["use_cpu"]
    assert "bf16, liger, no recordings" in other.describe()


def test_trl_ppo_needs_a_folder() -> None:
    with pytest.raises(SystemExit, match="TRL has no PPO since 1.13; .* or --against none"):
        step.main(["--model", "T", "--algorithm", "ppo"])


# ── work


def test_micro_batches_hold_no_more_positions_than_said() -> None:
    for flags, rows in (([], 4), (["--completion-length", "15"], 2), (["--minibatches", "4", "--samples", "16"], 4)):
        work = toy(*flags)
        assert work.rows == rows
        assert work.rows * (work.longest_prompt + work.completion_length) <= work.micro_positions
    assert toy("--prompts", "ragged").rows == 1
    assert Work(samples=64, micro_positions=1024).rows == 16


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(
        SystemExit, match="10 samples are no multiple of 4 completions a prompt × 1 minibatches; try 16"
    ):
        toy("--samples", "10")


def test_prompts_have_as_many_words_as_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder("T", "ragged", tmp_path))
    for text in prompt_texts(toy("--prompts", "ragged"), tokenizer):
        assert len(tokenizer(text)["input_ids"]) == len(text.split())


# ── from clocks to figures


def test_phases_add_up_and_inner_ones_take_their_time_from_outer_ones() -> None:
    times = iter([0, 1, 3, 7, 8, 10])
    watch = Stopwatch(lambda: (float(t := next(times)), 2.0 * t))
    with watch.phase("forward"):  # from 1 to 8
        with watch.phase("backward"):  # from 3 to 7
            pass
    assert watch.lap() == ({"rest": (3, 6), "forward": (3, 6), "backward": (4, 8)}, dict(forward=1, backward=1))


def lap(seconds: float, tokens: int = 100) -> Lap:
    """A step of so many seconds, a quarter of them in the backward pass; as many CPU seconds twice over."""
    shares = {"forward": 0.75 * seconds, "backward": 0.25 * seconds}
    return Lap({name: (part, 2 * part) for name, part in shares.items()}, tokens, 10, 4)


def test_summary_takes_medians_without_the_first_lap_of_each_run() -> None:
    runs = [Run("x", [lap(50), lap(4), lap(8)], 100, 300), Run("x", [lap(70), lap(1), lap(2, 50)], 110, 360)]
    found = summary(Work(samples=64), runs)
    assert (found["laps"], found["wall"], found["cpu"]) == (4, 3, 6)
    assert found["cpu_range"] == [2, 16]
    assert found["phases"] == {"forward": [2.25, 4.5], "backward": [0.75, 1.5]}
    assert found["samples_per_second"] == 64 / 3
    assert found["wall_per_token"] == pytest.approx(0.04)  # of .04, .08, .01, .04
    assert found["beyond_import_mb"] == 250


def test_ratios_say_how_much_more_the_other_side_takes() -> None:
    ours = summary(Work(), [Run("x", [lap(1), lap(2)], 0, 100)])
    theirs = summary(Work(), [Run("y", [lap(1), lap(6, 50)], 0, 250)])
    assert ratios(ours, theirs) == dict(wall=3, cpu=3, wall_per_token=6, cpu_per_token=6, memory=2.5)


def test_meter_counts_a_prompt_once_and_scores_even_tokens() -> None:
    meter = Meter(Stopwatch(), generations=2)
    meter.count(5, 5)
    meter.begin()
    assert meter.even_share(["a b", "a b"], ["", ""], [[2, 3], [4]]) == [0.5, 1.0]
    meter.lap()
    assert (meter.laps[0].prompt_tokens, meter.laps[0].completion_tokens) == (2, 3)


def test_floor_counts_two_operations_a_weight() -> None:
    weights, rates, sizes = Weights(1_000_000, 500_000), Rates(large=1.0, skinny=0.5), (100, 400)
    found = floor(Work(algorithm="rloo", epochs=2), weights, *sizes, rates)
    assert found == pytest.approx(dict(generate=0.2 + 2.4, score=1.4, train=8.4, total=12.4))
    separate = floor(Work(algorithm="ppo", value="separate", epochs=2), weights, *sizes, rates)
    assert separate == pytest.approx(dict(generate=2.6, score=2.4, train=14.4, total=19.4))
    assert floor(Work(kl_coef=0.0), weights, *sizes, rates)["score"] == 0


def test_rates_are_those_of_a_product_that_is_right() -> None:
    x, w = torch.randn(8, 16), torch.randn(16, 32)
    for multiply in products():
        torch.testing.assert_close(multiply(x, w), x @ w)
    times = iter(range(1000))  # a try takes one second
    rate = product_rate(torch.ones(100, 100), torch.ones(2, 100, 100), 5, lambda: (float(t := next(times)), 2.0 * t))
    assert rate == pytest.approx((0.5, 0.25))  # 125 times 4e-3


def test_the_larger_rate_counts() -> None:
    found = fastest((Rates(1, 4), Rates(5, 8)), (Rates(2, 3), Rates(6, 7)))
    assert found == (Rates(2, 4), Rates(6, 8))


def test_a_step_below_its_floor_is_no_result() -> None:
    figures = figures_of("step")
    assert len(step.floor_lines(figures)) == 2
    figures["distance"]["wall"] = 0.9
    assert "measure again" in step.floor_lines(figures)[1]


def test_matrix_weights_leave_embeddings_out() -> None:
    from transformers import GPT2Config

    assert matrix_weights(GPT2Config(**ARCHITECTURES["T"])) == Weights(2 * 12 * 64**2, 512 * 64)


def test_line_finds_slope_and_exponent() -> None:
    straight = line([1, 2, 4, 8], [3, 5, 9, 17])
    assert (straight["slope"], straight["start"]) == pytest.approx((2, 1))
    assert straight["residual"] == pytest.approx(0)
    assert line([1, 2, 4], [1, 4, 16])["exponent"] == pytest.approx(2)
    bent = line([1, 2, 3], [1, 2, 4])  # by hand, with weights 1, 1/4, 1/16
    assert (bent["slope"], bent["start"], bent["residual"]) == pytest.approx((14 / 11, -10 / 33, 4 / 33))


def test_scaling_changes_one_size_at_a_time() -> None:
    series = points(toy("--samples", "16", "--completion-length", "24"))
    assert [w.samples for w in series["more samples"]] == [16, 32, 64, 128]
    assert [w.completion_length for w in series["longer completions"]] == [24, 48, 96, 192]
    assert {w.micro_positions for of in series.values() for w in of} == {64}


def test_profile_counts_an_operator_for_the_phase_around_it() -> None:
    class Event:
        def __init__(self, name: str, microseconds: float, parent: Event | None = None):
            self.name, self.self_cpu_time_total, self.cpu_parent = name, microseconds, parent

    outer = Event(MARK + "forward", 1e6)
    inner = Event(MARK + "backward", 2e6, outer)
    events = [outer, inner, Event("mm", 3e6, inner), Event("mm", 4e6, Event("linear", 0, outer)), Event("mm", 5e6)]
    found = by_phase(events)
    assert found["forward"] == {"(Python, between operators)": 1, "mm": 4}
    assert found["backward"] == {"(Python, between operators)": 2, "mm": 3}
    assert found["rest"] == {"mm": 5}


# ── what is written


def test_commands_hold_no_paths() -> None:
    words = ["--model", "/some/where/x", "--trl-ppo-path=/a/b", "--json", "c/d.json", "--steps", "3", "--plot=e.png"]
    assert said("step", words) == "python -m tests.benchmarks.step --model FOLDER --trl-ppo-path=FOLDER --steps 3"


def test_figures_are_rounded_wherever_they_are() -> None:
    assert rounded({"a": [1.2345678, (2, "x")], "b": math.pi}) == {"a": [1.2346, [2, "x"]], "b": 3.1416}


def figures_of(kind: str) -> dict:
    """A file of figures as the tools write it."""
    work = Work()
    machine = dict(cpu="CPU", cores=2, load=0.1, versions=dict(python="3", torch="2", transformers="5"))
    head = dict(kind=kind, command=f"run {kind}", date="2026-01-01", machine=machine, work=vars(work), describe="RLOO")
    runs = {name: [Run(name, [lap(1), lap(s)], 0, 100)] for name, s in (("hfpg", 2), ("trl", 8), ("trl-malloc", 6))}
    if kind == "step":
        return head | step.report(work, runs, Weights(10**6, 10**6), (Rates(10, 10), Rates(10, 10)))
    if kind == "scaling":
        of = [summary(work, [Run("hfpg", [lap(1), lap(n, 100 * n)], 0, 50)]) for n in (1, 2)]
        return head | {"series": report({"more samples": [dict(samples=1, completion_length=2) | f for f in of]})}
    operators = {"aten::mm": {"total": 1.5, "forward": 1.5}}
    return head | {"profile": {"seconds": 2.0, "phases": {"forward": 2.0}, "operators": operators}}


def test_page_shows_what_the_files_say() -> None:
    page = "before\n" + "".join(f"<!-- {name} -->old<!-- /{name} -->\n" for name in table.SECTIONS) + "after\n"
    made = table.render(page, [figures_of(kind) for kind in ("step", "scaling", "profile")])
    assert made.startswith("before\n<!-- step -->\nMeasured on 2026-01-01, CPU, 2 cores;") and made.endswith("after\n")
    for text in (
        "| RLOO | 1 | 1 | 2.00 / 4.00 | 8.00 / 6.00 | 16.00 / 12.00 | 4.00 / 3.00 | 4.00 / 3.00 |",
        "| RLOO | trl-malloc, malloc tuned |",
        "run step",
        "more samples: 20.000 CPU seconds per 1000 tokens +0.000 s; largest residual 0.0 %; time ∝ tokens^1.00",
        "| `aten::mm` | 1.500 | 75.0 % | 1.500 |",
    ):
        assert text in made
    assert table.render(made, [figures_of(kind) for kind in ("step", "scaling", "profile")]) == made
    assert table.render(made, []).count(table.NOTHING) == len(table.SECTIONS)


def test_a_gpu_has_a_table_of_its_own() -> None:
    page = "".join(f"<!-- {name} -->old<!-- /{name} -->\n" for name in table.SECTIONS)
    of = figures_of("step")
    of["work"] = of["work"] | {"device": "cuda"}
    of["machine"] = of["machine"] | {"gpu": "H1"}
    made = table.render(page, [of])
    assert "2026-01-01, H1, CPU, 2 cores" in made and "| RLOO | H1 | 1 | 2.00 / 8.00 | 4.00 | 4.00 |" in made
    assert made.count(table.NOTHING) == len(table.SECTIONS) - 1, "and is in no other"


def test_page_is_what_its_files_say() -> None:  # house: asserts inside what it calls
    table.main(["--check"])

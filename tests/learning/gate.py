"""The recipe's gate: does `recipes/ppo_gpt2.py`, as shipped, teach the policy without spoiling it?

    python tests/learning/gate.py            two seeds and the flipped sign, 30 steps, a smaller gain (CI)
    python tests/learning/gate.py --full     five seeds of the default settings and the controls that must fail

Every run is the recipe itself in a process of its own with one thread, two runs at a time. What is judged: the first
and the last evaluation in its metrics.jsonl, on 256 held-out prompts with the same random numbers for every seed.
Judge B (other features, other sentences than the judge that trains) says whether texts got happier.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


ROOT = Path(__file__).parents[2]
SHORT = ["--max_steps", "30", "--lr_scheduler_type", "constant", "--completions_steps", "0", "--save_steps", "0"]
GAIN, SHORT_GAIN = 0.40, 0.15
COLUMNS = ("dA", "dB", "KL", "entropy", "length", "distinct-2", "kept", "top bigram", "seconds")
CONTROLS = {
    "learning_rate 1e-5": ["--learning_rate", "1e-5"],
    "kl_coef 0.02": ["--kl_coef", "0.02"],
    "flipped sign": ["--reward_weights", "-1", "0"],
}


def run(flags: list[str]) -> dict[str, float]:
    """Train with these flags; the numbers that the gate looks at."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "recipes/ppo_gpt2.py", "--output_dir", f"{folder}/run", "--torch_threads", "1"]
        done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=1500)
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-2000:])
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval_score" in row]
    first, last = evaluations[0], evaluations[-1]
    finite = all(v is not None for row in rows for v in row.values())  # the recorder writes NaN and inf as null
    return {
        "dA": last["eval_scores/judge-a"] - first["eval_scores/judge-a"],
        "dB": last["eval_scores/judge_b"] - first["eval_scores/judge_b"],
        "KL": last["eval_kl_to_ref"],
        "entropy": last["eval_entropy"],
        "length": last["eval_length"],
        "distinct-2": last["eval_distinct_2"],
        "kept": last["eval_distinct_2"] / first["eval_distinct_2"],
        "top bigram": last["eval_top_bigram_share"],
        "seconds": time.monotonic() - started,
        "finite": float(finite),
    }


def failures(found: dict[str, float], gain: float) -> list[str]:
    """The rules that a run breaks; none: it passes."""
    rules = {
        f"judge B gains {found['dB']:+.2f}, less than +{gain}": found["dB"] >= gain,
        f"KL {found['KL']:.1f} nats per completion, more than 6": found["KL"] <= 6,
        f"distinct-2 {found['distinct-2']:.2f}": found["distinct-2"] >= 0.78 or found["kept"] >= 0.87,
        f"mean length {found['length']:.1f}, not in 12..20": 12 <= found["length"] <= 20,
        f"a bigram in {found['top bigram']:.0%} of the texts": found["top bigram"] <= 0.25,
        "a number is not finite": found["finite"] == 1,
    }
    return [text for text, holds in rules.items() if not holds]


def table(results: dict[str, dict[str, float]], gain: float) -> str:
    """Markdown, one run a row."""
    lines = ["| run | " + " | ".join(COLUMNS) + " | gate |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, found in results.items():
        cells = [f"{found[c]:.0f}" if c == "seconds" else f"{found[c]:.2f}" for c in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {'; '.join(failures(found, gain)) or 'passes'} |")
    return "\n".join(lines)


def run_all(settings: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """Two at a time, one thread each."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(settings, pool.map(run, settings.values()), strict=True))


def main() -> int:
    """0 if the gate holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("flags", nargs="*", help="more flags of the recipe, after --")
    arguments = parser.parse_args()
    extra = arguments.flags if arguments.full else SHORT + arguments.flags
    seeds = {f"seed {seed}": ["--seed", str(seed), *extra] for seed in range(5 if arguments.full else 2)}
    controls = CONTROLS if arguments.full else {"flipped sign": CONTROLS["flipped sign"]}
    results = run_all(seeds | {name: [*flags, *extra] for name, flags in controls.items()})
    gain = GAIN if arguments.full else SHORT_GAIN
    print(table(results, gain))
    passed = [name for name in seeds if not failures(results[name], gain)]
    wrong = [name for name in controls if not failures(results[name], gain)]
    finite = all(results[name]["finite"] == 1 for name in seeds)
    print(f"{len(passed)} of {len(seeds)} seeds pass; controls that should fail and pass: {wrong or 'none'}")
    return 0 if len(passed) >= min(4, len(seeds)) and not wrong and finite else 1


if __name__ == "__main__":
    sys.exit(main())

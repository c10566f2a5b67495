"""The short form of the recipe's gate, and proof that the gate can say no."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.learning.gate import GAIN, failures


ROOT = Path(__file__).parents[2]
GOOD = {
    "dA": 0.9,
    "dB": 0.55,
    "KL": 2.6,
    "entropy": 4.2,
    "length": 14.8,
    "distinct-2": 0.83,
    "kept": 0.96,
    "top bigram": 0.06,
    "finite": 1.0,
}


@pytest.mark.slow
def test_two_seeds_learn_and_the_flipped_sign_does_not():
    done = subprocess.run(
        [sys.executable, "tests/learning/gate.py"], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-1000:]


def test_a_good_run_breaks_no_rule():
    assert failures(GOOD, GAIN) == []


@pytest.mark.parametrize(
    "broken",
    [{"dB": 0.3}, {"KL": 6.5}, {"distinct-2": 0.7, "kept": 0.8}, {"length": 11.0}, {"top bigram": 0.3}, {"finite": 0}],
    ids=str,
)
def test_every_rule_can_fail(broken):
    assert len(failures(GOOD | broken, GAIN)) == 1

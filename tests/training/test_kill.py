"""SIGKILL at random moments: the same script that runs any number of them, here with three."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_and_resume.py"


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="the script forks")
def test_three_killed_trainings_resume_to_the_same_bits():
    small = ["--steps", "16", "--checkpoint_every", "2", "--batch_size", "4", "--network", "tiny:width=4"]
    done = subprocess.run([sys.executable, SCRIPT, "--kills", "3", *small], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 killed and resumed trainings end in the same bits" in done.stdout

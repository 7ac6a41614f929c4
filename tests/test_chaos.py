"""A short form of benchmarks/chaos.py: kills at random moments of a whole run leave no trace in its end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, sys
from pathlib import Path
from benchmarks.chaos import run_chaos
print(json.dumps(run_chaos(Path(sys.argv[1]), kills=6, seed=int(sys.argv[2]), processes=int(sys.argv[3]))))
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_six_times_at_random_moments_ends_bit_equal_to_one_that_no_one_killed(tmp_path, processes):
    # A process of its own, without threads and devices, which forks the runs.
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS" and "JAX" not in name}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "chaos"), "3", str(processes)]
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["kills"] == 6 and found["equal_files"] > 30 and found["processes"] == processes
    assert found["seconds_until_others_end"] < 60

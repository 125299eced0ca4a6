"""Repeat the runs of this record; start it in the root of the project."""

import subprocess
import sys

RUNS: list[str] = [
    "--models infomax3d --protocols representation --seeds 1",
    "--models infomax3d --protocols representation --seeds 3",
]

for run in RUNS:
    command = f"benchmarks/run_matbench.py --paper {run}".split()
    subprocess.run([sys.executable, *command], check=True)

"""Repeat the runs of this record; start it in the root of the project."""

import shlex
import subprocess
import sys

RUNS: list[str] = [
    "--models crabnet --protocols transfer --seeds 1",
]

for run in RUNS:
    command = shlex.split(f"benchmarks/run_matbench.py --paper {run}")
    subprocess.run([sys.executable, *command], check=True)

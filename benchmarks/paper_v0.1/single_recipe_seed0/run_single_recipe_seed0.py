"""Repeat the runs of this record; start it in the root of the project."""

import shlex
import subprocess
import sys

RUNS: list[str] = [
    "--recipes single --seeds 1 --matbench",
]

for run in RUNS:
    command = shlex.split(f"benchmarks/recipes.py {run}")
    subprocess.run([sys.executable, *command], check=True)

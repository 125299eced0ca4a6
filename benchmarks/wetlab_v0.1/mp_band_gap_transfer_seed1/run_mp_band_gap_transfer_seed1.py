"""Repeat the runs of this record; start it in the root of the project."""

import subprocess
import sys

RUNS: list[str] = [
    "--models mp_band_gap --protocols transfer --seeds 3",
]

for run in RUNS:
    command = f"benchmarks/run_wetlab.py {run}".split()
    subprocess.run([sys.executable, *command], check=True)

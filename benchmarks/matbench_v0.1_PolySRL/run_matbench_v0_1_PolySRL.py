"""Repeat the runs of this record; start it in the root of the project."""

import shlex
import subprocess
import sys

RUNS: list[str] = [
    "--suite matbench --tasks matbench_dielectric --protocol finetune --epochs 15 60 "
    "150 --ensemble 4 --learning-rates 0.003 --batch-size 128 --weight-decay 0.3 "
    "--seed 0 --pretrained polysrl-mp",
    "--suite matbench --tasks matbench_expt_gap --protocol finetune --epochs 15 60 "
    "150 --ensemble 4 --learning-rates 0.003 --batch-size 128 --weight-decay 0.3 "
    "--seed 0 --pretrained polysrl-mp",
    "--suite matbench --tasks matbench_jdft2d --protocol finetune --epochs 15 60 150 "
    "--ensemble 4 --learning-rates 0.003 --batch-size 128 --weight-decay 0.3 --seed 0 "
    "--pretrained polysrl-mp",
    "--suite matbench --tasks matbench_log_gvrh --protocol finetune --epochs 15 60 "
    "150 --ensemble 4 --learning-rates 0.003 --batch-size 128 --weight-decay 0.3 "
    "--seed 0 --pretrained polysrl-mp",
    "--suite matbench --tasks matbench_log_kvrh --protocol finetune --epochs 15 60 "
    "150 --ensemble 4 --learning-rates 0.003 --batch-size 128 --weight-decay 0.3 "
    "--seed 0 --pretrained polysrl-mp",
    "--suite matbench --tasks matbench_mp_e_form --protocol finetune --epochs 100 "
    "--ensemble 4 --learning-rates 0.003 --batch-size 512 --weight-decay 0 --seed 0 "
    "--pretrained polysrl-mp",
    "--suite matbench --tasks matbench_mp_gap --protocol finetune --epochs 100 "
    "--ensemble 4 --learning-rates 0.003 --batch-size 512 --weight-decay 0 --seed 0 "
    "--pretrained polysrl-mp",
    "--suite matbench --tasks matbench_perovskites --protocol finetune --epochs 15 "
    "--ensemble 4 --learning-rates 0.003 --batch-size 128 --weight-decay 0.3 --seed 0 "
    "--pretrained polysrl-mp",
]

for run in RUNS:
    command = shlex.split(f"benchmarks/run_matbench.py {run}")
    subprocess.run([sys.executable, *command], check=True)

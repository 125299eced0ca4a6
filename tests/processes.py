"""Pretraining on prototypes in processes that are killed, or that share their batches.

Run as a program it forks before PyTorch has threads or a GPU, so that deepchem is imported once for
all of these processes. Tests call :func:`outcome`, which runs it once.
"""

import atexit
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from models import CONFIG, make
from torch import distributed as dist

from polysrl_dc import PolymorphDataset
from polysrl_dc.batches import PolymorphData
from polysrl_dc.callbacks import PretrainingLog
from polysrl_dc.graphs import StoichiometryBatch, StructureBatch

SMALL = replace(CONFIG, edge_hidden=16)
WHITENED = replace(SMALL, whitening=0.7)
PRETRAIN = [
    *("--structures", "aflow", "--set", "n_features=16", "edge_hidden=16", "--epochs", "3"),
    *("--batch-size", "32", "--hold-out", "30", "--max-sites", "8", "--checkpoint-interval", "2"),
    *("--device", "cpu", "--threads", "1"),
]
SHARED_ROWS = np.arange(9)


@functools.cache
def crystals(n=37):
    """Small prototypes, about half of them polymorphs of one another."""
    dataset = PolymorphDataset("aflow", max_sites=12, progress=False)
    groups = dataset.groups
    several = np.bincount(groups)[groups] > 1
    order = np.concatenate([np.flatnonzero(several)[: n // 2], np.flatnonzero(~several)])
    return dataset.select(order[:n])


def pretraining(**kwargs):
    return make("pretraining", **{"config": SMALL, "device": "cpu", **kwargs})


class InDoublePrecision(PolymorphDataset):
    """Batches in float64, in which two ways to compute a sum agree."""

    def batch(self, rows):
        formulas, structures, groups = super().batch(rows)
        wide = {
            name: getattr(structures, name).double()
            for name in ("multiplicity", "edge_multiplicity", "distances")
        }
        return StoichiometryBatch(formulas.fractions.double()), replace(structures, **wide), groups


def crystals_in_double_precision():
    dataset = object.__new__(InDoublePrecision)
    dataset.__dict__.update(crystals().__dict__)
    return dataset


def one_step(objective):
    """Loss, gradients and running statistics after one batch, all float64."""
    model = pretraining(objective=objective, config=WHITENED)
    network = model.model.double().train()
    shared = model._shared(network)
    data = PolymorphData(crystals_in_double_precision())
    for _ in range(2):  # the second batch sees the decorrelation that the first has set
        network.zero_grad()
        generator = torch.Generator().manual_seed(3)
        loss = data.loss(shared, SHARED_ROWS[np.newaxis], generator)
        loss.backward()
    gradients = {
        f"gradient {name}": parameter.grad
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }
    return {"loss": loss.detach(), **gradients, **dict(network.named_buffers())}


def fitted_in_double_precision(model_dir):
    model = pretraining(config=WHITENED, model_dir=model_dir)
    model.model.double()
    losses = []
    model.log_frequency = 1
    model.fit(
        crystals_in_double_precision(), nb_epoch=2, checkpoint_interval=3, all_losses=losses
    )
    return {"losses": torch.tensor(losses), **model.model.state_dict()}


def empty_part():
    """Embedding of no structure: what a process gets of a batch with fewer rows than processes."""
    _, structures, _ = crystals().batch(np.arange(0))
    assert isinstance(structures, StructureBatch)
    return structures


# ----------------------------------------------------------------------- what the forks do


def _share(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for objective in ("polysrl", "infomax3d"):
        torch.save(one_step(objective), folder / f"{objective}{rank}.pt")
    torch.save(fitted_in_double_precision(str(folder / f"fit{rank}")), folder / f"fit{rank}.pt")
    dist.destroy_process_group()


def _kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def _fit(folder, **arguments):
    pretraining(model_dir=str(folder), **arguments).fit(
        crystals(),
        nb_epoch=3,
        checkpoint_interval=2,
        max_checkpoints_to_keep=2,
        callbacks=lambda model, step: _kill() if step == 7 else None,
    )


def _fit_killed_while_writing(folder):
    """The third checkpoint is cut in half on the disk."""
    fsync, calls = os.fsync, []

    def cut(file):
        calls.append(file)
        if len(calls) == 3:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            _kill()
        fsync(file)

    os.fsync = cut
    _fit(folder)


def _fit_killed_while_rotating(folder):
    """The third checkpoint is complete, the first has been moved, the second has not."""
    move, calls = os.replace, []

    def stop(source, target):
        calls.append(source)
        move(source, target)
        if str(target).endswith("checkpoint2.safetensors") and len(calls) > 5:
            _kill()

    os.replace = stop
    _fit(folder)


def _benchmark(folder):
    import pretrain

    end_step = PretrainingLog.end_step

    def killing(self, model, loss, n_rows):
        end_step(self, model, loss, n_rows)
        if model._global_step == 8:
            _kill()

    PretrainingLog.end_step = killing
    pretrain.main([*PRETRAIN, "--output-dir", str(folder)])


def _fork(function, *arguments):
    process = os.fork()
    if process:
        return process
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _main(folder):
    torch.set_num_threads(1)
    crystals()
    killed = {
        "in_epoch": _fit,
        "while_writing": _fit_killed_while_writing,
        "while_rotating": _fit_killed_while_rotating,
        "benchmark": _benchmark,
    }
    children = {name: _fork(function, folder / name) for name, function in killed.items()}
    for name, child in children.items():
        status = os.waitpid(child, 0)[1]
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            raise SystemExit(f"{name} ended with {status}, not by SIGKILL")
    ranks = [_fork(_share, rank, folder) for rank in range(2)]
    if any([os.waitpid(rank, 0)[1] for rank in ranks]):
        raise SystemExit("a process that shared its batches failed")


@functools.cache
def outcome():
    """Folder with what all the processes have left."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    root = Path(__file__).resolve().parents[1]
    paths = [str(root), str(root / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, __file__, folder],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


if __name__ == "__main__":
    _main(Path(sys.argv[1]))

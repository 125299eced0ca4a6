"""Pretrain an encoder on crystal structures; interrupted runs continue.

    python benchmarks/pretrain.py --data-dir DATA --output-dir runs/polysrl --epochs 20
    torchrun --nproc_per_node=4 benchmarks/pretrain.py --data-dir DATA --output-dir runs/polysrl

Writes ``model.safetensors`` (both encoders, with a manifest that says what they were trained on),
``log.csv`` (diagnostics of every epoch) and checkpoints. An encoder is judged by
``python benchmarks/run_wetlab.py --encoder FOLDER``, never by its loss.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from command_line import runner_parser
from folds import output_folder
from graph_data import Dataset
from labels import EXCLUDED, MP_PROPERTIES, labelled_formulas, mp_property_dataset
from tasks import required_data_dir, structures_path
from tqdm import tqdm

from polysrl_dc import PolymorphDataset, PolySRLConfig, PolySRLModel
from polysrl_dc.callbacks import PretrainingLog, pretraining_diagnostics
from polysrl_dc.distributed import process_rank
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.objectives import OBJECTIVES
from polysrl_dc.persistence import MODEL_FILE
from polysrl_dc.sources import file_digest

LEAST = {
    "epochs": 1,
    "batch_size": 2,
    "learning_rate": 0.0,
    "weight_decay": 0.0,
    "polymorphs_per_batch": 1,
    "max_edges": 1,
    "max_sites": 1,
    "max_structures": 2,
    "hold_out": 0,
    "final_whitening": 0.0,
    "checkpoint_interval": 1,
    "threads": 1,
}

#: Options of the objectives that see structures.
STRUCTURES_ONLY = (
    *("structures", "polymorphs_per_batch", "max_edges", "max_sites"),
    *("max_structures", "hold_out", "compile", "autocast"),
)


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = runner_parser(__doc__, cache=True, output_dir=Path("runs/polysrl"))
    add = parser.add_argument
    add("--objective", choices=(*OBJECTIVES, *MP_PROPERTIES), default="polysrl")
    add("--structures", help="Parquet file or folder, CIF folder, aflow; default: DATA/mp")
    add("--config", choices=("default", "paper"), default="default")
    change = "FIELD=VALUE of the configuration, changed"
    add("--set", nargs="*", action="extend", default=[], metavar="FIELD=VALUE", help=change)
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=256)
    add("--learning-rate", type=float, default=1e-3)
    add("--schedule", choices=("one_cycle", "constant"), default="one_cycle")
    add("--weight-decay", type=float, default=0.0)
    add("--polymorphs-per-batch", type=int, default=1, help="kept together, at most")
    add("--max-edges", type=int, help="of a batch, which bounds memory")
    add("--max-sites", type=int, help="leave out larger cells")
    add("--max-structures", type=int, help="random sample of the structures")
    add("--hold-out", type=int, default=2000, help="stoichiometries kept for diagnostics")
    add("--exclude", choices=EXCLUDED, help="leave out every stoichiometry of these data sets")
    add("--final-whitening", type=float, help="of the saved means; default: as in the training")
    add("--checkpoint-interval", type=int, default=500, help="steps")
    add("--compile", action="store_true", help="fuse kernels; needs a C++ compiler")
    add("--autocast", action="store_true", help="bfloat16")
    add("--threads", type=int, help="of each process; default: PyTorch's")
    add("--seed", type=int, default=0)
    add("--device", help="cpu, cuda, ...; default: the model's own choice")
    add("--dry-run", action="store_true", help="show what would run, and stop")
    arguments = parser.parse_args(argv)
    for name, least in LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} is {value}: must be at least {least}")
    for name in STRUCTURES_ONLY if arguments.objective in MP_PROPERTIES else ():
        if getattr(arguments, name) != parser.get_default(name):
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} has no use for {arguments.objective}, which sees no structure")
    return arguments


def config_of(arguments: argparse.Namespace) -> PolySRLConfig:
    """The named configuration with the changes of ``--set``; their values are JSON or text."""
    config = PolySRLConfig.named(arguments.config)
    for change in arguments.set:
        field, equals, text = change.partition("=")
        if not equals or field not in config.to_dict():
            raise SystemExit(f"--set {change}: not FIELD=VALUE with a field of PolySRLConfig")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        kind = type(getattr(config, field))
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise SystemExit(f"--set {change}: the value must be of type {kind.__name__}")
        try:
            config = replace(config, **{field: value})
        except ValueError as error:
            raise SystemExit(f"--set {change}: {error}") from error
    return config


def split(
    dataset: PolymorphDataset, hold_out: int, exclude: set[str], seed: int
) -> tuple[PolymorphDataset, PolymorphDataset]:
    """Training part and part for diagnostics, without a reduced formula in common.

    The same seed holds out the same stoichiometries whatever is excluded from the training part.
    """
    groups, random = np.unique(dataset.groups), np.random.default_rng(seed)
    held = random.choice(groups, min(hold_out, len(groups) // 5), replace=False)
    is_held = np.isin(dataset.groups, held)
    kept = ~is_held
    if exclude:
        kept &= ~np.isin(dataset.formulas, sorted(exclude))
    return dataset.select(np.flatnonzero(kept)), dataset.select(np.flatnonzero(is_held))


def main(argv: list[str] | None = None) -> None:
    """Train or continue, save the encoder with its manifest, print the log."""
    arguments = arguments_of(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        gpus = torch.cuda.is_available() and arguments.device != "cpu"
        torch.distributed.init_process_group("nccl" if gpus else "gloo")
        if gpus:
            arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        run(arguments)
    except (InvalidInputError, OSError) as error:
        raise SystemExit(f"pretrain.py: {error}") from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run(arguments: argparse.Namespace) -> None:
    """The run that the arguments describe."""
    first = process_rank() == 0
    config = config_of(arguments)
    training: dict[str, Any] = {
        "config": config,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "schedule": arguments.schedule,
        "weight_decay": arguments.weight_decay,
        "seed": arguments.seed,
        "model_dir": None if arguments.dry_run else str(arguments.output_dir),
        "device": arguments.device,
    }
    callbacks: list[Any] = []
    if arguments.objective in MP_PROPERTIES:
        task = MP_PROPERTIES[arguments.objective]
        data_dir = required_data_dir(arguments.data_dir)
        train: Dataset = mp_property_dataset(task, data_dir, arguments.exclude)
        model = PolySRLModel("regression", pretrained=None, **training)
        for encoder in model.model.encoders:
            encoder.mean_norm.adaptive = True  # whitened like the encoders it is compared with
        source: dict[str, Any] = {"labels": task}
    else:
        path = structures_path(arguments.structures, arguments.data_dir)
        train, held_out = _structures(arguments, path, first)
        model = PolySRLModel(
            "pretraining",
            objective=arguments.objective,
            polymorphs_per_batch=arguments.polymorphs_per_batch,
            max_edges=arguments.max_edges,
            compile=arguments.compile,
            autocast=arguments.autocast,
            **training,
        )
        source = {
            "structures": Path(path).name,
            "sha256": file_digest(Path(path)) if Path(path).is_file() else None,
            "stoichiometries": len(np.unique(train.groups)),
            "held_out_stoichiometries": len(np.unique(held_out.groups)),
        }
        callbacks.append(PretrainingLog(arguments.output_dir / "log.csv", held_out))
    provenance = {
        "objective": arguments.objective,
        "data": {**source, "rows": len(train), "excluded": arguments.exclude},
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "schedule": arguments.schedule,
        "seed": arguments.seed,
        "final_whitening": arguments.final_whitening,
        "revision": _revision(),
        "element_features": "Matscholar, 200-d, as packaged in matminer",
    }
    if first:
        print(json.dumps({**provenance, "config": config.to_dict()}, indent=1))
    if arguments.dry_run:
        return
    with output_folder(arguments.output_dir, alone=True) if first else contextlib.nullcontext():
        if (arguments.output_dir / MODEL_FILE).exists():
            print(f"{arguments.output_dir / MODEL_FILE} is there already: nothing to do")
        else:
            _fit(model, train, arguments, callbacks, first)
            if first:
                model.provenance = provenance
                _save(model, arguments, callbacks)
    if first and callbacks:
        table = pd.read_csv(arguments.output_dir / "log.csv")
        print(table.tail(10).round(4).to_string(index=False))


def _save(model: PolySRLModel, arguments: argparse.Namespace, callbacks: list[Any]) -> None:
    if arguments.final_whitening is not None:
        for encoder in model.model.encoders:
            encoder.mean_norm.decorrelate(arguments.final_whitening)
    if callbacks:
        model.provenance["diagnostics"] = pretraining_diagnostics(
            model.model, callbacks[0].held_out, 256, model.device
        )
    model.save(arguments.output_dir)


def _structures(
    arguments: argparse.Namespace, path: Any, first: bool
) -> tuple[PolymorphDataset, PolymorphDataset]:
    """The training part and the part for diagnostics; packed by the first process."""
    if not first:
        torch.distributed.barrier()
    dataset = PolymorphDataset(
        path,
        max_structures=arguments.max_structures,
        max_sites=arguments.max_sites,
        seed=arguments.seed,
        on_error="skip",
        cache_dir=arguments.cache_dir,
        progress=first,
    )
    if first and torch.distributed.is_initialized():
        torch.distributed.barrier()
    if first and dataset.skipped:
        print(f"{len(dataset.skipped)} structures skipped, the first: {dataset.skipped[0]}")
    exclude: set[str] = set()
    if arguments.exclude:
        folder = required_data_dir(arguments.data_dir, "labelled data, which --exclude reads")
        exclude = labelled_formulas(folder, arguments.exclude)
    return split(dataset, arguments.hold_out, exclude, arguments.seed)


def _fit(
    model: PolySRLModel,
    train: Dataset,
    arguments: argparse.Namespace,
    callbacks: list[Any],
    first: bool,
) -> None:
    restore = bool(model.get_checkpoints())
    if restore:
        model.restore()
        if not model.interrupted:  # trained to the end, but not yet saved
            if model.epochs_trained != arguments.epochs:
                raise InvalidInputError(
                    f"{arguments.output_dir} holds a run of {model.epochs_trained} epochs, "
                    f"not {arguments.epochs}"
                )
            return
    with tqdm(unit="step", desc="pretraining", disable=not first) as bar:
        model.fit(
            train,
            nb_epoch=arguments.epochs,
            checkpoint_interval=arguments.checkpoint_interval,
            max_checkpoints_to_keep=2,
            restore=restore,
            callbacks=[*callbacks, lambda model, step: bar.update(step - bar.n)],
        )


def _revision() -> str | None:
    """Revision of the code, with a mark if files have been changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    folder = Path(__file__).parent
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    main()

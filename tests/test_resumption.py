"""Commands that train, interrupted and given again."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models import data, make
from pymatgen.core import Lattice, Structure
from test_cli import FORMULAS
from tqdm import tqdm

from polysrl_dc import PolySRLModel, resumption
from polysrl_dc.cli import main

TRAIN = ["--target", "gap", "--folds", "3", "--epochs", "4", "--batch-size", "4"]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A training by cross-validation; its model and predictions go to a folder that is added."""
    table = tmp_path / "data.csv"
    pd.DataFrame({"formula": FORMULAS, "gap": np.linspace(1, 9, 12)}).to_csv(table, index=False)
    return ["train", "--input", str(table), *TRAIN, "--pretrained", "polysrl-mp"]


def interrupt(at: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Interrupt after so many steps in all, when a checkpoint is written; lists the steps."""
    write, steps = PolySRLModel.save_checkpoint, []

    def written(model: PolySRLModel, *args: object, **kwargs: object) -> None:
        steps.append(model.get_global_step())
        if len(steps) == at:
            write(model, *args, **kwargs)
            raise KeyboardInterrupt

    monkeypatch.setattr(PolySRLModel, "save_checkpoint", written)
    monkeypatch.setattr(resumption, "INTERVAL", 0.0)
    return steps


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("at", [1, 20, 36])
def test_a_training_goes_on_where_it_was_interrupted(
    at: int, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def ended(name: str) -> list[str]:
        (tmp_path / name).mkdir(exist_ok=True)
        folder = tmp_path / name
        return [*command, "--output-dir", f"{folder}/model", "--predictions", f"{folder}/p.csv"]

    assert main(ended("whole")) == 0
    steps = interrupt(at, monkeypatch)
    assert main(ended("parts")) == 130
    assert "the same command goes on" in capsys.readouterr().err.splitlines()[-1]
    assert main(ended("parts")) == 0
    assert len(steps) == 3 * 4 * 2 + 4 * 3  # each step once: three folds, and all rows
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert files(tmp_path / "whole").keys() == {"model/model.safetensors", "p.csv"}


@pytest.mark.parametrize("change", ["label", "seed", "epochs", "members"])
def test_what_another_command_has_trained_is_not_taken(
    change: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = interrupt(20, monkeypatch)
    output = ["--output-dir", str(tmp_path / "model")]
    assert main([*command, *output]) == 130
    if change == "label":
        table = Path(command[2])
        table.write_text(table.read_text().replace("9.0", "8.5"))
    more = {"seed": ["--seed", "1"], "epochs": ["--epochs", "3"], "members": ["--ensemble", "2"]}
    assert main([*command, *output, *more.get(change, [])]) == 0
    # the label is unknown to one of the folds, of which all steps but four or none were done
    expected = {"label": (28, 32), "epochs": (27,)}
    assert len(steps) - 20 in expected.get(change, (36,))
    assert main([*command, "--output-dir", str(tmp_path / "again"), *more.get(change, [])]) == 0
    assert files(tmp_path / "model") == files(tmp_path / "again")


def test_a_pretraining_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for element in ("Li", "Na"):
        for anion, length in (("F", 4.6), ("Cl", 5.6), ("Br", 6.0)):
            cell, sites = Lattice.cubic(length), [[0, 0, 0], [0.5, 0.5, 0.5]]
            structure = Structure.from_spacegroup("Fm-3m", cell, [element, anion], sites)
            paths.append(str(tmp_path / f"{element}{anion}.cif"))
            structure.to(paths[-1])
    command = ["pretrain", *paths, "--epochs", "3", "--batch-size", "2", "--output-dir"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    steps = interrupt(5, monkeypatch)
    assert main([*command, str(tmp_path / "parts")]) == 130
    assert main([*command, str(tmp_path / "parts")]) == 0
    assert steps == list(range(1, 10))
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_finished_training_comes_back_on_its_device(tmp_path: Path) -> None:
    made = [make(device=torch.device("cpu:0")) for _ in range(2)]
    trained = [resumption.fit_in(tmp_path, model, data(), 1) for model in made]
    assert [model.get_global_step() for model in made] == [trained[0].get_global_step(), 0]
    assert [str(model.device) for model in trained] == ["cpu:0", "cpu:0"]


def test_the_bar_ends_when_all_steps_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()

    def bar(**arguments: object) -> tqdm:
        return tqdm(**{**arguments, "disable": False, "file": shown})

    monkeypatch.setattr(resumption, "tqdm", bar)
    resumption.fit_in(tmp_path, make(batch_size=7), data(), 3)  # 36 rows: the last is not alone
    assert "15/15" in shown.getvalue()

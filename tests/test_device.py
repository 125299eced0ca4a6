"""What a GPU asks for: nothing computes with tensors of two devices, and numbers do not change."""

import copy
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from models import SIGNAL, data, fitted, make
from processes import SMALL, crystals
from torch.utils import backend_registration

import polysrl_dc
from polysrl_dc.resumption import fit_in

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch knows no devices written in Python", allow_module_level=True)
from pretended import pretended_gpu

ROOT = Path(__file__).resolve().parents[1]
Answers = list[np.ndarray]


def answers(model: polysrl_dc.PolySRLModel) -> Answers:
    dataset = data()
    return [
        model.predict(dataset),
        *model.predict_uncertainty(dataset, polymorphs=False),
        model.predict_embedding(dataset),
    ]


def learned(**settings: object) -> Callable[[str, Path], Answers]:
    return lambda device, folder: answers(fitted(device=device, **settings))


def several_encoders(device: str, folder: Path) -> Answers:
    model = polysrl_dc.PolySRLModel(pretrained=["polysrl-mp", "graphcl-mp"], device=device)
    model.fit(data(), nb_epoch=1, checkpoint_interval=0)
    return answers(model)


def classes(device: str, folder: Path) -> Answers:
    labels = data((SIGNAL > 0).astype(float))
    model = fitted(task="classification", device=device, dataset=labels)
    return [model.predict(labels)]


def calibrated(device: str, folder: Path) -> Answers:
    model, dataset = fitted(device=device), data()
    polysrl_dc.keep_formulas(model, dataset)
    model.calibrate(dataset, polymorphs=False)
    found = model.domain.query(["NaBr", "Fe2O3"])
    return [*model.predict_uncertainty(dataset), found["distance"].to_numpy()]


def saved(device: str, folder: Path) -> Answers:
    model = fitted(device=device)
    model.save(folder / "model")
    again = polysrl_dc.PolySRLModel.from_pretrained(folder / "model", device=device)
    again.fit(data(), nb_epoch=1, checkpoint_interval=0)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    return [*answers(again), *(one.predict(data()) for one in copies)]


def interrupted(device: str, folder: Path) -> Answers:
    first = make(device=device, model_dir=str(folder))
    first.fit(data(), nb_epoch=1, checkpoint_interval=2)
    second = make(device=device, model_dir=str(folder))
    second.restore()
    second.fit(data(), nb_epoch=1, checkpoint_interval=0)
    return answers(second) + answers(fit_in(folder / "unfinished", second, data(), 1, "training"))


def pretrained(objective: str) -> Callable[[str, Path], Answers]:
    def run(device: str, folder: Path) -> Answers:
        structures = crystals()
        model = make(task="pretraining", objective=objective, config=SMALL, device=device)
        loss = model.fit(structures, nb_epoch=2, checkpoint_interval=0)
        found = [np.array(loss), model.predict_embedding(["NaCl", "MgO"])]
        if objective == "polysrl":
            found += [model.predict_polymorphism(["NaCl"])]
            found += model.retrieve(["NaCl"], structures, k=2)
            found += model.retrieve(["NaCl"], structures, k=2, same_proportions=True)
        return found

    return run


USES = {
    "one model": learned(),
    "frozen": learned(freeze_encoder=True),
    "ensemble": learned(n_ensemble=3),
    "several encoders": several_encoders,
    "classes": classes,
    "calibrated": calibrated,
    "saved": saved,
    "interrupted": interrupted,
    **{
        objective: pretrained(objective)
        for objective in ("polysrl", "without_sampling", "infomax3d", "graphcl")
    },
}


def refusals(device: str) -> list[str]:
    """What a GPU says to an operation on both devices and to two others that it cannot do."""
    row = torch.ones(3)
    there = row.to(device)
    assert (there + 1).device.type == "gpu" and (there + 1).cpu().tolist() == [2.0] * 3
    said = []
    for wrong in (
        lambda: there + row,
        there.numpy,
        lambda: torch.rand(2, device=device, generator=torch.Generator()),
    ):
        try:
            wrong()
        except RuntimeError as error:
            said.append(str(error))
    return said


def main(folder: Path) -> None:
    """Write what a GPU answers, of each use."""
    torch.set_num_threads(1)
    with pretended_gpu() as device:
        (folder / "refusals").write_text("\n".join(refusals(device)))
        for use, run in USES.items():
            try:
                np.savez(folder / f"{use}.npz", *run(device, folder / use))
            except Exception:
                (folder / f"{use}.txt").write_text(traceback.format_exc())


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of a process of its own: a device is known before the first gradient, or never."""
    folder = tmp_path_factory.mktemp("gpu")
    places = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("use", USES)
def test_a_gpu_answers_as_the_cpu_does(use: str, on_gpu: Path, tmp_path: Path) -> None:
    failed = on_gpu / f"{use}.txt"
    assert not failed.exists(), failed.read_text()
    expected = USES[use]("cpu", tmp_path)
    with np.load(on_gpu / f"{use}.npz") as found:
        assert len(found) == len(expected)
        for one, other in zip(found.values(), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_what_a_gpu_refuses_is_refused(on_gpu: Path) -> None:
    both, numpy, generator = (on_gpu / "refusals").read_text().splitlines()
    assert "on the GPU and the CPU" in both
    assert "numpy" in numpy
    assert "generator of the other device" in generator


if __name__ == "__main__":
    main(Path(sys.argv[1]))

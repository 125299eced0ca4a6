"""Every example of the README runs, in order, on small files of the names it uses."""

import glob
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure

from polysrl_dc import PolySRLModel
from polysrl_dc.cli import main

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
FORMULAS = "NaCl KCl LiF NaF KBr MgO CaO ZnO GaN AlN TiO2 SiO2 Fe2O3 SrTiO3 CdTe InP".split()
METALS = "Li Na K Rb Cs Mg Ca Sr Ba Sc Y La Ti Zr Hf V Nb Ta Cr Mo W Mn Fe Co Ni Cu".split()
ANIONS = "P S3 Se5 Te7 Cl2 Br4 O3 F5".split()
FORMULAS += [metal + anion for metal in METALS for anion in ANIONS]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fit = PolySRLModel.fit

    def shorter(model: PolySRLModel, *args: Any, nb_epoch: int = 10, **kwargs: Any) -> float:
        return fit(model, *args, nb_epoch=min(nb_epoch, 2), **kwargs)

    monkeypatch.setattr(PolySRLModel, "fit", shorter)
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"formula": FORMULAS, "gap": np.linspace(1, 8, len(FORMULAS))}).to_csv("gaps.csv")
    pd.DataFrame({"formula": ["BN", "AgCl"]}).to_csv("new.csv")
    Path("structures").mkdir()
    rows = []
    for anion, length in [("Cl", 5.64), ("F", 4.63), ("Br", 5.97), ("I", 6.47)]:
        salt = Structure.from_spacegroup(
            "Fm-3m", Lattice.cubic(length), ["Na", anion], [[0, 0, 0], [0.5, 0.5, 0.5]]
        )
        salt.to(f"structures/Na{anion}.cif")
        rows.append(
            {
                "material_id": anion,
                "cell": [*salt.lattice.abc, *salt.lattice.angles],
                "numbers": list(salt.atomic_numbers),
                "frac_coords": salt.frac_coords.ravel().tolist(),
            }
        )
    pd.DataFrame(rows).to_parquet("structures.parquet")
    return tmp_path


def test_the_examples_run(workplace: Path) -> None:
    blocks = re.findall(r"```(sh|python)\n(.*?)```", README, flags=re.DOTALL)
    ran = []
    for language, text in blocks:
        if language == "python":
            exec(compile(text, "README.md", "exec"), {"__name__": "readme"})
            ran.append("python")
        for line in text.replace("\\\n", " ").splitlines():
            if not line.startswith("polysrl "):
                continue
            words = shlex.split(line, comments=True)
            files = [[word] if "*" not in word else glob.glob(word) for word in words[1:]]
            assert main([word for group in files for word in group]) == 0, line
            ran.append(words[1])
    used = "train predict predict domain info python python python"
    assert ran == [*used.split(), *"pretrain embed train retrieve domain python python".split()]
    assert {"predictions.csv", "embeddings.csv", "encoder"} <= {p.name for p in workplace.iterdir()}
    assert len(pd.read_csv("predictions.csv")) == 2

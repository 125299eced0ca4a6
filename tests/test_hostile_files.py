"""Files that are damaged, from elsewhere or made to execute code: refused by name.

A file that holds its checksum (model, checkpoint, cache, Parquet pages, gzip, record) is refused or
equal to the original. In a file that people write (CSV, CIF, JSON) another digit is another value:
it is refused, or read as another reader reads it.
"""

import ast
import gzip
import inspect
import io
import json
import pickle
import re
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from deepchem.models import Model, TorchModel
from hostile import KINDS, STRUCTURES, damaged, outcome, table
from models import make

import polysrl_dc
from polysrl_dc.checkpoints import CheckpointError
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.sources import read_structure

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = [*(ROOT / "polysrl_dc").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]

# ------------------------------------------------------------------------ damage


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_refused_or_equal(name, tmp_path, deep, counts):
    kind = KINDS[name](tmp_path)
    truth = kind.load()
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for _ in range(200 if deep else 20):
        file = kind.files[rng.integers(len(kind.files))]
        original = file.read_bytes()
        content = original
        while content == original:
            content = kind.pack(damaged(kind.unpack(original), rng))
        found = outcome(kind, file, truth, content)
        counts["mutated files"] += 1
        counts[f"mutated files {found}"] += 1
        counts["mutated files loaded wrongly"] += 0
        assert found in ("refused", "equal to the original", "read as they are written"), content
        file.write_bytes(original)
    assert kind.load() == truth


# ------------------------------------------------------------ code that would be executed


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


def disguises(payload: Payload) -> list[bytes]:
    """A payload in every format that some library would unpickle."""
    in_torch, in_numpy = io.BytesIO(), io.BytesIO()
    torch.save({"model_state_dict": payload}, in_torch)
    np.save(in_numpy, np.array([payload] * 4, dtype=object), allow_pickle=True)
    plain = pickle.dumps(payload, protocol=2)
    return [plain, gzip.compress(plain), in_torch.getvalue(), in_numpy.getvalue()]


@pytest.fixture
def sentinel(tmp_path, counts):
    """A file that exists when a payload was executed."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()  # else the trick shows nothing
    path.unlink()
    yield path
    counts["payloads executed"] += path.exists()
    assert not path.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_pickles_under_every_name_are_refused(name, tmp_path, sentinel):
    (tmp_path / "files").mkdir()
    kind = KINDS[name](tmp_path / "files")
    for file in kind.files:
        original = file.read_bytes()
        for content in disguises(Payload(sentinel)):
            assert outcome(kind, file, None, content) == "refused"
        file.write_bytes(original)


def test_modules_named_in_a_structure_are_not_imported(tmp_path, sentinel, monkeypatch):
    (tmp_path / "payload_module.py").write_text(f"open({str(sentinel)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    content = STRUCTURES[0].as_dict()
    payload = {"@module": "payload_module", "@class": "Payload"}
    content["properties"] = content["sites"][0]["properties"] = {"x": payload}
    (tmp_path / "s.json").write_text(json.dumps(content))
    assert len(read_structure(tmp_path / "s.json")) == 2
    assert len(polysrl_dc.StructureGraphFeaturizer()(content)[0].numbers) == 2
    (tmp_path / "s.yaml").write_text(f"!!python/object/apply:pathlib.Path.touch ['{sentinel}']")
    with pytest.raises(InvalidInputError, match=r"s\.yaml"):
        read_structure(tmp_path / "s.yaml")


def test_a_poscar_without_elements_is_refused(tmp_path):
    cell = "1.0\n4 0 0\n0 4 0\n0 0 4\n"
    sites = "1 1\nDirect\n0 0 0\n0.5 0.5 0.5\n"
    for name, elements in (("POSCAR", ""), ("s.vasp", ""), ("POSCAR_named", "Na Cl\n")):
        (tmp_path / name).write_text(f"salt\n{cell}{elements}{sites}")
        if elements:
            assert read_structure(tmp_path / name).formula == "Na1 Cl1"
        else:
            with pytest.raises(InvalidInputError, match=f"{name} .*Elements in POSCAR cannot be"):
                read_structure(tmp_path / name)


@pytest.mark.parametrize("wrong", [{"a": -4.0}, {"beta": 260.0}, {"gamma": -100.0}, {"b": 0.0}])
def test_a_cell_of_no_lengths_and_angles_is_refused(wrong, tmp_path):
    content = STRUCTURES[0].as_dict()
    del content["lattice"]["matrix"]
    (tmp_path / "s.json").write_text(json.dumps(content))
    assert read_structure(tmp_path / "s.json").volume == pytest.approx(STRUCTURES[0].volume)
    content["lattice"].update(wrong)
    (tmp_path / "s.json").write_text(json.dumps(content))
    STRUCTURES[0].to(filename=str(tmp_path / "s.cif"))
    ((name, value),) = wrong.items()
    cell = f"_cell_{'length' if len(name) == 1 else 'angle'}_{name}"
    text = re.sub(rf"{cell} .*", f"{cell} {value}", (tmp_path / "s.cif").read_text())
    (tmp_path / "s.cif").write_text(text)
    for file in ("s.json", "s.cif"):
        with pytest.raises(InvalidInputError, match=rf"{file} .*cell not above 0"):
            read_structure(tmp_path / file)


def test_expressions_in_a_cif_file_are_not_evaluated(tmp_path, sentinel):
    STRUCTURES[0].to(filename=str(tmp_path / "s.cif"))
    text = (tmp_path / "s.cif").read_text()
    for place in ("x, y, z", "NaCl", "5.69"):
        assert place in text
        evil = f'"[open({str(sentinel)!r}, chr(119))][0]"'
        (tmp_path / "s.mcif").write_text(
            text.replace(place, evil)
            + f"_space_group_magn.transform_BNS_Pp_abc {evil}\n_space_group_magn.number_BNS 1.1\n"
        )
        with pytest.raises(InvalidInputError, match=r"s\.mcif"):
            read_structure(tmp_path / "s.mcif")


@pytest.mark.filterwarnings("ignore:pickle-based", "ignore:pyarrow.PyExtensionType")
def test_types_in_a_parquet_file_are_not_unpickled(tmp_path, sentinel):
    names = table(STRUCTURES)
    payload = pickle.dumps(Payload(sentinel))
    field = names.schema.field("numbers").with_metadata(
        {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload}
    )
    pq.write_table(names.cast(names.schema.set(2, field)), tmp_path / "s.parquet")
    if hasattr(pa, "PyExtensionType"):  # pyarrow before 21 knows such types, warns and reads none
        with pytest.raises(InvalidInputError, match="numbers is extension<"):
            polysrl_dc.PolymorphDataset(tmp_path / "s.parquet", progress=False, processes=1)
        return
    dataset = polysrl_dc.PolymorphDataset(tmp_path / "s.parquet", progress=False, processes=1)
    assert len(dataset) == len(STRUCTURES)


def test_what_deepchem_pickles_is_overridden(tmp_path, sentinel):
    methods = {
        name: method
        for base in (Model, TorchModel)
        for name, method in vars(base).items()
        if inspect.isfunction(method)
    }
    pickling = [
        name
        for name, method in methods.items()
        if any(word in inspect.getsource(method) for word in ("torch.load", "torch.save", "joblib"))
    ]
    assert {"restore", "save_checkpoint"} <= set(pickling)
    for name in (*pickling, "save", "reload", "get_checkpoints", "load_from_pretrained"):
        owner = next(base for base in polysrl_dc.PolySRLModel.__mro__ if name in vars(base))
        assert owner.__module__.startswith("polysrl_dc"), name
    torch.save({"model_state_dict": Payload(sentinel)}, tmp_path / "checkpoint1.pt")
    model = make(model_dir=str(tmp_path))
    assert model.get_checkpoints() == []
    with pytest.raises(CheckpointError, match=r"checkpoint1\.pt"):
        model.restore(str(tmp_path / "checkpoint1.pt"))


#: Payloads that speed.py hands to a process of its own are made in the same function.
ALLOWED = {("speed.py", "import pickle"), ("speed.py", "pickle.loads"), ("sources.py", "loadfn")}
EXECUTING = {
    *("eval", "exec", "compile", "__import__", "loadfn", "from_file_unsafe", "MontyDecoder"),
    *("torch.load", "pickle.load", "pickle.loads", "joblib.load", "pd.read_pickle", "pd.eval"),
    *("marshal.load", "marshal.loads", "yaml.load", "shelve.open", "pd.read_hdf", "np.fromfile"),
}
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}


def suspects(path: Path) -> set[tuple[str, str]]:
    """Places of a program that could execute what is in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {f"import {name}" for name in names if name.partition(".")[0] in PICKLING}
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            unsafe = name == "np.load" and keywords.get("allow_pickle") != "False"
            unsafe |= keywords.get("weights_only") == "False"
            unsafe |= keywords.get("allow_pickle", "False") != "False"
            found |= {name} if unsafe or name in EXECUTING else set()
    return {(path.name, name) for name in found}


def test_no_program_executes_what_it_reads(tmp_path):
    assert set().union(*map(suspects, PROGRAM)) <= ALLOWED
    (tmp_path / "bad.py").write_text(
        "import pickle as p\nfrom joblib import load\nnp.load(x)\nnp.load(x, allow_pickle=True)\n"
        "torch.load(x)\nf(x, weights_only=False)\neval(x)\nyaml.load(x)\nmodel.eval()\n"
        "np.load(x, allow_pickle=False)\njson.load(x)\n"
    )
    names = {"import pickle", "np.load", "torch.load", "f", "eval", "yaml.load"}
    assert suspects(tmp_path / "bad.py") == {("bad.py", name) for name in names}

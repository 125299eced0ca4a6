"""The shape of the project: layering, file sizes, package data, registration, the two commands."""

import ast
import configparser
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ORDER = [
    "_deepchem",
    "errors",
    "recalibration",
    "metrics",
    "elements",
    "stoichiometry",
    "crystal",
    "quotient",
    "graphs",
    "featurizers",
    "sources",
    "packing",
    "datasets",
    "config",
    "distributed",
    "batches",
    "layers",
    "stoichiometry_encoder",
    "structure_encoder",
    "heads",
    "losses",
    "objectives",
    "checkpoints",
    "domain",
    "persistence",
    "prediction",
    "retrieval",
    "callbacks",
    "training",
    "model",
    "resumption",
    "polymorph_variance",
    "cross_validation",
    "tables",
    "inputs",
    "recipes",
    "estimators",
    "options",
    "cli",
    "__init__",
]
ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "polysrl_dc").glob("**/*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("**/*.py"))
REGISTERED = {
    "models": ["PolySRLModel"],
    "feat": ["StoichiometryGraphFeaturizer", "StructureGraphFeaturizer"],
    "splits": ["StoichiometrySplitter"],
}


def imported_from_package(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name) for each import of polysrl_dc, wherever it stands in the file.

    ``module`` is "" for the package itself; ``name`` is None for ``import polysrl_dc.module``.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, _, module = alias.name.partition(".")
                if package == "polysrl_dc":
                    yield module, None
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 0:
                package, _, module = module.partition(".")
                if package != "polysrl_dc":
                    continue
            for alias in node.names:
                yield (module, alias.name) if module else ("", alias.name)


def layers_imported(tree: ast.AST) -> set[str]:
    """Names in ORDER that a file of the package imports; the package itself counts as last."""
    layers = set()
    for module, name in imported_from_package(tree):
        layer = module.partition(".")[0] or (name if name in ORDER else "__init__")
        layers.add(str(layer))
    return layers


def offences(layer: str, tree: ast.AST) -> set[str]:
    """Modules that ``layer`` imports although they do not stand above it."""
    above = ORDER[: ORDER.index(layer)]
    return {other for other in layers_imported(tree) if other not in above}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_file_imports_only_from_those_above_it(path: Path) -> None:
    assert path.stem in ORDER, f"{path.name} has no place in the layering: give it one in ORDER"
    found = offences(path.stem, ast.parse(path.read_text()))
    assert not found, f"{path.name} may not import {sorted(found)}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from .model import PolySRLModel", {"model"}),
        ("from . import losses, errors", {"losses"}),
        ("from polysrl_dc.cli import main", {"cli"}),
        ("def f():\n    import polysrl_dc.heads", {"heads"}),
        ("import polysrl_dc", {"__init__"}),
        ("from polysrl_dc import PolySRLModel", {"__init__"}),
        ("from .graphs import StoichiometryGraph\nimport torch", set()),
    ],
)
def test_the_layering_check_sees_every_form_of_import(line: str, expected: set[str]) -> None:
    assert offences("featurizers", ast.parse(line)) == expected


def test_few_files_of_moderate_length() -> None:
    assert 0 < len(SOURCES) <= 40
    lengths = {path.name: len(path.read_text().splitlines()) for path in SOURCES}
    assert not {name: n for name, n in lengths.items() if n > 400}


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmarks_use_only_the_public_api(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = [part for pair in imported_from_package(tree) for part in pair if part]
    attributes = [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    ]
    private = [name for name in names + attributes if name.startswith("_")]
    assert not [name for name in private if not name.endswith("__")]


def test_one_file_of_the_benchmarks_imports_deepchem_and_in_silence() -> None:
    importing = {
        path.name
        for path in BENCHMARKS
        if re.search(r"^\s*(?:import|from) deepchem\b", path.read_text(), flags=re.MULTILINE)
    }
    assert importing == {"graph_data.py"}
    code = "import sys; sys.path.insert(0, 'benchmarks'); import graph_data"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


def test_importing_the_package_does_not_read_the_prototypes_of_pymatgen() -> None:
    code = "import sys, polysrl_dc; sys.exit('pymatgen.analysis.prototypes' in sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)


def test_the_page_of_the_benchmarks_names_every_file() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    kinds = (".py", ".csv", ".md")
    found = [path.name for path in (ROOT / "benchmarks").iterdir() if path.suffix in kinds]
    assert not [name for name in found if name not in page and name != "README.md"]
    named = re.findall(r"\w+\.(?:py|csv|md)\b", page)
    assert not [name for name in named if not (ROOT / "benchmarks" / name).is_file()]


def test_everything_shipped_is_package_data() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    patterns = settings["options.package_data"]["polysrl_dc"].split()
    package = ROOT / "polysrl_dc"
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    assert package / "py.typed" in shipped
    present = {path for path in package.rglob("*") if path.is_file() and path.suffix != ".md"}
    others = {path for path in present if path.suffix not in (".py", ".pyc")}
    assert others <= shipped, f"not shipped: {sorted(others - shipped)}"


def test_pyproject_holds_the_build_system_only() -> None:
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())) == {"build-system"}


def test_ci_runs_the_readme_test_command() -> None:
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert "tox run" in command
    readme = (ROOT / "README.md").read_text().splitlines()
    assert command in readme
    assert command.replace("-e tests", "-e embedded") in readme


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds the package of this working tree."""
    program = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )


def test_import_registers_once_and_opens_no_connection() -> None:
    result = run_python(
        f"""
        import importlib
        import socket
        import deepchem as dc

        def refuse(*arguments, **keywords):
            raise SystemExit(f"connection at import: {{arguments}}")

        socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
        names = {REGISTERED!r}
        assert not any(hasattr(getattr(dc, m), n) for m in names for n in names[m])
        import polysrl_dc
        first = {{n: getattr(getattr(dc, m), n) for m in names for n in names[m]}}
        assert all(getattr(polysrl_dc, n) is first[n] for n in first), first
        importlib.reload(polysrl_dc)
        assert all(getattr(getattr(dc, m), n) is first[n] for m in names for n in names[m])
        print("registered")
        """
    )
    assert result.stdout.strip().endswith("registered"), result.stderr


def test_foreign_objects_are_not_overwritten() -> None:
    result = run_python(
        f"""
        import deepchem as dc

        places = [(getattr(dc, m), n) for m, names in {REGISTERED!r}.items() for n in names]
        for module, name in places:
            foreign = type(name, (), {{}})
            setattr(module, name, foreign)
            try:
                import polysrl_dc
            except RuntimeError as error:
                assert name in str(error), error
            else:
                raise SystemExit(f"{{name}} was accepted")
            assert [getattr(m, n, None) for m, n in places if hasattr(m, n)] == [foreign]
            delattr(module, name)
        import polysrl_dc
        assert all(getattr(module, name) is getattr(polysrl_dc, name) for module, name in places)
        print("refused")
        """
    )
    assert result.stdout.strip().endswith("refused"), result.stderr

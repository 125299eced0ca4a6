"""The notebooks run from top to bottom on their fast setting; what is committed of them is clean.

To run them fully and keep their outputs, see "Notebooks" in the README.
"""

import asyncio
import os
import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from matplotlib import rc_params_from_file
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets import default

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
#: Words that only the outputs of a full run on the real data hold.
FULL = {
    "01_quickstart": "4000 formulas to train on",
    "02_polymorphism": "154,925 structures of the Materials Project",
    "03_roost_crabnet": "Differences below are to: PolySRL",
    "04_matbench": "matbench_phonons of matbench_v0.1: 1,265 rows",
}
#: Those that read real data on the fast setting too.
READ_DATA = ("03_roost_crabnet", "04_matbench")
MACHINE = re.compile(r"(?<![\w.])/(work|home|tmp|root|usr|opt|mnt|var|Users)\b|[A-Z]:\\\\?\w")
TOGETHER = 2


class OwnInterpreter(AsyncKernelManager):
    """Kernels of the interpreter that runs the tests, whatever kernels are installed."""

    @default("kernel_spec_manager")
    def _only_native(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs_of(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code_of(notebook) for output in cell.outputs]


def code_of(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures_of(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for output in outputs_of(notebook) if "image/png" in output.get("data", {})]


def text_of(notebook: NotebookNode) -> str:
    """All that is written in a notebook, its pictures aside."""
    texts = [cell.source for cell in notebook.cells]
    for output in outputs_of(notebook):
        data = output.get("data", {"text/plain": output.get("text", "")})
        texts += [str(value) for kind, value in data.items() if not kind.startswith("image/")]
    return "\n".join(texts)


def execute(names: tuple[str, ...], data: Path, scratch: Path) -> dict[str, object]:
    """Executed notebook, or what it failed with, by name; a few kernels at a time."""
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"},
        "IPYTHONDIR": str(scratch / "ipython"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "OMP_NUM_THREADS": "1",
        "POLYSRL_DATA": str(data),
        "POLYSRL_FAST": "1",
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")])
        ),
    }

    async def run(name: str, turn: asyncio.Semaphore) -> NotebookNode:
        async with turn:
            client = NotebookClient(
                read(name),
                timeout=300,
                kernel_manager_class=OwnInterpreter,
                resources={"metadata": {"path": str(FOLDER)}},
            )
            return await client.async_execute(env=environment)

    async def run_all() -> list[object]:
        turn = asyncio.Semaphore(TOGETHER)
        return await asyncio.gather(*(run(name, turn) for name in names), return_exceptions=True)

    return dict(zip(names, asyncio.run(run_all()), strict=True))


@pytest.fixture(scope="module")
def without_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    scratch = tmp_path_factory.mktemp("without_data")
    return execute(tuple(FULL), scratch, scratch)


@pytest.fixture(scope="module")
def with_data(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return execute(READ_DATA, data_dir.resolve(), tmp_path_factory.mktemp("with_data"))


def assert_quiet(result: object) -> NotebookNode:
    """A notebook that ran to its end without an error or a word on stderr."""
    if isinstance(result, BaseException):
        raise result
    assert isinstance(result, NotebookNode)
    assert [output.text for output in outputs_of(result) if output.get("name") == "stderr"] == []
    return result


def test_every_notebook_is_tested() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(FULL)


@pytest.mark.parametrize("name", FULL)
def test_runs_without_data(name: str, without_data: dict[str, object]) -> None:
    notebook = assert_quiet(without_data[name])
    assert pictures_of(notebook)
    if name in READ_DATA:
        assert re.search("Not shown|embedded_seebeck", text_of(notebook))


@pytest.mark.parametrize("name", READ_DATA)
def test_runs_on_real_data(name: str, with_data: dict[str, object]) -> None:
    assert len(pictures_of(assert_quiet(with_data[name]))) == len(pictures_of(read(name)))


@pytest.mark.parametrize("name", FULL)
def test_committed_outputs_are_those_of_a_full_run(name: str) -> None:
    notebook = read(name)
    cells = code_of(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "error" not in {output.output_type for output in outputs_of(notebook)}
    assert pictures_of(notebook)
    assert FULL[name] in text_of(notebook)


@pytest.mark.parametrize("name", FULL)
def test_nothing_of_the_machine_is_committed(name: str) -> None:
    notebook, path = read(name), FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < 1_000_000
    assert not MACHINE.search(text_of(notebook))
    assert not [output for output in outputs_of(notebook) if output.get("name") == "stderr"]
    assert not re.search(r"\bwarning\b|\d+%\|", text_of(notebook), flags=re.IGNORECASE)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    assert [cell.metadata for cell in notebook.cells if cell.metadata] == []


def test_lines_of_a_figure_have_different_styles() -> None:
    style = rc_params_from_file(FOLDER / "print.mplstyle", use_default_template=False)
    styles = style["axes.prop_cycle"].by_key()
    for name, values in styles.items():
        assert len(set(values)) == len(values), f"{name} is repeated"
    source = "".join(cell.source for cell in read("03_roost_crabnet").cells)
    runs = re.search(r"^RUNS = \{.*?^\}", source, flags=re.DOTALL | re.MULTILINE)
    assert runs and runs.group().count("\n    ") <= len(styles["color"])

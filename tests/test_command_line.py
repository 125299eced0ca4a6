"""Runners of the benchmarks without the data, or the records, that they read."""

import importlib
import runpy
from pathlib import Path
from types import SimpleNamespace

import command_line
import pandas as pd
import pytest
from command_line import chosen_targets, runner_parser
from files import write_csv

RUNNERS = (
    *("calibration", "compare", "compare_cost", "compare_speed", "crabnet_matbench", "domain"),
    *("ensembles", "fit_variance", "known", "pretrain", "publications", "recipe_sizes", "recipes"),
    *("retrieval", "run_matbench", "run_wetlab", "search", "speed", "summarize", "thermoelectrics"),
    "uncertainty",
)
NEEDS = {
    **dict.fromkeys(("domain", "known", "search", "uncertainty"), "data"),
    "retrieval": "structures",
}
ARGUMENTS = {"fit_variance": ["polysrl-mp"]}


def ended(name, *options):
    """Exit status or message of a runner."""
    try:
        return importlib.import_module(name).main([*ARGUMENTS.get(name, ()), *options])
    except SystemExit as error:
        return error.code


def test_results_lie_beside_the_runners_wherever_they_are_started_from(tmp_path, monkeypatch):
    place = Path(command_line.__file__).resolve()
    for folder in (place.parent, place.parents[1], tmp_path):
        monkeypatch.chdir(folder)
        parser = runpy.run_path(str(place))["runner_parser"]("")
        assert parser.parse_args([]).output_dir.resolve() == place.parent


@pytest.mark.parametrize("name", RUNNERS)
def test_a_data_folder_that_is_not_there_ends_a_runner_in_one_line(name, tmp_path, capsys):
    if name in ("compare_cost", "compare_speed", "crabnet_matbench"):
        pytest.importorskip("aviary", reason="the extra peers is not installed")
    nowhere = tmp_path / "nowhere"
    code = ended(name, "--data-dir", str(nowhere), "--output-dir", str(tmp_path / "made"))
    said = str(code) if name == "pretrain" else capsys.readouterr().err  # Python prints the former
    assert said.rstrip().endswith(f"the data folder {nowhere} does not exist")
    assert code == 2 or name == "pretrain"
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", NEEDS)
def test_without_a_data_folder_the_options_are_named(name, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("POLYSRL_DATA", raising=False)
    assert ended(name, "--output-dir", str(tmp_path)) == 2
    assert f"no {NEEDS[name]}: pass --data-dir or set POLYSRL_DATA" in capsys.readouterr().err


def test_every_runner_that_reads_the_data_is_tested():
    sources = {
        path.stem: path.read_text()
        for path in Path(importlib.import_module("tasks").__file__).parent.glob("*.py")
    }
    made = {name for name, text in sources.items() if "= runner_parser(" in text}
    assert made - {"command_line", "paper_protocol"} | {"compare", "run_wetlab"} == set(RUNNERS)


def test_options_for_structures_and_the_output_folder():
    assert not hasattr(runner_parser("x").parse_args([]), "cache_dir")
    parser = runner_parser("x", cache=True, output_dir=None)
    with pytest.raises(SystemExit):
        parser.parse_args(["--cache-dir", "packed"])
    found = parser.parse_args(["--cache-dir", "packed", "--output-dir", "made"])
    assert (found.cache_dir, found.output_dir) == ("packed", Path("made"))


def test_tables_are_written_with_the_digits_asked_for(tmp_path):
    table = pd.DataFrame({"k": [1], "recall": [1 / 3]}, index=[7])
    for digits, text in ((4, "0.3333"), (6, "0.333333"), (None, "0.3333333333333333")):
        write_csv(tmp_path / "table.csv", table, digits)
        assert (tmp_path / "table.csv").read_text() == f"k,recall\n1,{text}\n"


def test_targets_of_matbench_are_found_without_their_prefix(capsys):
    targets = [SimpleNamespace(name=name) for name in ("matbench_jdft2d", "band_gap")]
    parser = runner_parser("x")
    for names, expected in (
        (None, targets),
        (["jdft2d"], targets[:1]),
        (["band_gap", "matbench_jdft2d"], targets[::-1]),
    ):
        assert chosen_targets(parser, targets, names) == expected
    with pytest.raises(SystemExit):
        chosen_targets(parser, targets, ["gap"])
    assert "no target is named 'gap'" in capsys.readouterr().err

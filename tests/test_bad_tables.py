"""Generated tables and datasets through loaders, console and model.

As in test_bad_input: good and bad rows stand in one table, so that a row that is lost, or a label
that is read for another row, would shift the others.
"""

import csv
import gzip
import json
from datetime import datetime, timedelta
from decimal import Decimal
from io import BytesIO
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import deepchem as dc
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawing import draw
from formulas import bad_formulas, written
from hypothesis import assume, given
from hypothesis import strategies as st
from matminer.utils.io import store_dataframe_as_json
from models import make

import polysrl_dc
from polysrl_dc.batches import LabeledData
from polysrl_dc.cli import main
from polysrl_dc.datasets import drop_skipped
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.graphs import StoichiometryGraph
from polysrl_dc.inputs import numbers
from polysrl_dc.tables import WRITERS as WRITTEN
from polysrl_dc.tables import read_table, write_table

#: What pandas takes for a missing or infinite number before a loader of DeepChem sees it.
NO_TEXT = {"nan", "na", "n/a", "none", "null", "inf", "infinity", ""}


def is_text(formula):
    return isinstance(formula.given, str) and "\x00" not in formula.given


def tables():
    """Formulas in writing, at least one of them good."""
    rows = st.lists(written() | bad_formulas().filter(is_text), min_size=1, max_size=8)
    return rows.filter(lambda drawn: any(accepted(formula) for formula in drawn))


def accepted(formula):
    """Whether the parser takes it, which test_bad_input compares with what it is."""
    try:
        polysrl_dc.StoichiometryGraphFeaturizer().featurize(formula.given)
    except InvalidInputError:
        return False
    return True


def graph_of(formula):
    return StoichiometryGraph(np.array(formula.numbers, np.uint8), formula.fractions)


# ------------------------------------------------------------------- loaders


def from_csv(folder, texts, labels, featurizer):
    with open(folder / "d.csv", "w", newline="") as file:
        csv.writer(file).writerows([["name", "formula", "gap"], *zip(count(), texts, labels)])
    loader = dc.data.CSVLoader(["gap"], featurizer, "formula", "name")
    return loader.create_dataset(str(folder / "d.csv"), shard_size=3)


def from_json(folder, texts, labels, featurizer):
    rows = zip(count(), texts, labels, strict=False)
    lines = [json.dumps({"name": i, "formula": f, "gap": y}) for i, f, y in rows]
    (folder / "d.json").write_text("\n".join(lines))
    loader = dc.data.JsonLoader(["gap"], "formula", featurizer, "gap", id_field="name")
    return loader.create_dataset(str(folder / "d.json"), shard_size=3)


def from_memory(folder, texts, labels, featurizer):
    loader = dc.data.InMemoryLoader(["gap"], featurizer)
    rows = [(text, label, 1.0, row) for row, text, label in zip(count(), texts, labels)]
    return drop_skipped(loader.create_dataset(rows, shard_size=3))


@pytest.mark.parametrize("load", [from_csv, from_json, from_memory])
def test_loaders_keep_label_and_id(load, deep, tally, tmp_path):
    @given(tables())
    def check(drawn):
        texts = [formula.given for formula in drawn]
        unread = NO_TEXT if load is not from_memory else set()
        good = [i for i, f in enumerate(drawn) if accepted(f) and f.given.lower() not in unread]
        bad = sorted(set(range(len(drawn))) - set(good))
        assume(good)
        labels = [0.5 * i for i in range(len(drawn))]
        featurizer = polysrl_dc.StoichiometryGraphFeaturizer(on_error="skip")
        with tally.inputs(len(drawn)):
            dataset = load(tmp_path, texts, labels, featurizer)
            assert [int(name) for name in dataset.ids] == good
            np.testing.assert_array_equal(np.ravel(dataset.y).astype(float), 0.5 * np.array(good))
            for row, graph in zip(good, dataset.X, strict=True):
                assert graph.numbers.tolist() == drawn[row].numbers
            tally.right(len(good))
            if bad:
                named = "" if load is from_memory else f"^row {bad[0]}: "
                with pytest.raises(InvalidInputError, match=named):
                    load(tmp_path, texts, labels, polysrl_dc.StoichiometryGraphFeaturizer())
            tally.refused(len(bad))

    draw(check, deep, few=6, many=120)


# -------------------------------------------------------------------- console


WRITERS = {
    "csv": lambda frame, path: frame.to_csv(path, index=False, lineterminator="\n"),
    "parquet": lambda frame, path: frame.set_index("name").to_parquet(path),
    "json": lambda frame, path: frame.to_json(path, orient="records"),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "json.gz": lambda frame, path: store_dataframe_as_json(frame, path, pbar=False),
}


def run(arguments, capsys):
    """Exit status, what was printed, and the last line of the errors."""
    capsys.readouterr()
    status = main(arguments)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, (captured.err.strip().splitlines() or [""])[-1]


@pytest.mark.parametrize("kind", WRITERS)
def test_the_console_keeps_every_row_or_names_it(kind, deep, tally, encoder, tmp_path, capsys):
    table, output = str(tmp_path / f"t.{kind}"), tmp_path / "out.parquet"

    @given(tables())
    def check(drawn):
        frame = pd.DataFrame({"name": [f"n{i}" for i in range(len(drawn))], "note": 'é, "x"'})
        frame["composition"] = [formula.given for formula in drawn]
        WRITERS[kind](frame, table)
        good = [i for i, formula in enumerate(drawn) if accepted(formula)]
        bad = sorted(set(range(len(drawn))) - set(good))
        command = ["embed", "--input", table, "--column", "composition", "--output", str(output)]
        output.unlink(missing_ok=True)
        with tally.inputs(len(drawn)):
            if bad:
                status, out, error = run(command, capsys)
                assert (status, out, output.exists()) == (2, "", False)
                assert f"row {bad[0]}: " in error and repr(drawn[bad[0]].given)[:15] in error
            tally.refused(len(bad))
            assert run([*command, "--on-error", "skip"], capsys)[0] == 0
            found = pd.read_parquet(output)
            assert found["name"].tolist() == [f"n{i}" for i in good]
            assert found["composition"].tolist() == [drawn[i].given for i in good]
            graphs = np.array([graph_of(drawn[i]) for i in good], dtype=object)
            expected = encoder.predict_embedding(dc.data.NumpyDataset(graphs))
            columns = [f"embedding_{i}" for i in range(expected.shape[1])]
            np.testing.assert_allclose(found[columns], expected, atol=1e-5)
            assert (found["polymorphism"] > 0).all() and (found["note"] == 'é, "x"').all()
            tally.right(len(good))

    draw(check, deep, few=3, many=60)


LABELS = {"2.5": 2.5, "-1e3": -1000.0, "0": 0.0, "": None, "nan": None}
NO_LABELS = ["large", "1,5", "1_0", "inf", "-inf", "1e+30", "0x1", "2020-01-01", "é", "None?"]


def test_the_console_trains_on_every_label_or_names_it(deep, tally, tmp_path, capsys):
    @given(st.lists(st.sampled_from([*LABELS, *LABELS, *NO_LABELS]), min_size=1, max_size=5))
    def check(labels):
        path, model = str(tmp_path / "t.csv"), str(tmp_path / "model")
        with open(path, "w", newline="") as file:
            rows = zip(["NaCl", "NaN", "InF", "KCl", "LiF"], labels, strict=False)
            csv.writer(file).writerows([["formula", "gap"], *rows])
        command = ["train", "--input", path, "--target", "gap", "--output-dir", model]
        bad = [i for i, label in enumerate(labels) if label in NO_LABELS]
        with tally.inputs(len(labels)):
            status, _, error = run([*command, "--epochs", "1", "--pretrained", "none"], capsys)
            if bad:
                assert status == 2 and f"row {bad[0]}: gap is '{labels[bad[0]]}'" in error
                tally.refused(len(labels))
            elif all(LABELS[label] is None for label in labels):
                assert status == 2 and "'gap' has no number" in error
                tally.refused(len(labels))
            else:
                assert status == 0, error
                tally.right(len(labels))

    draw(check, deep, few=6, many=60)


def test_tables_with_fields_too_many_or_names_taken(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("formula,gap\nKCl,NaCl,2\nLiF,NaF,3\n")
    status, _, error = run(["embed", "--input", str(path)], capsys)
    assert status == 2 and "row 0 has 3 fields, but there are 2 names" in error
    for column in ("polymorphism", "embedding_7"):
        path.write_text(f"formula,{column}\nNaCl,2\n")
        status, out, error = run(["embed", "--input", str(path)], capsys)
        assert status == 2 and repr(column) in error and out == ""
    frame = pd.DataFrame({"formula": ["NaCl", "KCl"]}, index=[7, 7])  # an index that repeats itself
    frame.to_parquet(tmp_path / "t.parquet")
    status, out, _ = run(["embed", "--input", str(tmp_path / "t.parquet")], capsys)
    assert status == 0 and len(out.splitlines()) == 3
    path.write_bytes(b"formula\nNa\0Cl\n")  # pandas reads Na
    status, out, error = run(["embed", "--input", str(path)], capsys)
    assert status == 2 and "zero" in error and out == ""
    path.write_text("formula,gap\nNaCl,2\nNa2Cl2,3\n")
    command = ["train", "--input", str(path), "--target", "gap", "--hold-out", "0.5"]
    status, _, error = run([*command, "--output-dir", str(tmp_path / "m")], capsys)
    assert status == 2 and "hold-out" in error and not Path(tmp_path / "m").exists()


def test_rows_are_written_as_they_were_given(encoder, tmp_path):
    path, output = tmp_path / "t.csv", tmp_path / "out.csv"
    given = ["0012,NaCl,007,NA,0.30000000000000004", "1E5,KCl,,None,1e-3"]
    path.write_text("\n".join(["\ufeffid,formula,year,note, x ", *given]))
    assert main(["predict", "--input", str(path), "--model", "x"]) == 2
    assert main(["embed", "--input", str(path), "--output", str(output)]) == 0
    names, *rows = output.read_text().splitlines()
    assert names.startswith("id,formula,year,note, x ,polymorphism,")
    assert all(row.startswith(f"{start},") for row, start in zip(rows, given, strict=True))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "formula;gap\nNaCl;1,5\n", "separated by semicolons: save it with commas"),
        ("t.csv", "formula;gap;a, b\nNaCl;1;c\n", "separated by semicolons: save it with commas"),
        ("t.csv", "formula,gap\n\xb5,2\n", "t.csv is no table: 'utf-8' codec"),
        ("t.csv", "formula,gap\n\xb5,2\n", "invalid start byte; save it as UTF-8"),
        ("t.jsonl", '{"formula": "\xb5"}', "; save it as UTF-8"),
        (
            "t.json",
            '{"formula": "NaCl"}\n{"formula": "KCl"}',
            "each line holds a row, call it .jsonl",
        ),
        ("t.csv", "formula\tgap\nNaCl\t1.5\n", "separated by tabs: save it with commas"),
        ("t.csv", "formula|gap\nNaCl|1.5\n", "; its fields must be separated by commas"),
        ("t.csv", "# formula gap\nNaCl 1.5\n", "; its fields must be separated by commas"),
        ("t.tsv", "formula,gap\nNaCl,1.5\n", "; its fields must be separated by tabs"),
        ("t.csv", "Formula ,gap\nNaCl,1.5\n", "; is it 'Formula '?"),
        ("t.csv", "formula,gap,gap\nNaCl,1,2\n", "two columns are called 'gap'"),
        ("t.csv", "formula,gap\n\n", "has no row"),
        ("t.xlsx", "PK", "is a spreadsheet: save it as CSV"),
        ("t.xlsm", "PK", "is a spreadsheet: save it as CSV"),
        (
            "t.csv",
            "Sample,,gaps\n,formula,gap\n1,NaCl,8\n",
            "row 0 has it: the names must stand in",
        ),
        ("t.csv", "Table 1,\n\nformula,gap\nNaCl,8\n", "row 1 has it: the names must stand in"),
    ],
)
def test_tables_of_other_programs_are_refused_with_advice(name, content, message, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(content, encoding="latin-1")
    status, _, error = run(["embed", "--input", str(path)], capsys)
    assert status == 2 and message in error


def test_tables_are_read_from_standard_input_and_with_tabs(tmp_path, monkeypatch, capsys):
    text = b"formula\tnote\nNaCl\ta,b\n"
    (tmp_path / "t.tsv").write_bytes(text)
    assert run(["embed", "--input", str(tmp_path / "t.tsv")], capsys)[1].splitlines()[1][:9] == (
        'NaCl,"a,b'
    )
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=BytesIO(text.replace(b"\t", b";"))))
    assert "separated by semicolons" in run(["embed", "--input", "-"], capsys)[2]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=BytesIO(b"formula\nNaCl\n")))
    output = tmp_path / "out.json"
    assert run(["embed", "--input", "-", "--output", str(output)], capsys)[0] == 0
    assert pd.read_json(output)["formula"].tolist() == ["NaCl"]
    monkeypatch.setattr("polysrl_dc.tables._LARGEST", 10)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=BytesIO(b"formula\nNaCl\n")))
    assert "holds more than 10 bytes" in run(["embed", "--input", "-"], capsys)[2]


def test_formats_are_told_by_the_name_and_written_back(tmp_path, capsys):
    frame = pd.DataFrame({"formula": ["NaCl", "KCl"], "gap": [8.5, 8.25]}, index=["a", "b"])
    frame.to_csv(tmp_path / "t.CSV.xz", index=False)
    frame.to_json(tmp_path / "t.jsonl.bz2", orient="records", lines=True)
    frame.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.parquet.gz").write_bytes(gzip.compress((tmp_path / "t.parquet").read_bytes()))
    WRITERS["json.gz"](frame, str(tmp_path / "t.json"))
    for name in ("t.CSV.xz", "t.jsonl.bz2", "t.parquet.gz", "t.json"):
        output = str(tmp_path / "out.jsonl")
        command = ["embed", "--input", str(tmp_path / name), "--output", output]
        assert run(command, capsys)[0] == 0
        found = pd.read_json(output, lines=True)
        assert found["formula"].tolist() == ["NaCl", "KCl"]
        assert found["gap"].tolist() == [8.5, 8.25]
    twice = frame.set_axis(["formula", "formula"], axis=1)
    WRITERS["json.gz"](twice, str(tmp_path / "t.json"))
    error = run(["embed", "--input", str(tmp_path / "t.json")], capsys)[2]
    assert "two columns are called 'formula'" in error
    (tmp_path / "t.jsonl").write_text('{"formula": "NaCl"}\n{"formula"\n')
    assert "t.jsonl is no table" in run(["embed", "--input", str(tmp_path / "t.jsonl")], capsys)[2]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_columns_are_written_to_json_to_the_last_digit(ending, tmp_path, capsys):
    frame = pd.DataFrame({
        "formula": ["NaCl", "KCl"],
        "rate": [1.2345678901234567e-14, 123456789.12345678],
        "number": [2**60 + 1, 3],
        "known": [True, False],
        "day": [pd.Timestamp("2026-11-23 05:06:07.123456789"), pd.NaT],
        "missing": [np.nan, 0.1],
        "endless": [-np.inf, 0.5],
        "nested": [[0.1, np.nan], [3.0]],
        "note": ["ä\n", None],
    })  # fmt: skip
    frame.to_parquet(tmp_path / "t.parquet")
    output = tmp_path / f"out.{ending}"
    command = ["embed", "--input", str(tmp_path / "t.parquet"), "--output", str(output)]
    assert run(command, capsys)[0] == 0
    text = output.read_text()
    rows = json.loads(text) if ending == "json" else [json.loads(t) for t in text.splitlines()]
    names = [name for name in frame if name != "nested"]
    assert [rows[0][name] for name in names] == [
        *("NaCl", 1.2345678901234567e-14, 2**60 + 1, True, "2026-11-23T05:06:07.123456789"),
        *(None, "-inf", "ä\n"),
    ]
    assert [rows[1][name] for name in names] == [
        *("KCl", 123456789.12345678, 3, False, None, 0.1, 0.5, None)
    ]
    assert rows[0]["nested"] == [0.1, None] and isinstance(rows[0]["embedding_0"], float)
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('formula,note\nNaCl,"5 inch\nKCl,x\nMgO,7" tube\nCaO,z\n', "expected after '\"'"),
        ('formula,note\nNaCl,"x"y\n', "expected after '\"'"),
        ('formula,note\nNaCl,"5\nKCl,x\n', "unexpected end of data"),
        ("", "t.csv is no table: it is empty"),
        ("formula,x,gap\nNaCl,1,2\n\nKCl,8.5\n", "row 2 has 2 fields, but there are 3 names"),
    ],
)
def test_rows_of_csv_are_neither_joined_nor_filled(text, said, tmp_path, capsys):
    (tmp_path / "t.csv").write_text(text)
    status, out, error = run(["embed", "--input", str(tmp_path / "t.csv")], capsys)
    assert status == 2 and out == "" and said in error


def test_empty_fields_beside_numbers_are_missing_numbers(tmp_path, capsys):
    rows = ["NaCl,1e-14,2001,18446744073709551615,1,007,,1.0", "KCl,,,,x,,,", "LiF,2.5,0,,,1,,3.0"]
    text = "\n".join(["formula,rate,year,large,note,code,none,size", *rows, ""])
    (tmp_path / "t.csv").write_text(text)
    frame = read_table(str(tmp_path / "t.csv"), ["formula"])
    assert WRITTEN[".csv"](frame).decode() == text
    columns = {
        "formula": ["NaCl", "KCl", "LiF"],
        "rate": [1e-14, None, 2.5],
        "year": [2001, None, 0],
        "large": [2**64 - 1, None, None],
        "note": ["1", "x", ""],
        "code": ["007", "", "1"],
        "none": ["", "", ""],
        "size": [1.0, None, 3.0],
    }
    expected = pd.DataFrame(columns, dtype=object).to_dict("records")
    assert json.loads(WRITTEN[".json"](frame)) == expected
    table = pq.read_table(BytesIO(WRITTEN[".parquet"](frame)))
    assert table.to_pylist() == expected
    assert [str(field.type) for field in table.schema][1:4] == ["double", "int64", "uint64"]
    command = ["train", "--input", str(tmp_path / "t.csv"), "--target", "rate", "--folds", "2"]
    command += ["--group", "year", "--output-dir", str(tmp_path / "model")]
    (tmp_path / "t.csv").write_text(text.replace("KCl,,", "KCl,3,"))
    assert "row 1: year is <NA>, which means that it is missing" in run(command, capsys)[2]


def test_names_with_an_end_of_line_are_told_in_one(tmp_path, capsys):
    (tmp_path / "t.csv").write_text('formula,"band\ngap"\nNaCl,8.5\nKCl,x\n')
    command = ["train", "--input", str(tmp_path / "t.csv"), "--output-dir", str(tmp_path / "model")]
    message = run([*command, "--target", "band\ngap"], capsys)[2]
    assert message.endswith("error: row 1: band gap is 'x', not a number")
    message = run([*command, "--target", "Band gap"], capsys)[2]
    assert message.endswith(r"; is it 'band\ngap'?")


def test_quoted_fields_of_csv_are_kept(tmp_path):
    text = 'formula,note\r\nNaCl,"a ""b""\n, c"\r\nKCl, "d"\r\n\r\n"LiF",5" tube\r\n\r\n'
    (tmp_path / "t.csv").write_bytes(text.encode())
    frame = read_table(str(tmp_path / "t.csv"), ["formula"])
    assert frame["formula"].tolist() == ["NaCl", "KCl", "", "LiF"]
    assert frame["note"].tolist() == ['a "b"\n, c', ' "d"', "", '5" tube']


@pytest.mark.parametrize("output", ["out.csv", "out.csv.gz", None])
def test_ends_of_lines_within_fields_come_back_from_csv(output, tmp_path, capsys):
    notes = ["a\rb", "\r", "a\r\nb\n", "plain", ""]
    given = pd.DataFrame({"formula": ["NaCl"] * 5, "no\rte": notes, "x": [0.1, 1e-20, 3, 4, 5]})
    path = None if output is None else str(tmp_path / output)
    write_table(given, pd.DataFrame(index=range(5)), path)
    if path is None:
        path = str(tmp_path / "out.csv")
        Path(path).write_bytes(capsys.readouterr().out.encode())
    frame = read_table(path, ["formula"])
    pd.testing.assert_frame_equal(frame, given)
    content = Path(path).read_bytes()
    lines = (gzip.decompress(content) if path.endswith(".gz") else content).split(b"\n")
    assert lines[1] == b'NaCl,"a\rb",0.1' and lines[-3:] == [b"NaCl,plain,4.0", b"NaCl,,5.0", b""]


@pytest.mark.parametrize("ending", [".csv", ".json", ".parquet"])
def test_integers_of_parquet_stay_integers_beside_missing_ones(ending, tmp_path):
    table = pa.table({
        "formula": ["NaCl", "KCl"],
        "n": pa.array([2**53 + 1, None], pa.int64()),
        "small": pa.array([255, None], pa.uint8()),
        "several": pa.array([[2**53 + 1, None], None], pa.list_(pa.int64())),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet")
    content = WRITTEN[ending](read_table(str(tmp_path / "t.parquet"), ["formula"]))
    if ending == ".parquet":
        found = pq.read_table(BytesIO(content))
        assert found.to_pylist() == table.to_pylist()
    elif ending == ".json":
        assert json.loads(content) == table.to_pylist()
    else:
        lines = content.decode().splitlines()
        assert lines[1:] == ['NaCl,9007199254740993,255,"[9007199254740993, null]"', "KCl,,,"]


def test_compositions_come_back_from_parquet(tmp_path, capsys):
    monty = {"@module": "pymatgen.core.composition", "@class": "Composition", "@version": None}
    rows = [{"Ti": 1, "O": 2}, {"Zn": 0.5, "O": 0.5}, {**monty, "Na": 1.0, "Cl": 1.0}]
    (tmp_path / "t.json").write_text(json.dumps([{"formula": row} for row in rows]))
    output = str(tmp_path / "out.parquet")
    command = ["embed", "--input", str(tmp_path / "t.json"), "--output", output]
    assert run(command, capsys)[0] == 0
    del monty["@version"]
    expected = [*rows[:2], {**monty, "Na": 1.0, "Cl": 1.0}]
    assert read_table(output, ["formula"])["formula"].tolist() == expected
    pd.DataFrame({"c": [*rows[:2], None], "tag": rows}).to_parquet(tmp_path / "t.parquet")
    command = ["embed", "--input", str(tmp_path / "t.parquet"), "--column", "c"]
    assert "row 2: None of type NoneType" in run(command, capsys)[2]
    assert main([*command, "--on-error", "skip", "--output", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["c"] for row in found] == rows[:2]
    assert found[0]["tag"]["Zn"] is None  # as the file has it: only of formulas it is known


def test_decimals_of_parquet_are_numbers_and_its_bytes_are_text(tmp_path, capsys):
    table = pa.table({
        "formula": pa.array([b"NaCl", b"KCl"], pa.binary()),
        "name": pa.array(["Ä".encode(), None], pa.large_binary()),
        "code": pa.array([b"ab", b"cd"], pa.binary(2)),
        "gap": pa.array([Decimal("8.50"), None], pa.decimal128(10, 2)),
        "long": pa.array(map(Decimal, ["0.1234567890123456789", "0.1"]), pa.decimal128(30, 19)),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet")
    frame = read_table(str(tmp_path / "t.parquet"), ["formula"])
    assert json.loads(WRITTEN[".json"](frame)) == [
        {"formula": "NaCl", "name": "Ä", "code": "ab", "gap": 8.5, "long": "0.1234567890123456789"},
        {"formula": "KCl", "name": None, "code": "cd", "gap": None, "long": 0.1},
    ]
    assert WRITTEN[".csv"](frame).decode().splitlines()[1].startswith("NaCl,Ä,ab,8.50,0.123456789")
    table = table.set_column(1, "name", pa.array([b"Ann", b"\xff"]))
    pq.write_table(table, tmp_path / "t.parquet")
    message = run(["embed", "--input", str(tmp_path / "t.parquet")], capsys)[2]
    assert message.endswith("t.parquet is no table: 'name' holds bytes that are no text in UTF-8")


def test_lists_are_written_whole_to_csv(encoder, tmp_path):
    given = {"formula": ["NaCl"], "spectrum": [np.arange(2000) / 3], "tag": [{"a": [0.1]}]}
    pd.DataFrame(given).to_parquet(tmp_path / "t.parquet")
    output = tmp_path / "out.csv"
    assert main(["embed", "--input", str(tmp_path / "t.parquet"), "--output", str(output)]) == 0
    found = pd.read_csv(output).loc[0]
    assert json.loads(found["spectrum"]) == (np.arange(2000) / 3).tolist()
    assert json.loads(found["tag"]) == {"a": [0.1]}


@pytest.mark.parametrize("unit", ["s", "us", "ns"])
def test_times_within_lists_are_written_as_those_alone(unit, tmp_path):
    day, span = datetime(2026, 11, 23, 5, 6, 7), timedelta(days=1, seconds=5)
    table = pa.table({
        "formula": ["NaCl"],
        "days": pa.array([[day, None]], pa.list_(pa.timestamp(unit))),
        "spans": pa.array([[span, None]], pa.list_(pa.duration(unit))),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet")
    frame = read_table(str(tmp_path / "t.parquet"), ["formula"])
    found = [["2026-11-23T05:06:07", None], ["P1DT0H0M5S", None]]
    assert list(json.loads(WRITTEN[".json"](frame))[0].values()) == ["NaCl", *found]
    written = pd.read_csv(BytesIO(WRITTEN[".csv"](frame))).loc[0]
    assert [json.loads(written[name]) for name in ("days", "spans")] == found


def test_columns_without_a_name(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("formula,,\nNaCl,a,b\n")
    command = ["embed", "--input", str(tmp_path / "t.csv")]
    assert run(command, capsys)[1].splitlines()[1].startswith("NaCl,a,b,")
    status, _, error = run([*command, "--output", str(tmp_path / "out.json")], capsys)
    assert status == 2 and "two columns are called ''" in error
    assert not (tmp_path / "out.json").exists()
    train = ["train", *command[1:], "--output-dir", str(tmp_path / "model"), "--target"]
    grouped = [*train, "formula", "--folds", "2", "--group", ""]
    for asked in ([*command, "--column", ""], [*train, ""], grouped):
        status, out, error = run(asked, capsys)
        assert status == 2 and out == "" and "t.csv is no table: two columns are called ''" in error
    (tmp_path / "t.csv").write_text(",gap\nNaCl,a\n")
    assert run([*command, "--column", ""], capsys)[1].splitlines()[1].startswith("NaCl,a,")


def test_labels_are_read_to_the_last_digit():
    given = ["0.30000000000000004", 10**400, "1_0", "\uff11", np.float32(0.1), Decimal("0.1"), [1]]
    values, wrong = numbers(pd.Series(given, name="gap", dtype=object))
    assert values[[0, 4, 5]].tolist() == [0.30000000000000004, float(np.float32(0.1)), 0.1]
    assert sorted(wrong) == [1, 2, 3, 6] and "not a number" in wrong[1]


def test_labels_that_are_more_than_a_number_are_refused_with_advice():
    given = ["5,9", "<0.1", "1-2", "1.1 \xb1 0.2", "3 %", "1.2 eV", "-", "\u22121", "n.d.", "metal"]
    for asked in (False, True):
        values, wrong = numbers(pd.Series([*given, " 1 ", "1E0"], name="gap"), classes=asked)
        assert list(wrong) == list(range(10)) and values[10:].tolist() == [1, 1]
        advice = [text.partition("; ")[2] for text in wrong.values()]
        said = "" if asked else "write one number alone, as 1.5, or leave the field empty"
        assert advice == [*[said] * 9, ""]


JSON_ROWS = (
    '{"formula": "NaCl", "n": 9007199254740993, "known": true, "day": "2026-11-23"}',
    '{"formula": "KCl", "n": null, "known": null, "x": 2.5}',
)


@pytest.mark.parametrize("name", ["rows.json", "columns.json", "split.json", "rows.jsonl"])
def test_fields_of_json_stay_what_they_are_beside_missing_ones(name, tmp_path):
    rows = [json.loads(row) for row in JSON_ROWS]
    columns = ["formula", "n", "known", "day", "x"]
    data = [[row.get(column) for column in columns] for row in rows]
    texts = {
        "rows.json": f"[{','.join(JSON_ROWS)}]",
        "columns.json": pd.DataFrame(rows, dtype=object).to_json(),
        "split.json": json.dumps({"index": [0, 1], "columns": columns, "data": data}),
        "rows.jsonl": f"{JSON_ROWS[0]}\n\n{JSON_ROWS[1]}\n",
    }
    (tmp_path / name).write_text(texts[name])
    frame = read_table(str(tmp_path / name), ["formula"])
    assert list(frame) == columns
    lines = WRITTEN[".csv"](frame).decode().splitlines()
    assert lines[1:] == ["NaCl,9007199254740993,True,2026-11-23,", "KCl,,,,2.5"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.json", '[{"formula": "NaCl", "formula": "KCl"}]', "two fields are called 'formula'"),
        ("t.json", '[{"formula": "NaCl"}, 3]', "row 1 is 3, not an object"),
        ("t.json", "3", "neither rows nor columns"),
        ("t.json", '{"formula": "NaCl"}', "rows are objects in a list"),
        ("t.json", '{"formula": ["NaCl"], "gap": [1, 2]}', "same length"),
        ("t.json", "[" * 100_000, "is no table"),
        ("t.jsonl", '{"formula": "NaCl"}\n\n{"formula": "KCl"', "line 3: "),
    ],
)
def test_json_that_is_no_table_is_refused(name, text, said, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    status, out, error = run(["embed", "--input", str(tmp_path / name)], capsys)
    assert status == 2 and out == "" and said in error


@pytest.mark.parametrize("number", ['"x"', "12345678901234567890123"])
def test_what_a_format_cannot_hold_is_refused(number, tmp_path, capsys):
    table, output = tmp_path / "t.json", tmp_path / "out.parquet"
    table.write_text(f'[{{"formula": "NaCl", "n": 1}}, {{"formula": "KCl", "n": {number}}}]')
    command = ["embed", "--input", str(table), "--output"]
    status, _, error = run([*command, str(output)], capsys)
    assert status == 2 and "out.parquet cannot be written" in error and not output.exists()
    assert run([*command, str(tmp_path / "out.csv")], capsys)[0] == 0
    assert number.strip('"') in (tmp_path / "out.csv").read_text()
    table.write_text('[{"formula": "NaCl", "n": {}}]')
    status, _, error = run([*command, str(output)], capsys)
    assert status == 2 and "out.parquet cannot be written" in error and not output.exists()


def test_a_file_that_cannot_be_written_is_named_as_it_was_given(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", f"{path}.tmp")

    monkeypatch.setattr("polysrl_dc.tables.write_atomic", full)
    output, empty = str(tmp_path / "out.csv"), pd.DataFrame(index=[0])
    with pytest.raises(InvalidInputError, match=r"out\.csv cannot be written: No space") as error:
        write_table(pd.DataFrame({"formula": ["NaCl"]}), empty, output)
    assert ".tmp" not in str(error.value)


def test_an_index_that_names_the_rows_is_kept(tmp_path, capsys):
    frame = pd.DataFrame({"formula": ["NaCl", "KCl"]}, index=["mp-1", "mp-2"])
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_json(tmp_path / "t.json")
    WRITERS["json.gz"](frame, str(tmp_path / "split.json"))
    for name in ("t.parquet", "t.json", "split.json"):
        assert read_table(str(tmp_path / name), ["formula"])["index"].tolist() == ["mp-1", "mp-2"]
    columns = {"gap": {"11": 1, "2": 2}, "formula": {str(i): "NaCl" for i in range(12)}}
    (tmp_path / "t.json").write_text(json.dumps(columns))
    found = read_table(str(tmp_path / "t.json"), ["formula"])
    assert list(found) == ["gap", "formula"] and found["gap"].dropna().to_dict() == {2: 2, 11: 1}
    index = pd.Index([7], name="gap")
    pd.DataFrame({"formula": ["NaCl"], "gap": [1]}, index).to_parquet(tmp_path / "named.parquet")
    message = run(["embed", "--input", str(tmp_path / "named.parquet")], capsys)[2]
    assert "named.parquet is no table: cannot insert gap" in message
    frame.reset_index(drop=True).to_json(tmp_path / "t.json")
    assert list(read_table(str(tmp_path / "t.json"), ["formula"])) == ["formula"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_an_empty_line_is_a_row_without_a_formula(end, tmp_path, capsys, caplog):
    path = tmp_path / "t.csv"
    lines = ["", "formula", "NaCl", "", "KCl", "Qq", "", ""]
    path.write_bytes(end.join(lines).encode())
    command = ["embed", "--input", str(path)]
    assert "row 1" in run(command, capsys)[2]
    assert main([*command, "--on-error", "skip"]) == 0
    found = capsys.readouterr()
    assert [line.split(",")[0] for line in found.out.split()] == ["formula", "NaCl", "KCl"]
    skipped = "".join(caplog.messages)
    assert "row 1" in skipped and "row 3" in skipped and "row 4" not in skipped
    path.write_bytes(end.join(["formula,gap", "NaCl,8.5", "", "KCl,8.25", ""]).encode())
    assert "row 1" in run(command, capsys)[2]


def test_advice_on_commas_is_for_csv_only(tmp_path, capsys):
    (tmp_path / "t.tsv").write_text("name\tnote\nNaCl\ta\n")
    (tmp_path / "t.json").write_text('[{"a;b": 1}]')
    (tmp_path / "t.parquet").write_bytes(b"PAR1;")
    for name in ("t.tsv", "t.json", "t.parquet"):
        status, _, error = run(["embed", "--input", str(tmp_path / name)], capsys)
        assert status == 2 and name in error and "separated by" not in error


# ---------------------------------------------------------------------- folds


def test_folds_hold_every_row_once_with_its_label(deep, tally):
    """Also folds of one row, and formulas that are written in several ways."""

    @given(st.lists(written().filter(accepted), min_size=2, max_size=8), st.integers(0, 99))
    def check(drawn, seed):
        rows = drawn + drawn[: seed % len(drawn)]
        graphs = polysrl_dc.StoichiometryGraphFeaturizer().featurize([f.given for f in rows])
        groups = len({graph.formula for graph in graphs})
        assume(groups > 1)
        names = [f"mp-{row}" for row in range(len(rows))]
        dataset = dc.data.NumpyDataset(graphs, np.arange(len(rows)), ids=names)
        k = 2 + seed % (groups - 1)
        with tally.inputs(len(rows)):
            folds = dc.splits.StoichiometrySplitter().k_fold_split(dataset, k, seed=seed)
            tested = np.concatenate([test.y for _, test in folds])
            assert sorted(tested) == list(range(len(rows))) and len(folds) == k
            for train, test in folds:
                assert len(train) + len(test) == len(rows) and len(test) > 0
                assert not {g.formula for g in train.X} & {g.formula for g in test.X}
                for graph, label, name in zip(test.X, test.y, test.ids, strict=True):
                    assert graph is graphs[label] and name == f"mp-{label}"
            tally.right(len(rows))

    draw(check, deep, few=15, many=200)


# ------------------------------------------------------- datasets for the model


def _set(array, row, value):
    array = array.astype(object)
    array[row] = value
    return array


def _masked(y, row):
    mask = np.zeros(y.shape, bool)
    mask[row] = True
    return np.ma.masked_array(y, mask)


def _bad_graph(X, row, numbers, fractions):
    return _set(X, row, StoichiometryGraph(np.array(numbers, np.uint8), np.array(fractions)))


#: Change of X, y, w and ids in one row; all of them keep their meaning.
GOOD = {
    "as it is": lambda X, y, w, ids, row: (X, y, w, ids),
    "single precision": lambda X, y, w, ids, row: (X, y.astype(np.float32), w, ids),
    "text": lambda X, y, w, ids, row: (X, y.astype(str), w, ids),
    "objects": lambda X, y, w, ids, row: (X, y.astype(object), w.astype(object), ids),
    "Fortran order": lambda X, y, w, ids, row: (X, np.asfortranarray(y), w, ids),
    "big endian": lambda X, y, w, ids, row: (X, y.astype(">f8"), w.astype(">f4"), ids),
    "tiny weights": lambda X, y, w, ids, row: (X, y, w * 1e-200, ids),
    "huge weights": lambda X, y, w, ids, row: (X, y, w * 1e200, ids),
    "one column of weights": lambda X, y, w, ids, row: (X, y, w[:, :1], ids),
    "missing NaN": lambda X, y, w, ids, row: (X, _set(y, row, np.nan), _set(w, row, 0), ids),
    "missing masked": lambda X, y, w, ids, row: (X, _masked(y, row), _set(w, row, 0), ids),
    "repeated ids": lambda X, y, w, ids, row: (X, y, w, np.full(len(ids), "a", dtype=object)),
}
AT_ROW = r"^row {row} \(id mp-{row}\)"
#: The same, with the error that must follow.
BAD = {
    "NaN label": (lambda X, y, w, ids, row: (X, _set(y, row, np.nan), w, ids), AT_ROW),
    "infinite label": (lambda X, y, w, ids, row: (X, _set(y, row, -np.inf), w, ids), AT_ROW),
    "label too large": (lambda X, y, w, ids, row: (X, _set(y, row, 1e30), w, ids), AT_ROW),
    "None as label": (lambda X, y, w, ids, row: (X, _set(y, row, None), w, ids), AT_ROW),
    "text as label": (lambda X, y, w, ids, row: (X, _set(y, row, "high"), w, ids), AT_ROW),
    "too large": (lambda X, y, w, ids, row: (X, _set(y, row, 10**400), w, ids), AT_ROW),
    "masked label": (lambda X, y, w, ids, row: (X, _masked(y, row), w, ids), AT_ROW),
    "complex label": (lambda X, y, w, ids, row: (X, _set(y, row, 1j), w, ids), AT_ROW),
    "complex labels": (lambda X, y, w, ids, row: (X, y + 1j, w, ids), r"^row 0 \(id mp-0\)"),
    "dates": (lambda X, y, w, ids, row: (X, y.astype("M8[s]"), w, ids), r"^row 0 \(id mp-0\)"),
    "negative weight": (lambda X, y, w, ids, row: (X, y, _set(w, row, -1), ids), AT_ROW),
    "NaN weight": (lambda X, y, w, ids, row: (X, y, _set(w, row, np.nan), ids), AT_ROW),
    "infinite weight": (lambda X, y, w, ids, row: (X, y, _set(w, row, np.inf), ids), AT_ROW),
    "text as weight": (lambda X, y, w, ids, row: (X, y, _set(w, row, "much"), ids), AT_ROW),
    "no weight at all": (lambda X, y, w, ids, row: (X, y, 0 * w, ids), "weights are zero"),
    "label too few": (lambda X, y, w, ids, row: (X, np.delete(y, row, 0), w, ids), "lengths|row"),
    "label too many": (lambda X, y, w, ids, row: (X, np.repeat(y, 2, 0), w, ids), "lengths"),
    "row too few": (lambda X, y, w, ids, row: (np.delete(X, row), y, w, ids), "lengths"),
    "weight too few": (lambda X, y, w, ids, row: (X, y, np.delete(w, row, 0), ids), "lengths"),
    "weight too many": (lambda X, y, w, ids, row: (X, y, np.repeat(w, 2, 0), ids), "lengths"),
    "id too few": (lambda X, y, w, ids, row: (X, y, w, np.delete(ids, row)), "lengths"),
    "column too many": (lambda X, y, w, ids, row: (X, np.c_[y, y], w, ids), "columns"),
    "weights too wide": (lambda X, y, w, ids, row: (X, y, np.c_[w, w, w, w], ids), "columns"),
    "text as graph": (lambda X, y, w, ids, row: (_set(X, row, "NaCl"), y, w, ids), AT_ROW),
    "None as graph": (lambda X, y, w, ids, row: (_set(X, row, None), y, w, ids), AT_ROW),
    "failed graph": (lambda X, y, w, ids, row: (_set(X, row, np.array([])), y, w, ids), AT_ROW),
    "NaN fraction": (
        lambda X, y, w, ids, row: (_bad_graph(X, row, [8, 26], [0.5, np.nan]), y, w, ids), AT_ROW
    ),
    "percent": (
        lambda X, y, w, ids, row: (_bad_graph(X, row, [8, 26], [60.0, 40.0]), y, w, ids), AT_ROW
    ),
    "no embedding": (
        lambda X, y, w, ids, row: (_bad_graph(X, row, [104], [1.0]), y, w, ids), AT_ROW
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*encountered in cast")
def test_the_model_fits_what_is_right_and_refuses_the_rest(deep, tally):
    @given(
        st.lists(written().filter(accepted), min_size=1, max_size=6),
        st.integers(1, 2),
        st.sampled_from([*GOOD, *BAD]),
        st.integers(0, 2**32 - 1),
    )
    def check(drawn, n_tasks, kind, seed):
        rng, n = np.random.default_rng(seed), len(drawn)
        X = np.empty(n, dtype=object)
        X[:] = [graph_of(formula) for formula in drawn]
        y, w = rng.integers(-99, 99, (n, n_tasks)) / 4, rng.integers(1, 9, (n, n_tasks)) / 8
        ids, row = np.array([f"mp-{i}" for i in range(n)], dtype=object), int(rng.integers(n))
        change, words = (GOOD[kind], None) if kind in GOOD else BAD[kind]
        given_y, given_w = change(X, y, w, ids, row)[1:3]
        dataset = dc.data.NumpyDataset(*change(X, y, w, ids, row))
        model = make(n_tasks=n_tasks)
        if kind in GOOD and not given_w.astype(float).any():
            words = "weights are zero"
        with tally.inputs(n):
            if words is not None:
                with pytest.raises(InvalidInputError, match=words.format(row=row)):
                    model.fit(dataset, nb_epoch=1, checkpoint_interval=0)
                tally.refused(n)
                return
            data = LabeledData.from_dataset(dataset, n_tasks, False)
            known = np.broadcast_to(given_w.astype(float) > 0, y.shape)
            np.testing.assert_array_equal(data.labels, np.where(known, y, 0))
            columns = given_w.shape[1]
            expected = np.where(known, np.broadcast_to(w[:, :columns], y.shape), 0)
            mean = expected[expected > 0].mean()
            np.testing.assert_allclose(data.weights, expected / mean, rtol=1e-6)
            for i, formula in enumerate(drawn):
                assert np.flatnonzero(data.inputs.fractions[i]).tolist() == formula.numbers
            assert given_y.shape == y.shape
            model.fit(dataset, nb_epoch=1, checkpoint_interval=0)
            mean, std = model.predict_uncertainty(dataset)
            assert mean.shape == std.shape == (n, n_tasks)
            assert np.isfinite(mean).all() and (std > 0).all() and np.isfinite(std).all()
            tally.right(n)

    draw(check, deep, few=60, many=600)

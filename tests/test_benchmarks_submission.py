"""The record writer and its checker: what Matbench refuses, the checker names."""

import copy
import gzip
import json
from importlib.metadata import version

import check_submission
import numpy as np
import pytest
import submission
import tasks
from check_submission import check_record, check_records
from matbench.bench import MatbenchBenchmark
from matbench.util import hash_dictionary


def small_task(n_samples=25, name="wetlab_gap"):
    """A task of the project's own kind, with data."""
    import pandas as pd

    values = np.linspace(0.1, 5.0, n_samples)
    metadata = tasks.fold_rule_metadata("gap", "eV", values)
    table = pd.DataFrame({"composition": ["NaCl"] * n_samples, "gap": values})
    return tasks.FoldRuleTask(name, tasks.WETLAB_KEY, metadata, table)


def fill(task, std=None):
    for fold in task.folds:
        n_test = len(task.validation[task.folds_map[fold]].test)
        spread = None if std is None else np.full(n_test, std, dtype=np.float32)
        submission.record_fold(task, fold, np.ones(n_test, dtype=np.float32), spread, {"lr": 0.1})
    return task


@pytest.fixture
def record(tmp_path):
    """A valid record with uncertainties, and the folder it lies in."""
    folder = tmp_path / "wetlab_v0.1_PolySRL"
    submission.write_record(folder, [fill(small_task(), std=0.5)], {}, "finetune")
    return folder


def content_of(folder):
    return json.loads(gzip.decompress((folder / "results.json.gz").read_bytes()))


def rewrite(folder, content, rehash=True):
    """Write a changed record back, with a fitting hash unless told otherwise."""
    if rehash:
        content.pop("hash")
        content["hash"] = hash_dictionary(content)
    (folder / "results.json.gz").write_bytes(gzip.compress(json.dumps(content).encode()))


def test_a_written_record_is_accepted(record):
    assert check_record(record) == []
    assert check_submission.main([str(record)]) == 0
    raw = (record / "results.json.gz").read_bytes()
    assert raw[:2] == b"\x1f\x8b" and raw[4:8] == bytes(4)
    info = json.loads((record / "info.json").read_text())
    keys = {"authors", "algorithm", "algorithm_long", "bibtex_refs", "notes", "requirements"}
    assert set(info) == keys
    assert f"matbench=={version('matbench')}" in info["requirements"]["python"]


def test_uncertainties_survive_reading_and_merging(record):
    def uncertainty():
        return content_of(record)["tasks"]["wetlab_gap"]["results"]["fold_0"]["uncertainty"]

    first = uncertainty()
    entry = next(iter(first.values()))
    assert entry["std"] == 0.5 and entry["ci_lower"] == pytest.approx(1 - 1.959964 * 0.5)
    other = fill(small_task(name="wetlab_other"))
    submission.write_record(record, [other], {}, "finetune")
    assert check_record(record) == []
    assert uncertainty() == first
    assert sorted(content_of(record)["tasks"]) == ["wetlab_gap", "wetlab_other"]


def test_matbench_itself_reads_uncertainties(data_dir, tmp_path):
    task = fill(tasks.load_task("steels", data_dir), std=10.0)
    task.validate()
    folder = tmp_path / "matbench_v0.1_PolySRL"
    submission.write_record(folder, [task], {}, "finetune")
    assert check_record(folder) == []
    read = MatbenchBenchmark.from_dict(content_of(folder))
    assert read.is_valid and read.is_recorded and not read.is_complete
    entries = content_of(folder)["tasks"]["matbench_steels"]["results"]["fold_3"]["uncertainty"]
    assert len(entries) == len(task.validation.fold_3.test)


def test_incomplete_tasks_stay_out(tmp_path):
    task = small_task()
    submission.record_fold(task, 0, np.ones(5))
    assert submission.write_record(tmp_path / "r", [task], {}, "finetune") is None
    assert not (tmp_path / "r").exists()
    whole = fill(small_task(name="wetlab_whole"))
    submission.write_record(tmp_path / "r", [task, whole], {}, "finetune")
    assert list(content_of(tmp_path / "r")["tasks"]) == ["wetlab_whole"]


@pytest.mark.parametrize(
    ("predictions", "std", "message"),
    [
        ([1.0, 2.0, float("nan"), 4.0, 5.0], None, "position 2 is not finite"),
        ([1.0, 2.0, float("inf"), 4.0, 5.0], None, "not finite"),
        ([1.0] * 4, None, "4 values for 5 samples"),
        ([1.0] * 5, [1.0, 1.0, 0.0, 1.0, 1.0], "not positive"),
        ([1.0] * 5, [1.0, 1.0, float("nan"), 1.0, 1.0], "not finite"),
    ],
)
def test_bad_predictions_leave_the_fold_unrecorded(predictions, std, message):
    task = small_task()
    with pytest.raises(ValueError, match=message):
        submission.record_fold(task, 0, predictions, std)
    assert not task.is_recorded[0]


def test_recorded_values_are_native_floats():
    task = fill(small_task(), std=0.5)
    ids, values, std, params = submission.recorded_fold(task, 0)
    assert std is not None and ids == list(task.validation.fold_0.test)
    assert {type(value) for value in [*values, *std, params["lr"]]} == {float}


def test_recorded_values_come_back_to_the_last_digit_and_in_their_order(record):
    task = small_task()
    predictions, std = np.linspace(0.1, 5, 5) / 3, np.array([0.3, 0.7, 0.1, 2.0, 0.2]) / 3
    for fold in range(5):
        submission.record_fold(task, fold, predictions, std, {"lr": 0.1})
    submission.write_record(record, [task], {"wetlab_gap": {"seed": 7}}, "finetune")
    read = submission.read_benchmark(record)  # in which it has taken the place of the earlier one
    assert read.user_metadata["tasks"]["wetlab_gap"]["seed"] == 7
    ids, *found, params = submission.recorded_fold(read.tasks_map["wetlab_gap"], 0)
    assert ids == list(task.validation.fold_0.test)
    assert found == [predictions.tolist(), std.tolist()] and params == {"lr": 0.1}


def test_probabilities_are_checked(monkeypatch):
    task = tasks.MatbenchTask("matbench_glass", autoload=False)
    n_test = len(task.validation.fold_0.test)
    for value in (1.5, -0.5):
        with pytest.raises(ValueError, match=f"{value} is not a probability"):
            submission.record_fold(task, 0, np.full(n_test, value))
    with pytest.raises(ValueError, match="regression only"):
        submission.record_fold(task, 0, np.full(n_test, 0.5), np.ones(n_test))
    assert not task.is_recorded[0]
    recorded = []
    monkeypatch.setattr(task, "record", lambda fold, values, **_: recorded.extend(values))
    submission.record_fold(task, 0, np.arange(n_test) % 2)  # 0 and 1 are probabilities
    assert recorded[:3] == [0.0, 1.0, 0.0]


def _drop_fold(content):
    del content["tasks"]["wetlab_gap"]["results"]["fold_2"]


def _drop_sample(content):
    result = content["tasks"]["wetlab_gap"]["results"]["fold_1"]
    sample = next(iter(result["data"]))
    del result["data"][sample], result["uncertainty"][sample]


def _foreign_sample(content):
    content["tasks"]["wetlab_gap"]["results"]["fold_1"]["data"]["wl-gap-99999"] = 1.0
    content["tasks"]["wetlab_gap"]["results"]["fold_1"]["uncertainty"] = None


def _integer(content):
    data = content["tasks"]["wetlab_gap"]["results"]["fold_0"]["data"]
    data[next(iter(data))] = 1


def _text_number(content):
    data = content["tasks"]["wetlab_gap"]["results"]["fold_0"]["data"]
    data[next(iter(data))] = "np.float32(1.0)"


def _not_a_number(content):
    content["tasks"]["wetlab_gap"]["results"]["fold_0"]["scores"]["mae"] = float("nan")


def _drop_scores(content):
    del content["tasks"]["wetlab_gap"]["results"]["fold_4"]["scores"]


def _extra_fold(content):
    results = content["tasks"]["wetlab_gap"]["results"]
    results["fold_5"] = copy.deepcopy(results["fold_4"])


def _validation_marks(content):
    content["tasks"]["wetlab_gap"]["results"]["fold_0"]["uncertainty"]["std"] = {}


def _other_benchmark(content):
    content["benchmark_name"] = "matbench_v0.2"


def _undescribed(content):
    content["user_metadata"] = {}


def _no_tasks(content):
    content["tasks"] = {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_fold, "fold_2 is not recorded"),
        (_drop_sample, "required indices"),
        (_foreign_sample, "extra indices"),
        (_integer, "is 1, not a finite float"),
        (_text_number, "not a finite float"),
        (_not_a_number, "the score of mae is nan"),
        (_drop_scores, "'scores' is missing"),
        (_extra_fold, "fold_5 is no fold"),
        (_validation_marks, "uncertainties are not of the samples"),
        (_other_benchmark, "matbench_v0.2"),
        (_undescribed, "does not describe"),
        (_no_tasks, "holds no task"),
    ],
)
def test_checker_names_each_defect(record, change, message, capsys):
    content = content_of(record)
    change(content)
    rewrite(record, content)
    problems = check_record(record)
    assert len(problems) == 1 and message in problems[0] and "\n" not in problems[0]
    assert check_submission.main([str(record)]) == 1
    assert message in capsys.readouterr().out


def test_changed_content_does_not_fit_the_hash(record):
    content = content_of(record)
    data = content["tasks"]["wetlab_gap"]["results"]["fold_0"]["data"]
    data[next(iter(data))] = 0.123
    rewrite(record, content, rehash=False)
    assert any("hash" in problem for problem in check_record(record))


def test_plain_text_and_broken_gzip(record):
    path = record / "results.json.gz"
    whole = path.read_bytes()
    path.write_bytes(gzip.decompress(whole))
    assert "not gzip" in check_record(record)[0]
    path.write_bytes(whole[:200])
    assert "cannot be read" in check_record(record)[0]
    path.unlink()
    assert "cannot be read" in check_record(record)[0]


def test_matbenchs_own_writer_is_refused(data_dir, tmp_path, record):
    """``MatbenchBenchmark.to_file`` writes plain text, which the maintainers' test refuses."""
    benchmark = MatbenchBenchmark(subset=["matbench_steels"])
    benchmark.tasks_map["matbench_steels"] = fill(tasks.load_task("steels", data_dir))
    benchmark.to_file(str(record / "results.json.gz"))
    assert "not gzip" in check_record(record)[0]


@pytest.mark.parametrize("key", check_submission.FILLED_KEYS)
def test_info_keys_must_be_filled(record, key):
    info = json.loads((record / "info.json").read_text())
    (record / "info.json").write_text(json.dumps({**info, key: ""}))
    assert check_record(record) == [f"info.json: {key!r} is missing or empty"]


def test_notes_may_be_empty_but_not_missing(record):
    info = json.loads((record / "info.json").read_text())
    assert info.pop("notes") == ""
    (record / "info.json").write_text(json.dumps(info))
    assert check_record(record) == ["info.json: 'notes' is missing"]


def test_a_script_and_unique_names_are_required(record, tmp_path):
    import shutil

    twin = tmp_path / "wetlab_v0.1_PolySRL_twin"
    shutil.copytree(record, twin)
    assert "same algorithm name" in check_records([record, twin])[0]
    for suite in ("wetlab_v0.1", "paper_v0.1"):
        shutil.copytree(record, tmp_path / suite / "seed0")
    both = [tmp_path / suite / "seed0" for suite in ("wetlab_v0.1", "paper_v0.1")]
    assert check_records(both) == []  # of two benchmarks
    next(twin.glob("*.py")).unlink()
    assert "neither a notebook" in check_record(twin)[0]
    assert check_record(tmp_path / "absent") == ["no such folder"]


def test_embedded_records_must_hold_the_packaged_rows(tmp_path):
    table = tasks.load_task("embedded_seebeck").df.iloc[:25]
    values = table["S_p"]
    metadata = tasks.fold_rule_metadata("S_p", "uV/K", values)
    task = tasks.FoldRuleTask("embedded_seebeck", tasks.EMBEDDED_KEY, metadata, table)
    submission.write_record(tmp_path / "r", [fill(task)], {}, "finetune")
    assert check_record(tmp_path / "r") == ["embedded_seebeck: n_samples is 25 instead of 5000"]
    whole = fill(tasks.load_task("embedded_seebeck"), std=1.0)
    submission.write_record(tmp_path / "r", [whole], {}, "finetune")
    assert check_record(tmp_path / "r") == []

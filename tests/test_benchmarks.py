"""Tasks, folds and the runner of the benchmarks; a simple learner stands in for the model."""

import io
import json
import runpy
import shutil
import subprocess
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import run_matbench
import submission
import tasks
import torch
from check_submission import check_record
from folds import FoldStore, locked, settings_hash, split_validation
from graph_data import graph_dataset
from labels import has_learned
from matbench.metadata import mbv01_metadata
from protocols import Settings, train_and_predict
from scores import keep_scores, merge_scores, published, score_rows, summary

from polysrl_dc import PolySRLConfig, PolySRLModel
from polysrl_dc.checkpoints import DEFAULT_ENCODER, save_checkpoint

OFFICIAL_NAMES = sorted(mbv01_metadata)


def dummy_learner(task_type, formulas, targets, test_formulas, protocol, settings, unfinished):
    """Predict the training median, or the rate of class 1, with NumPy scalars as a model would."""
    assert len(formulas) == len(targets) and protocol in ("frozen", "finetune")
    if task_type == "classification":
        values = np.full(len(test_formulas), targets.mean(), dtype=np.float32)
        return values, None, {"rate": float(targets.mean())}
    values = np.full(len(test_formulas), np.median(targets), dtype=np.float32)
    params = {"learning_rate": np.float32(1e-3), "validation_losses": {"0.001": np.float64(0.5)}}
    return values, np.full_like(values, max(targets.std(), 1.0)), params


class Interrupting:
    """A learner that dies at its third fold and counts what it was asked for."""

    def __init__(self, deadline=3):
        self.calls, self.deadline = 0, deadline

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls == self.deadline:
            raise KeyboardInterrupt
        return dummy_learner(*arguments)


def run(output_dir, *arguments, data_dir=None, learner=dummy_learner):
    command = ["--output-dir", str(output_dir), *arguments]
    return run_matbench.main(command + (["--data-dir", str(data_dir)] if data_dir else []), learner)


@pytest.fixture
def toy_embedded(monkeypatch):
    """The embedded suite cut down to sixty rows."""
    table = tasks.embedded_table()[0].iloc[:60]
    counts = {"rows": 47737, "unusable": 0, "formulas": 34631, "kept": 60}
    monkeypatch.setattr(tasks, "embedded_table", lambda: (table, counts))


def test_training_starts_from_the_shipped_encoder_unless_told_otherwise():
    start = run_matbench.settings_of(run_matbench.parse_arguments([]), 636).pretrained
    assert start == (DEFAULT_ENCODER,)
    arguments = run_matbench.parse_arguments(["--pretrained", "none"])
    settings = run_matbench.settings_of(arguments, 636)
    assert settings.pretrained == ()
    again = run_matbench.repeat_arguments(arguments, settings, "matbench_jdft2d")
    for n_rows in (636, 106113):
        assert run_matbench.settings_of(run_matbench.parse_arguments(again), n_rows) == settings


def test_members_may_start_from_several_encoders(capsys):
    names = ["polysrl-mp", "graphcl-mp"]
    arguments = run_matbench.parse_arguments(["--pretrained", *names])
    settings = run_matbench.settings_of(arguments, 636)
    assert settings.pretrained == tuple(names) and settings.ensemble == 2
    again = run_matbench.repeat_arguments(arguments, settings, "matbench_jdft2d")
    assert run_matbench.settings_of(run_matbench.parse_arguments(again), 636) == settings
    alone = replace(settings, pretrained=("polysrl-mp",)).fingerprint()
    assert alone["pretrained"] == "polysrl-mp" and len(alone["pretrained_sha256"]) == 64
    assert settings.fingerprint()["pretrained_sha256"].startswith(alone["pretrained_sha256"] + " ")
    for wrong, message in (
        (["--pretrained", *names, "--ensemble", "3"], "--ensemble 3: no multiple of 2 encoders"),
        (["--pretrained", "none", *names], "--pretrained names encoders, or none alone"),
    ):
        with pytest.raises(SystemExit):
            run_matbench.parse_arguments(wrong)
        assert message in capsys.readouterr().err


def test_several_encoders_give_a_mean_of_a_member_on_each():
    formulas = [f"Na{i}Cl{j}" for i in range(1, 6) for j in range(1, 6)]
    targets = np.linspace(1, 2, 25)
    names = ("polysrl-mp", "graphcl-mp")
    settings = Settings((1,), (1e-3,), 2, batch_size=8, pretrained=names, threads=1)
    found = train_and_predict("regression", formulas, targets, formulas[:3], "finetune", settings)
    model = PolySRLModel(pretrained=names, batch_size=8)
    model.fit(graph_dataset(formulas, targets.reshape(-1, 1)), nb_epoch=1)
    expected = model.predict(graph_dataset(formulas[:3]))
    np.testing.assert_array_equal(found[0], expected[:, 0].astype(float))


def test_large_tasks_are_trained_in_larger_batches_unless_told_otherwise(capsys):
    def settings(n_rows, *given):
        return run_matbench.settings_of(run_matbench.parse_arguments([*given]), n_rows)

    small, large = settings(18928), settings(106113)
    assert small.batch_size < large.batch_size and small.weight_decay > large.weight_decay == 0
    assert settings(106113, "--epochs", "7", "9").epochs == (7, 9)
    assert settings(106113, "--batch-size", "64", "--weight-decay", "0.1").batch_size == 64
    assert settings(106113, "--protocol", "frozen") == settings(636, "--protocol", "frozen")
    assert settings(106113, "--suite", "embedded") == settings(636, "--suite", "embedded")
    with pytest.raises(SystemExit):
        run_matbench.parse_arguments(["--help"])
    assert "50,000 rows and more: --epochs 100 " in capsys.readouterr().out


@pytest.mark.parametrize(
    "encoder, message",
    [
        ("formation-energy-mp", "on labels of test rows of matbench_mp_e_form"),
        ("nowhere", "no checkpoint at nowhere"),
    ],
)
def test_an_encoder_that_gives_no_fair_score_is_refused(encoder, message, tmp_path, capsys):
    names = ["--tasks", "jdft2d", "mp_e_form"]
    assert run(tmp_path / "new", *names, "--pretrained", encoder) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_an_encoder_that_was_spared_the_test_rows_of_fold_0_is_fair_there(tmp_path):
    data = {"labels": "matbench_mp_gap", "excluded": "test-folds"}
    path = tmp_path / "encoder.safetensors"
    save_checkpoint(path, {"w": torch.zeros(1)}, {"provenance": {"data": data}})
    assert not has_learned(path, "matbench_mp_gap", [0])
    assert has_learned(path, "matbench_mp_gap", [0, 1])
    assert not has_learned(path, "matbench_mp_e_form", [0, 1])


@pytest.mark.parametrize("name", OFFICIAL_NAMES)
def test_official_names_with_and_without_prefix(name):
    assert tasks.full_name(name) == tasks.full_name(name.removeprefix("matbench_")) == name


def test_defaults_and_unknown_names(capsys):
    assert len(OFFICIAL_NAMES) == 13 and set(tasks.PAPER_TASKS) < set(OFFICIAL_NAMES)
    assert run_matbench.parse_arguments([]).tasks == list(tasks.PAPER_TASKS)
    with pytest.raises(SystemExit):
        run_matbench.parse_arguments(["--tasks", "jdft3d"])
    assert "no task is named 'jdft3d'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_matbench.parse_arguments(["--tasks", "embedded_seebeck"])
    assert run_matbench.parse_arguments(["--weight-decay", "0"]).weight_decay == 0
    for decay in ("-1", "nan", "inf"):
        with pytest.raises(SystemExit):
            run_matbench.parse_arguments([f"--weight-decay={decay}"])
        assert f"{decay} is not positive or zero" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_matbench.parse_arguments(["--learning-rates", "-1"])


@pytest.mark.parametrize("name", OFFICIAL_NAMES)
def test_real_tasks_have_official_ids_and_data(data_dir, name):
    task = tasks.load_task(name, data_dir)
    formulas, targets, test_formulas = tasks.task_inputs(task, 0)
    assert len(formulas) == len(targets) and all(isinstance(f, str) for f in test_formulas)
    assert len(formulas) + len(test_formulas) == task.metadata.n_samples
    assert np.isfinite(targets).all()
    if task.metadata.task_type == "classification":
        assert set(targets) == {0.0, 1.0}
    else:
        values = task.df[task.metadata.target]
        assert np.abs(values - values.mean()).mean() == pytest.approx(task.metadata.mad, rel=1e-2)


def test_wrong_ids_are_refused(data_dir, tmp_path):
    (tmp_path / "matbench").mkdir()
    table = pd.read_csv(data_dir / "matbench" / "matbench_steels.csv.gz")
    table.iloc[1:].to_csv(tmp_path / "matbench" / "matbench_steels.csv.gz", index=False)
    with pytest.raises(ValueError, match="not those of Matbench's own folds"):
        tasks.load_task("steels", tmp_path)


def test_missing_data_is_one_clear_line(monkeypatch, tmp_path, capsys):
    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tasks, "load_official", offline)
    monkeypatch.delenv("POLYSRL_DATA", raising=False)
    assert run(tmp_path, "--tasks", "steels") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "matbench_steels" in error and "load_dataset" in error
    assert run(tmp_path, "--tasks", "steels", data_dir=tmp_path / "absent") == 2
    assert "does not exist" in capsys.readouterr().err


def test_structures_of_the_official_download_become_compositions(monkeypatch):
    from pymatgen.core import Lattice, Structure

    cell = Structure(Lattice.cubic(4.0), ["Cs", "Cl"], np.array([[0.0] * 3, [0.5] * 3]))
    ids = tasks.fold_rule_ids("wetlab_x", 3)
    official = pd.DataFrame({"structure": [cell] * 3, "exfoliation_en": [1.0] * 3}, index=ids)
    monkeypatch.setattr(tasks, "load_official", lambda name: official)
    monkeypatch.delenv("POLYSRL_DATA", raising=False)
    assert tasks._official_table("matbench_jdft2d", None) is official
    with pytest.raises(ValueError, match="own folds"):
        tasks.load_task("jdft2d")
    assert list(official["structure"]) == ["Cs1 Cl1"] * 3


def test_embedded_tasks_follow_the_fold_rule():
    from sklearn.model_selection import KFold

    seebeck, conductivity = (tasks.load_task(name) for name in tasks.EMBEDDED_TARGETS)
    counts = tasks.embedded_table()[1]
    assert counts["rows"] == 47737 and counts["kept"] == len(seebeck.df) == 5000
    assert seebeck.df.index[0] == "em-seebeck-00001"
    assert seebeck.df["composition"].is_unique
    assert np.isfinite(conductivity.df["log10(sigma_p)"]).all()
    assert -6 < conductivity.df["log10(sigma_p)"].min() and conductivity.df.iloc[:, 1].max() < 7
    splits = KFold(5, shuffle=True, random_state=18012019).split(np.zeros(5000))
    for (_, test), fold in zip(splits, seebeck.folds_keys, strict=True):
        assert list(seebeck.validation[fold].test) == list(seebeck.df.index[test])


def test_matbench_folds_are_the_fold_rule(data_dir):
    task = tasks.load_task("jdft2d", data_dir)
    rule = tasks.FoldRuleTask("wetlab_x", tasks.WETLAB_KEY, dict(task.metadata))
    position = {mbid: row for row, mbid in enumerate(task.df.index)}
    for fold in task.folds_keys:
        rows = [int(mbid.rpartition("-")[2]) - 1 for mbid in rule.validation[fold].test]
        assert [position[mbid] for mbid in task.validation[fold].test] == rows


def test_validation_part_is_one_of_the_training_rows():
    formulas = [f"Na{k}Cl{k}" for k in (1, 2, 3)] + ["KCl", "LiF", "MgO", "CaO", "Fe2O3", "Fe4O6"]
    for seed in range(20):
        train, valid = split_validation(formulas, 0.3, seed)
        assert sorted([*train, *valid]) == list(range(len(formulas)))
        assert len(valid) and len(train)
    again = split_validation(formulas, 0.3, 19)
    assert np.array_equal(again[1], valid)
    train, valid = split_validation(["NaCl"] * 10, 0.2, 0)
    assert (len(train), len(valid)) == (8, 2)
    with pytest.raises(ValueError, match="at least 2"):
        split_validation(["NaCl"], 0.2)


def test_fold_store_never_mixes_settings(tmp_path):
    store = FoldStore(tmp_path, "t", {"epochs": 1})
    store.save(0, ["a", "b"], [1.0, 2.0], None, {})
    kept = store.load(0, ["a", "b"])
    assert kept is not None and kept["predictions"] == [1.0, 2.0]
    assert store.load(0, ["a", "c"]) is None and store.load(1, ["a", "b"]) is None
    other = FoldStore(tmp_path, "t", {"epochs": 2})
    assert other.load(0, ["a", "b"]) is None and other.key != store.key
    other.folder.mkdir()
    shutil.copy(store.path(0), other.path(0))
    assert other.load(0, ["a", "b"]) is None
    whole = store.path(0).read_text()
    store.path(0).write_text(whole.replace("2.0", "3.0"))
    assert store.load(0, ["a", "b"]) is None
    store.path(0).write_text(whole[:40])
    assert store.load(0, ["a", "b"]) is None
    with pytest.raises(ValueError):
        store.save(1, ["a"], [float("nan")], None, {})
    assert sorted(path.name for path in store.folder.iterdir()) == ["fold_0.json"]


def test_fingerprint_leaves_out_the_machine_only(monkeypatch):
    base = Settings(epochs=(3,), learning_rates=(1e-3,))
    same = replace(base, device="cpu", threads=2)
    assert settings_hash(base.fingerprint()) == settings_hash(same.fingerprint())
    for change in ({"epochs": (4,)}, {"seed": 1}, {"ensemble": 2}, {"learning_rates": (1e-4,)}):
        other = replace(base, **change)
        assert settings_hash(other.fingerprint()) != settings_hash(base.fingerprint())
    key = base.fingerprint()
    changed = replace(PolySRLConfig.named("default"), message_power=0.0)
    monkeypatch.setattr(PolySRLConfig, "named", lambda name: changed)
    assert base.fingerprint() != key  # of random weights


def test_run_writes_an_accepted_record(data_dir, tmp_path, capsys):
    assert run(tmp_path, "--tasks", "steels", "jdft2d", data_dir=data_dir) == 0
    printed = capsys.readouterr().out
    assert "matbench_jdft2d" in printed and "45.61" in printed and "CrabNet" in printed
    folder = tmp_path / "matbench_v0.1_PolySRL"
    assert check_record(folder) == []
    benchmark = submission.read_benchmark(folder)
    assert sorted(benchmark.tasks_map) == ["matbench_jdft2d", "matbench_steels"]
    truth = tasks.load_task("jdft2d", data_dir)
    targets = tasks.task_inputs(truth, 0)[1]
    expected = np.abs(truth.get_test_data(0, include_target=True)[1] - np.median(targets)).mean()
    score = benchmark.tasks_map["matbench_jdft2d"].results.fold_0.scores.mae
    assert score == pytest.approx(expected, rel=1e-5)
    table = pd.read_csv(tmp_path / "scores.csv")
    assert ",".join(table.columns) == "suite,task,protocol,model,seed,fold,metric,value"
    assert len(table) == 2 * 5 * 4 and not table.duplicated(list(table.columns)[:-1]).any()


def test_classification_records_probabilities_as_floats(data_dir, tmp_path):
    assert run(tmp_path, "--tasks", "expt_is_metal", data_dir=data_dir) == 0
    folder = tmp_path / "matbench_v0.1_PolySRL"
    assert check_record(folder) == []
    task = submission.read_benchmark(folder).tasks_map["matbench_expt_is_metal"]
    values = list(task.results.fold_0.data.values())
    assert all(type(value) is float and 0 < value < 1 for value in values)
    metrics = set(pd.read_csv(tmp_path / "scores.csv")["metric"])
    assert {"rocauc", "rocauc_probability"} < metrics


def test_probability_rocauc_is_not_matbenchs(data_dir):
    task = tasks.load_task("expt_is_metal", data_dir)
    truth = task.get_test_data(0, include_target=True)[1].astype(float)
    submission.record_fold(task, 0, np.where(truth == 1, 0.4, 0.3))
    rows = score_rows(task, "matbench", "finetune", "m", 0).set_index("metric")["value"]
    assert rows["rocauc_probability"] == 1.0 and rows["rocauc"] == 0.5


def test_resume_after_interruption(toy_embedded, tmp_path):
    command = ["--suite", "embedded", "--tasks", "embedded_seebeck"]
    broken = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *command, learner=broken)
    assert not (tmp_path / "embedded_v0.1_PolySRL").exists()
    resumed = Interrupting(deadline=-1)
    assert run(tmp_path, *command, learner=resumed) == 0
    assert resumed.calls == 3
    assert run(tmp_path, *command, learner=resumed) == 0 and resumed.calls == 3
    assert run(tmp_path, *command, "--epochs", "7", learner=resumed) == 0 and resumed.calls == 8


def test_resume_within_a_fold(toy_embedded, tmp_path, monkeypatch):
    given = ["--suite", "embedded", "--tasks", "seebeck", "--folds", "0", "1", "--ensemble", "1"]
    command, fit, trained = [*given, "--epochs", "1", "2"], PolySRLModel.fit, []

    def interrupted(model, dataset, nb_epoch, **settings):
        trained.append((len(dataset), nb_epoch))
        if len(trained) == 5:
            raise KeyboardInterrupt
        return fit(model, dataset, nb_epoch=nb_epoch, **settings)

    run(tmp_path / "whole", *command, learner=train_and_predict)
    monkeypatch.setattr(PolySRLModel, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", *command, learner=train_and_predict)
    run(tmp_path / "parts", *command, learner=train_and_predict)
    trials, last = [(38, 1), (38, 2)], [(48, epochs) for _, epochs in (trained[2], trained[-1])]
    assert trained == [*trials, last[0], *trials, trials[1], last[1]]
    scores = [(tmp_path / name / "scores.csv").read_bytes() for name in ("whole", "parts")]
    assert scores[0] == scores[1]
    assert not list((tmp_path / "parts" / "unfinished" / "embedded_seebeck").iterdir())


def test_single_folds_add_up_to_a_record(toy_embedded, tmp_path, capsys):
    command = ["--suite", "embedded", "--tasks", "seebeck", "--folds"]
    run(tmp_path, *command, "0", "1", "2")
    assert "none, as no task has all its folds" in capsys.readouterr().out
    run(tmp_path, *command, "3", "4")
    assert "embedded_v0.1_PolySRL" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "scores.csv")["fold"].unique()) == 5
    record = submission.read_benchmark(tmp_path / "embedded_v0.1_PolySRL")
    assert record.user_metadata["tasks"]["embedded_seebeck"]["n_samples"] == 60


def test_folds_of_other_settings_never_mix_in_the_table(toy_embedded, tmp_path, capsys):
    def learner(task_type, *arguments):
        predictions, std, params = dummy_learner(task_type, *arguments)
        return predictions + 1, std, params

    command = ["--suite", "embedded", "--tasks", "seebeck"]
    run(tmp_path, *command)
    before = (tmp_path / "scores.csv").read_bytes()
    run(tmp_path, *command, "--folds", "0", "--epochs", "7", learner=learner)
    assert "folds [1, 2, 3, 4] of embedded_seebeck are of another" in capsys.readouterr().out
    assert (tmp_path / "scores.csv").read_bytes() == before
    run(tmp_path, *command, "--epochs", "7", learner=learner)
    assert "stays as it is" not in capsys.readouterr().out
    after = pd.read_csv(tmp_path / "scores.csv")
    assert set(after["fold"]) == {0, 1, 2, 3, 4}
    assert not after["value"].isin(pd.read_csv(io.BytesIO(before))["value"]).any()


def test_two_processes_share_a_task(toy_embedded, tmp_path):
    command = ["--suite", "embedded", "--tasks", "seebeck", "--folds"]

    def learner(*arguments):
        run(tmp_path, *command, "1", "2", "3", "4")  # meanwhile
        return dummy_learner(*arguments)

    run(tmp_path, *command, "0", learner=learner)
    assert set(pd.read_csv(tmp_path / "scores.csv")["fold"]) == {0, 1, 2, 3, 4}
    assert (tmp_path / "embedded_v0.1_PolySRL").exists()


def test_dry_run_writes_nothing(toy_embedded, tmp_path, capsys):
    output = tmp_path / "output"
    assert run(output, "--suite", "embedded", "--dry-run", learner=None) == 0
    assert "DRY RUN" in capsys.readouterr().out and not output.exists()


def test_frozen_and_finetuned_records_stay_apart(toy_embedded, tmp_path):
    for protocol in ("frozen", "finetune"):
        run(tmp_path, "--suite", "embedded", "--tasks", "seebeck", "--protocol", protocol)
    folders = sorted(path.name for path in tmp_path.glob("embedded*"))
    assert folders == ["embedded_v0.1_PolySRL", "embedded_v0.1_PolySRL_frozen"]
    assert set(pd.read_csv(tmp_path / "scores.csv")["protocol"]) == {"frozen", "finetune"}


def _run_one(output_dir, data_dir, task):
    return run(output_dir, "--tasks", task, data_dir=data_dir)


def test_two_processes_share_an_output_folder(data_dir, tmp_path, monkeypatch):
    names = ["steels", "jdft2d", "phonons", "expt_gap"]
    with ProcessPoolExecutor(2) as pool:
        jobs = [pool.submit(_run_one, tmp_path, data_dir, name) for name in names]
        assert [job.result() for job in jobs] == [0] * 4
    folder = tmp_path / "matbench_v0.1_PolySRL"
    assert check_record(folder) == []
    assert len(submission.read_benchmark(folder).tasks_map) == 4
    assert len(pd.read_csv(tmp_path / "scores.csv")) == 4 * 5 * 4
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    runpy.run_path(str(submission.run_file(folder)))
    assert {command[1] for command in commands} == {"benchmarks/run_matbench.py"}
    parsed = [run_matbench.parse_arguments(command[2:]) for command in commands]
    assert sorted(entry.tasks[0] for entry in parsed) == sorted(f"matbench_{n}" for n in names)


def test_merged_scores_replace_the_same_fold(tmp_path):
    columns = ["suite", "task", "protocol", "model", "seed", "fold", "metric", "value"]
    rows = [("matbench", "t", "finetune", "m", 0, fold, "mae", 1.0) for fold in range(2)]
    merge_scores(tmp_path / "s.csv", pd.DataFrame(rows, columns=columns))
    fresh = pd.DataFrame([("matbench", "t", "finetune", "m", 0, 1, "mae", 2.0)], columns=columns)
    assert list(merge_scores(tmp_path / "s.csv", fresh)["value"]) == [1.0, 2.0]
    assert list(pd.read_csv(tmp_path / "s.csv")["value"]) == [1.0, 2.0]


def test_scores_of_some_seeds_of_a_run_are_kept_and_those_of_others_stay(tmp_path):
    columns = ["task", "protocol", "model", "seed", "value"]
    rows = [("t", "transfer", model, seed, 1.0) for model in "ab" for seed in (0, 1, 2)]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "s.csv", index=False)
    keep_scores(tmp_path / "s.csv", "t", "transfer", "a", lambda seed: seed == 1)
    left = pd.read_csv(tmp_path / "s.csv")[["model", "seed"]].values.tolist()
    assert left == [["a", 1], ["b", 0], ["b", 1], ["b", 2]]


def test_writers_wait_for_one_another(tmp_path):
    entered = threading.Event()

    def write():
        with locked(tmp_path):
            entered.set()

    thread = threading.Thread(target=write)
    with locked(tmp_path):
        thread.start()
        assert not entered.wait(0.2)
    thread.join(5)
    assert entered.is_set()


def test_published_scores(data_dir):
    expected = {"perovskites": ("CrabNet", 0.406), "dielectric": ("Finder_v1.2_composition", 0.320)}
    for name, (algorithm, value) in expected.items():
        task = tasks.load_task(name, data_dir)
        best = published(task, data_dir)["best"]
        assert best[0] == algorithm and best[1] == pytest.approx(value, abs=6e-4)
    assert published(task, data_dir)["CrabNet"][1] == pytest.approx(0.3234, abs=1e-4)


def test_records_without_all_folds_are_no_published_scores(toy_embedded, monkeypatch):
    task = tasks.load_task("embedded_seebeck")
    rows = [*(("CrabNet", i, 2.0) for i in range(5)), *(("half", i, 1.0) for i in range(4))]
    table = pd.DataFrame(rows, columns=["algorithm", "fold", "value"])
    table = table.assign(task=task.dataset_name, metric="mae")
    monkeypatch.setattr("scores.leaderboard", lambda _: table)
    assert published(task, None) == {"best": ("CrabNet", 2.0), "CrabNet": ("CrabNet", 2.0)}


def test_summary_without_leaderboard(toy_embedded, monkeypatch):
    monkeypatch.delenv("POLYSRL_DATA", raising=False)
    task = tasks.load_task("embedded_seebeck")
    assert "0/5" in summary([task])
    submission.record_fold(task, 0, np.zeros(12))
    assert "1/5" in summary([task]) and json.dumps(task.metadata.unit) == '"uV/K"'

"""``benchmarks/pretrain.py``, its log, and the labels it may see or must not see."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import targets
import torch
from labels import labelled_formulas, mp_property_dataset
from models import assert_same_state, state
from pretrain import arguments_of, config_of, main, split
from processes import PRETRAIN, crystals, outcome, pretraining

from polysrl_dc import PolymorphDataset, PolySRLModel
from polysrl_dc.callbacks import PretrainingLog, pretraining_diagnostics
from polysrl_dc.checkpoints import load_checkpoint
from polysrl_dc.persistence import MODEL_FILE

COLUMNS = [
    *("epoch", "step", "loss", "contrastive", "kl", "c", "d", "retrieval@1", "retrieval@10"),
    *("rank_formulas", "rank_structures", "mean_sigma", "mean_log_sigma", "learning_rate"),
    *("structures_per_second", "peak_memory_mib", "processes"),
]
MEASURED = ["structures_per_second", "peak_memory_mib"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain") / "run"
    main([*PRETRAIN, "--output-dir", str(folder)])
    return folder


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------- the program


def test_a_run_leaves_model_log_and_checkpoints(finished):
    log = pd.read_csv(finished / "log.csv")
    assert log.columns.tolist() == COLUMNS
    assert log["epoch"].tolist() == [1, 2, 3]
    assert len(list(finished.glob("checkpoint*.safetensors"))) == 2
    model = PolySRLModel.from_pretrained(finished, device="cpu")
    assert model.config.n_features == model.config.edge_hidden == 16
    assert model.settings["objective"] == "polysrl"
    provenance = model.provenance
    assert provenance == load_checkpoint(finished / MODEL_FILE)[1]["provenance"]
    assert provenance["data"]["structures"] == "aflow" and provenance["data"]["excluded"] is None
    assert provenance["data"]["rows"] >= provenance["data"]["stoichiometries"] > 50
    assert provenance["data"]["held_out_stoichiometries"] == 30
    assert (provenance["epochs"], provenance["batch_size"], provenance["seed"]) == (3, 32, 0)


def test_a_second_call_has_nothing_to_do(finished, capsys):
    before = files(finished)
    main([*PRETRAIN, "--output-dir", str(finished)])
    assert "nothing to do" in capsys.readouterr().out
    assert files(finished) == before


def assert_same_run(folder, expected):
    one, other = (PolySRLModel.from_pretrained(path, device="cpu") for path in (folder, expected))
    assert_same_state(state(one), state(other))
    assert one.provenance == other.provenance
    logs = [pd.read_csv(path / "log.csv").drop(columns=MEASURED) for path in (folder, expected)]
    pd.testing.assert_frame_equal(*logs, check_exact=True)


def test_a_killed_run_is_continued_and_ends_like_another(finished):
    folder = outcome() / "benchmark"
    assert not (folder / MODEL_FILE).exists() and len(pd.read_csv(folder / "log.csv")) < 3
    main([*PRETRAIN, "--output-dir", str(folder)])
    assert_same_run(folder, finished)


def test_a_run_killed_before_the_model_was_written_is_not_trained_further(tmp_path, finished):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolySRLModel, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main([*PRETRAIN, "--output-dir", str(tmp_path)])
    main([*PRETRAIN, "--output-dir", str(tmp_path)])
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("epochs", ["2", "4"])
def test_a_run_is_not_continued_with_another_number_of_epochs(epochs, ended, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop = (PolySRLModel, "save") if ended else (PretrainingLog, "_write")
        count = iter(range(9))

        def interrupt(*_):
            if ended or next(count):  # at the end of the second epoch
                raise KeyboardInterrupt

        patch.setattr(*stop, interrupt)
        with pytest.raises(KeyboardInterrupt):
            main([*PRETRAIN, "--output-dir", str(tmp_path)])
    before = files(tmp_path)
    message = f"3 epochs, not {epochs}" if ended else f"another epochs: 3, not {epochs}"
    with pytest.raises(SystemExit, match=message):
        main([*PRETRAIN, "--epochs", epochs, "--output-dir", str(tmp_path)])
    assert not (tmp_path / MODEL_FILE).exists() and files(tmp_path).items() >= before.items()


def test_a_dry_run_shows_the_run_and_writes_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    main([*PRETRAIN, "--output-dir", str(folder), "--dry-run"])
    assert not folder.exists()
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"]["n_features"] == 16 and shown["epochs"] == 3


def test_without_a_held_out_part_there_are_no_diagnostics(tmp_path):
    main([*PRETRAIN, "--output-dir", str(tmp_path), "--hold-out", "0", "--epochs", "1"])
    log = pd.read_csv(tmp_path / "log.csv")
    assert len(log) == 1 and "loss" in log and "retrieval@1" not in log


@pytest.mark.parametrize("objective", ["without_sampling", "graphcl", "infomax3d"])
def test_other_objectives_run(objective, tmp_path):
    main([*PRETRAIN, "--objective", objective, "--epochs", "1", "--output-dir", str(tmp_path)])
    model = PolySRLModel.from_pretrained(tmp_path, device="cpu")
    assert model.settings["objective"] == model.provenance["objective"] == objective
    assert np.isfinite(pd.read_csv(tmp_path / "log.csv")["loss"]).all()


# ------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    "change",
    [
        *("n_features", "n_feature=16", "n_features=0", "n_features=1.5", "n_features=wide"),
        *("match_form=soft", "feature_norm=1", "feature_norm=yes", "whitening=much", "=3"),
    ],
)
def test_a_bad_change_of_the_configuration_is_one_line(change):
    with pytest.raises(SystemExit) as stop:
        config_of(arguments_of(["--set", "edge_hidden=16", change]))
    message = str(stop.value.code)
    assert message.startswith(f"--set {change}: ") and len(message.splitlines()) == 1


def test_good_changes_of_the_configuration():
    changes = ["n_features=16", "whitening=1", "feature_norm=false", "match_form=hib", "beta=1e-3"]
    config = config_of(arguments_of(["--config", "paper", "--set", *changes]))
    assert (config.n_features, config.feature_norm, config.match_form) == (16, False, "hib")
    assert (config.whitening, config.beta) == (1.0, 1e-3) and type(config.whitening) is float
    assert config.structure_layers == 3


@pytest.mark.parametrize(
    "bad",
    [
        *(["--epochs", "0"], ["--batch-size", "1"], ["--learning-rate", "-1"]),
        *(["--polymorphs-per-batch", "0"], ["--max-edges", "0"], ["--hold-out", "-1"]),
        *(["--config", "papre"], ["--objective", "simclr"], ["--exclude", "wetlabs"]),
    ],
    ids=lambda bad: bad[0],
)
def test_bad_values_are_one_line(bad, capsys):
    with pytest.raises(SystemExit) as stop:
        main(bad)
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert bad[0] in last and bad[1] in last


@pytest.mark.parametrize("option", ["--structures", "--data-dir"])
def test_missing_data_are_one_line(option, tmp_path):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="nowhere") as stop:
        main([option, missing, "--output-dir", str(tmp_path / "run")])
    assert len(str(stop.value.code).splitlines()) == 1


def test_options_that_an_objective_does_not_use_are_refused(capsys):
    for option in (["--structures", "aflow"], ["--hold-out", "5"], ["--autocast"]):
        with pytest.raises(SystemExit):
            main(["--objective", "mp_band_gap", *option])
        assert f"{option[0]} has no use for mp_band_gap" in capsys.readouterr().err


def test_no_data_at_all_is_one_line(monkeypatch, tmp_path):
    monkeypatch.delenv("POLYSRL_DATA", raising=False)
    for objective in ("polysrl", "mp_band_gap"):
        with pytest.raises(SystemExit, match="--data-dir"):
            main(["--objective", objective, "--output-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="labelled data, which --exclude reads: pass --data-dir"):
        main(["--structures", "aflow", "--exclude", "wetlab", "--output-dir", str(tmp_path)])


# ------------------------------------------------------------------------- what is left out


def test_held_out_and_excluded_formulas_are_not_trained_on():
    dataset = PolymorphDataset("aflow", progress=False)
    train, held_out = split(dataset, 40, set(), 0)
    assert not set(train.formulas) & set(held_out.formulas)
    assert len(train) + len(held_out) == len(dataset)
    assert len(set(held_out.formulas)) == 40
    exclude = set(train.formulas[::3])
    fewer, same = split(dataset, 40, exclude, 0)
    assert not set(fewer.formulas) & exclude and exclude
    assert set(fewer.formulas) == set(train.formulas) - exclude
    np.testing.assert_array_equal(same.ids, held_out.ids)
    assert set(split(dataset, 40, set(), 1)[1].formulas) != set(held_out.formulas)
    assert len(set(split(dataset, 10**6, set(), 0)[1].formulas)) == len(set(dataset.formulas)) // 5


def test_exclude_leaves_the_labelled_formulas_out(data_dir, tmp_path, capsys):
    excluded = labelled_formulas(data_dir, "wetlab")
    assert {"GaAs", "Bi2Te3"} <= excluded
    fixed = [*PRETRAIN, "--data-dir", str(data_dir), "--dry-run", "--output-dir", str(tmp_path)]
    rows = []
    for more in ([], ["--exclude", "wetlab"]):
        main([*fixed, *more])
        rows.append(json.loads(capsys.readouterr().out)["data"]["rows"])
    dataset = PolymorphDataset("aflow", max_sites=8, progress=False)
    train, _ = split(dataset, 30, set(), 0)
    lost = sum(formula in excluded for formula in train.formulas)
    assert rows[0] == len(train) and rows[0] - rows[1] == lost > 0


# ------------------------------------------------------------------------- DFT labels


@pytest.fixture
def labels(tmp_path, monkeypatch):
    """A data folder with tables of seven rows."""

    def load_task(name, folder):
        table = pd.read_csv(folder / "matbench" / f"{name}.csv.gz", index_col="mbid")
        metadata = SimpleNamespace(input_type="composition", target=table.columns[-1])
        return SimpleNamespace(df=table, metadata=metadata)

    monkeypatch.setattr("targets.load_task", lambda name, folder: load_task(name, Path(folder)))
    targets._lowest_space_groups.cache_clear()
    (tmp_path / "matbench").mkdir()
    formulas = ["Ti2 O4", "Ti1 O2", "Na1 Cl1", "Ti4 O8", "Xx2 O3", "K1 Cl1", "Na4 Cl4"]
    for name, column, values in (
        ("matbench_mp_e_form", "e_form", [-3.0, -3.5, -2.0, -3.2, 0.0, -2.2, -1.0]),
        ("matbench_mp_gap", "gap pbe", [1.0, 2.0, 5.0, 3.0, 0.0, 5.2, 4.0]),
    ):
        frame = pd.DataFrame({"mbid": [f"mb-{i}" for i in range(7)], "composition": formulas})
        frame["space_group_number"] = 1
        frame[column] = values
        frame.to_csv(tmp_path / "matbench" / f"{name}.csv.gz", index=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("matbench_mp_e_form", {"TiO2": -3.5, "NaCl": -2.0, "KCl": -2.2}),
        ("matbench_mp_gap", {"TiO2": 2.0, "NaCl": 4.5, "KCl": 5.2}),
    ],
)
def test_each_formula_has_one_label(name, expected, labels):
    dataset = mp_property_dataset(name, labels)
    assert dict(zip(dataset.ids, dataset.y.ravel(), strict=True)) == expected
    assert [graph.formula for graph in dataset.X] == dataset.ids.tolist()


def test_dft_labels_of_excluded_formulas_are_not_seen(labels, monkeypatch):
    monkeypatch.setattr("labels.labelled_formulas", lambda folder, which: {"TiO2"})
    dataset = mp_property_dataset("matbench_mp_e_form", labels, "wetlab")
    assert sorted(dataset.ids) == ["KCl", "NaCl"]


def test_pretraining_on_dft_labels(labels, tmp_path):
    folder = tmp_path / "run"
    main([
        *("--objective", "mp_formation_energy", "--data-dir", str(labels), "--epochs", "2"),
        *("--set", "n_features=16", "--output-dir", str(folder), "--device", "cpu"),
        *("--final-whitening", "0"),
    ])  # fmt: skip
    model = PolySRLModel.from_pretrained(folder, device="cpu")
    assert model.settings["task"] == "regression"
    assert model.provenance["objective"] == "mp_formation_energy"
    assert model.provenance["data"]["labels"] == "matbench_mp_e_form"
    matrix = model.model.encoders[0].mean_norm.decorrelation
    np.testing.assert_allclose(matrix.numpy(), np.eye(16), atol=1e-5)
    start = PolySRLModel(config=model.config, pretrained=folder, device="cpu")
    dataset = mp_property_dataset("matbench_mp_e_form", labels)
    np.testing.assert_allclose(
        start.predict_embedding(dataset), model.predict_embedding(dataset), atol=1e-6
    )


def test_the_test_folds_are_those_of_fold_0_of_both_tasks(labels, monkeypatch):
    tests = {"matbench_mp_gap": ["Na4 Cl4"], "matbench_mp_e_form": ["K2 Cl2", "O1"]}
    monkeypatch.setattr("labels.load_task", lambda name, folder: name)
    monkeypatch.setattr("labels.task_inputs", lambda task, fold: ([], [], tests[task][fold:]))
    assert labelled_formulas(labels, "test-folds") == {"NaCl", "KCl", "O2"}
    dataset = mp_property_dataset("matbench_mp_gap", labels, "test-folds")
    assert dataset.ids.tolist() == ["TiO2"]


# ------------------------------------------------------------------------- the log


def test_the_log_has_a_row_per_epoch_and_sane_values(finished):
    log = pd.read_csv(finished / "log.csv")
    assert log["step"].is_monotonic_increasing and np.isfinite(log.to_numpy()).all()
    assert log[["retrieval@1", "retrieval@10"]].stack().between(0, 1).all()
    assert (log["retrieval@10"] >= log["retrieval@1"]).all()
    assert log[["rank_formulas", "rank_structures"]].stack().between(1, 16).all()
    np.testing.assert_allclose(log["loss"], log["contrastive"] + log["kl"], rtol=1e-4)
    assert (log[["mean_sigma", *MEASURED]] > 0).all(axis=None) and (log["processes"] == 1).all()


def test_rows_of_epochs_that_are_run_again_are_replaced(tmp_path):
    train, held_out = crystals().select(range(24)), crystals().select(range(24, 37))
    path = tmp_path / "log.csv"
    for _ in range(2):
        log = PretrainingLog(path, held_out)
        pretraining().fit(train, nb_epoch=3, checkpoint_interval=0, callbacks=log)
    assert pd.read_csv(path)["epoch"].tolist() == [1, 2, 3]
    log = PretrainingLog(path, held_out)
    pretraining(seed=4).fit(train, nb_epoch=1, checkpoint_interval=0, callbacks=log)
    assert pd.read_csv(path)["epoch"].tolist() == [1]


def test_the_clock_of_the_log_starts_with_the_training(tmp_path, monkeypatch):
    clock = [0.0]

    class Ticks:
        def end_step(self, model, loss, n_rows):
            clock[0] += 1  # a second for each batch of 8

        def __call__(self, model, step):
            pass

    monkeypatch.setattr("polysrl_dc.callbacks.time.perf_counter", lambda: clock[0])
    log = PretrainingLog(tmp_path / "log.csv", crystals().select([]))
    clock[0] = 60.0
    train = crystals().select(range(24))
    pretraining(batch_size=8).fit(train, 2, checkpoint_interval=0, callbacks=[Ticks(), log])
    assert pd.read_csv(tmp_path / "log.csv")["structures_per_second"].tolist() == [8, 8]


def test_the_log_is_either_complete_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    log = PretrainingLog(path, crystals().select(range(8)))
    log._write({"epoch": 1, "step": 5, "loss": 0.5})
    before = path.read_text()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        log._write({"epoch": 2, "step": 10, "loss": 0.4})
    assert path.read_text() == before


def test_logging_does_not_change_the_training(tmp_path):
    log = PretrainingLog(tmp_path / "log.csv", crystals())
    watched, quiet = pretraining(), pretraining()
    modes = []
    callbacks = [log, lambda model, _: modes.append(model.model.training)]
    watched.fit(crystals(), nb_epoch=2, checkpoint_interval=0, callbacks=callbacks)
    quiet.fit(crystals(), nb_epoch=2, checkpoint_interval=0)
    assert modes and all(modes)
    assert_same_state(state(watched), state(quiet))


def test_diagnostics_of_encoders_that_agree_and_of_a_collapse():
    network = pretraining().model
    groups = crystals().groups
    rows = np.sort(np.unique(groups, return_index=True)[1])
    directions = torch.nn.functional.normalize(torch.randn(len(rows), 16), dim=-1)

    class Fixed(torch.nn.Module):
        def __init__(self, vectors, pair):
            super().__init__()
            self.vectors, self.pair = vectors, pair

        def forward(self, batch):
            log_sigma = torch.full_like(self.vectors, -2.0)
            return (self.vectors, log_sigma) if self.pair else self.vectors

    network.structure_encoder = Fixed(directions, False)
    network.encoders[0] = Fixed(directions, True)
    found = pretraining_diagnostics(network, crystals(), 256)
    assert found["retrieval@1"] == found["retrieval@10"] == 1.0
    assert 8 < found["rank_formulas"] == found["rank_structures"] <= 16
    assert found["mean_log_sigma"] == -2.0
    assert found["mean_sigma"] == pytest.approx(np.exp(-2), rel=1e-5)
    network.encoders[0] = Fixed(directions.flip(0), True)
    assert pretraining_diagnostics(network, crystals(), 256)["retrieval@1"] < 0.2
    network.structure_encoder = Fixed(torch.ones_like(directions), False)
    assert pretraining_diagnostics(network, crystals(), 256)["rank_structures"] == 0

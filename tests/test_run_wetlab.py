"""The wet-lab runner: both protocols, records, what is done already, scores."""

import json
from dataclasses import replace

import folds
import magpie
import numpy as np
import pandas as pd
import paper_protocol
import pytest
import representation
import run_wetlab
import transfer
from check_submission import check_records
from folds import FoldStore, unfinished_folder
from magpie import magpie_features, predict_baseline, regressor
from paired import PLACE, comparison, held_out_ratio, over_folds, paired_differences
from paper_models import MODELS, encoder_embeddings, encoder_of
from paper_protocol import FOLDS, part_of_training
from paper_records import absolute_errors, load_record, prediction_scores, record_path
from run_wetlab import main
from scipy import stats
from sklearn.metrics import mean_absolute_error
from targets import Target, matbench_target, wetlab_targets

from polysrl_dc import PolySRLModel
from polysrl_dc.checkpoints import checkpoint_path, load_checkpoint
from polysrl_dc.errors import InvalidInputError

COLUMNS = ["suite", "task", "protocol", "model", "seed", "fold", "metric", "value"]


def small_target(name: str = "small", n: int = 20, scale: float = 1.0) -> Target:
    salts = ("Na{}Cl", "Na{}I", "K{}Cl", "K{}I")
    formulas = np.array([salt.format(i) for i in range(1, 6) for salt in salts])
    return Target(name, "eV", formulas[:n], np.linspace(1, 2, n), scale, 8)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Two small targets, few epochs; runs the command with a folder of its own."""
    found = [small_target("one"), small_target("two", 18, 10.0)]
    monkeypatch.setattr(run_wetlab, "wetlab_targets", lambda data_dir: found)
    monkeypatch.setattr(paper_protocol, "EPOCHS", 2)
    monkeypatch.setattr(transfer, "EPOCHS", 1)
    monkeypatch.setattr(transfer, "LEARNING_RATES", (1e-3, 1e-4))
    embed = lambda formulas: np.array([[len(f), i] for i, f in enumerate(formulas)], float)  # noqa: E731
    monkeypatch.setattr(paper_protocol, "encoder_embeddings", lambda *_: embed)
    calls = []

    def predict_fold(target, split, encoder, seed, rates, unfinished):
        calls.append((target.name, seed, list(rates)))
        return target.values[split[1]] + 0.5, None, {"learning_rate": rates[-1]}

    monkeypatch.setattr(transfer, "predict_fold", predict_fold)

    def run(*arguments: str) -> pd.DataFrame:
        calls.clear()
        return main([*arguments, "--output-dir", str(tmp_path)])

    run.calls, run.folder, run.targets = calls, tmp_path, found
    return run


def test_representation_writes_records_that_are_accepted_and_scores_of_them(quick):
    scores = quick("--models", "rand_init", "--protocols", "representation", "--seeds", "2")
    assert list(scores.columns) == COLUMNS and len(scores) == 2 * 2 * 5 * 2
    run = (quick.folder, "wetlab", "rand_init", "representation")
    assert check_records([record_path(*run, seed) for seed in (0, 1)]) == []
    for target in quick.targets:
        predictions = load_record(*run, 1)[target.name].predictions
        errors = scores.query("task == @target.name and seed == 1 and metric == 'mae'")["value"]
        expected = [
            mean_absolute_error(target.values[test], predictions[test]) * target.scale
            for _, test in target.splits()
        ]
        np.testing.assert_allclose(errors, expected, rtol=1e-4)  # predictions are rounded


def test_transfer_chooses_rates_with_the_first_seed_only(quick):
    scores = quick("--models", "rand_init", "--protocols", "transfer", "--seeds", "2")
    assert quick.calls[:5] == [("one", 0, [1e-3, 1e-4])] * 5
    assert quick.calls[10:15] == [("one", 1, [1e-4])] * 5
    errors = scores[scores["metric"] == "mae"].groupby("task")["value"].mean()
    assert errors.to_dict() == pytest.approx({"one": 0.5, "two": 5.0})
    record = load_record(quick.folder, "wetlab", "rand_init", "transfer", 1)["one"]
    assert record.std is None and record.params == [{"learning_rate": 1e-4}] * 5


def test_the_first_seed_chooses_the_rates_of_any_other(quick):
    scores = quick("--models", "rand_init", "--protocols", "transfer", "--seed", "1")
    assert quick.calls[:10:5] == [("one", 0, [1e-3, 1e-4]), ("two", 0, [1e-3, 1e-4])]
    assert {tuple(rates) for _, seed, rates in quick.calls if seed == 1} == {(1e-4,)}
    assert set(scores["seed"]) == {0, 1}


def test_what_is_there_is_not_run_again_unless_the_encoder_changes(quick, tmp_path):
    quick("--models", "rand_init", "--protocols", "transfer")
    assert len(quick.calls) == 10
    quick("--models", "rand_init", "--protocols", "transfer")
    assert quick.calls == []
    PolySRLModel(pretrained=None).save(tmp_path / "mine")
    chosen = ("--encoder", str(tmp_path / "mine"), "--name", "rand_init", "--protocols", "transfer")
    quick(*chosen)
    assert len(quick.calls) == 10


def test_scores_that_are_missing_are_made_from_the_folds(quick):
    command = ("--models", "rand_init", "--protocols", "transfer")
    table, path = quick(*command), quick.folder / "wetlab_scores.csv"
    table[table["task"] != "two"].to_csv(path, index=False)  # killed before they were written
    quick(*command, "--seeds", "2", "--targets", "two")
    assert {call[1] for call in quick.calls} == {1}
    pd.testing.assert_frame_equal(pd.read_csv(path).query("seed == 0"), table)


def test_scores_of_another_encoder_do_not_stay(quick, tmp_path):
    for seed, kind in enumerate(("grouped", "matbench")):
        PolySRLModel(pretrained=None, seed=seed).save(tmp_path / str(seed))
        chosen = ("--encoder", str(tmp_path / str(seed)), "--name", "mine", "--folds", kind)
        scores = quick(*chosen, "--protocols", "representation", "--targets", "one")
        assert set(scores["suite"]) == ({"wetlab"} if seed else {"wetlab", "wetlab_grouped"})


def test_scores_of_another_configuration_do_not_stay_beside_its_own(quick):
    command = ("--models", "rand_init", "--protocols", "representation")
    assert set(quick(*command, "--seeds", "3")["seed"]) == {0, 1, 2}
    scores = quick(*command, "--config", "paper", "--targets", "one")
    assert set(scores.query("task == 'one'")["seed"]) == {0}
    assert set(scores.query("task == 'two'")["seed"]) == {0, 1, 2}
    with pytest.raises(InvalidInputError, match="one: different settings made the seeds"):
        absolute_errors(quick.targets[0], quick.folder, "rand_init")
    scores = quick(*command, "--config", "paper", "--seeds", "3")
    assert set(scores["seed"]) == {0, 1, 2} and len(scores) == 3 * 2 * 5 * 2
    assert absolute_errors(quick.targets[0], quick.folder, "rand_init").shape == (20,)


def test_folds_by_publication_are_of_targets_that_name_theirs(quick):
    one = quick.targets[0]
    papers = np.array([f"doi {i % 7}" for i in range(len(one.values))])
    quick.targets[0] = replace(one, publications=papers)
    scores = quick(
        *("--models", "magpie_ridge", "--folds", "publication", "--protocols", "representation")
    )
    assert set(scores[scores["suite"] == "wetlab_publication"]["task"]) == {"one"}
    (predictions,) = predict_baseline("magpie_ridge", quick.targets[:1], [0], FOLDS["publication"])[
        "one"
    ]
    expected = [
        mean_absolute_error(one.values[test], predictions[test])
        for _, test in quick.targets[0].splits(papers)
    ]
    found = scores.query("suite == 'wetlab_publication' and metric == 'mae'").sort_values("fold")
    np.testing.assert_allclose(found["value"], expected)


def test_interrupted_folds_are_kept(quick, monkeypatch):
    kind = transfer.predict_fold
    started = []

    def dies(*call, unfinished):
        started.append(unfinished)
        if len(started) == 4:
            raise KeyboardInterrupt
        return kind(*call, unfinished)

    monkeypatch.setattr(transfer, "predict_fold", dies)
    with pytest.raises(KeyboardInterrupt):
        quick("--models", "rand_init", "--protocols", "transfer", "--targets", "one")
    quick("--models", "rand_init", "--protocols", "transfer", "--targets", "one")
    assert len(quick.calls) == 2
    assert started[4] == started[3] and len(set(started)) == 5


def test_other_folds_and_parts_of_the_training_rows(quick):
    arguments = ("--models", "rand_init", "--protocols", "representation", "--folds", *FOLDS)
    scores = quick(*arguments)
    others = set(FOLDS) - {"matbench", "publication"}  # these targets name none
    assert set(scores["suite"]) == {"wetlab", *(f"wetlab_{name}" for name in others)}
    for fraction, rows in ((0.1, 2), (0.5, 8), (1.0, 16)):
        for (part, test), (train, same) in zip(
            part_of_training(fraction)(quick.targets[0]), quick.targets[0].splits(), strict=True
        ):
            assert len(part) == rows and set(part) <= set(train) and (test == same).all()


def test_bad_arguments_end_with_one_line(quick, capsys):
    for arguments, message in (
        (["--models", "rand_init", "--targets", "three"], "no target is named 'three'"),
        (["--encoder", "nowhere"], "nowhere: no encoder"),
        (["--seeds", "0"], "at least 1"),
        (["--name", "mine"], "--name is the label of --encoder"),
        (["--models", "rand_init", "--config", "paper"], "give --models rand_init --protocols rep"),
        (["--config", "paper", "--protocols", "representation"], "is of random weights only"),
    ):
        with pytest.raises(SystemExit) as ended:
            quick(*arguments)
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_dry_run_writes_nothing(data_dir, tmp_path, capsys):
    place = ("--data-dir", str(data_dir), "--output-dir", str(tmp_path))
    main([*place, "--models", "rand_init", "--dry-run"])
    printed = capsys.readouterr().out
    assert all(f"{known.name}: {known.account}" in printed for known in wetlab_targets(data_dir))
    assert not list(tmp_path.iterdir())


def test_the_protocols_have_the_epochs_and_rates_of_the_paper():
    """Appendix E."""
    assert (representation.EPOCHS, representation.LEARNING_RATE) == (300, 1e-3)
    assert (transfer.EPOCHS, transfer.LEARNING_RATES) == (500, (5e-3, 1e-3, 5e-4, 1e-4))


def test_transfer_learns_and_repeats():
    target = small_target()
    split = (np.arange(16), np.arange(16, 20))
    runs = [
        transfer.predict_fold(target, split, None, 0, learning_rates=(1e-3, 1e-9), epochs=30)
        for _ in range(2)
    ]
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    assert runs[0][2]["learning_rate"] == 1e-3
    assert set(runs[0][2]["validation_mae"]) == {"0.001", "1e-09"}
    fixed = transfer.predict_fold(target, split, None, 0, learning_rates=(1e-3,), epochs=30)
    np.testing.assert_array_equal(fixed[0], runs[0][0])
    assert fixed[1] is None and fixed[2] == {"learning_rate": 1e-3}


def test_a_part_of_the_training_rows_chooses_the_rate_and_is_not_learned_from(monkeypatch):
    """And the model is that of the protocol: a constant rate, values alone, the seed asked for."""
    fit, learned, models = PolySRLModel.fit, [], []

    def noted(model, dataset, *args, **kwargs):
        learned.append(len(dataset))
        models.append((model.training["seed"], model.schedule, model.config.heteroscedastic))
        return fit(model, dataset, *args, **kwargs)

    monkeypatch.setattr(PolySRLModel, "fit", noted)
    split = np.arange(16), np.arange(16, 20)
    transfer.predict_fold(small_target(), split, None, 3, (1e-3, 1e-4), epochs=1)
    assert learned[0] == learned[1] in (12, 13) and learned[2] == 16
    assert models == [(3, "constant", False)] * 3


def test_an_interrupted_fold_goes_on_with_what_it_had_trained(tmp_path, monkeypatch):
    target, fit = small_target(), PolySRLModel.fit
    split, rates = (np.arange(16), np.arange(16, 20)), (1e-3, 1e-4)
    expected = transfer.predict_fold(target, split, None, 0, rates, epochs=3)
    trained = []

    def counted(model, *args, **kwargs):
        trained.append(model.training["learning_rate"])
        if len(trained) == 2:
            raise KeyboardInterrupt
        return fit(model, *args, **kwargs)

    def train():
        with unfinished_folder(tmp_path / "fold") as place:
            return transfer.predict_fold(target, split, None, 0, rates, place, epochs=3)

    monkeypatch.setattr(PolySRLModel, "fit", counted)
    with pytest.raises(KeyboardInterrupt):
        train()
    with unfinished_folder(tmp_path / "fold"):  # of another process: nothing of it is touched
        beside = train()
        assert len(list((tmp_path / "fold").iterdir())) == 2
        trained[2:], kept = [], tmp_path / "kept"
        (tmp_path / "fold").rename(kept)
    np.testing.assert_array_equal(beside[0], expected[0])
    kept.rename(tmp_path / "fold")
    found = train()
    assert trained == [1e-3, 1e-4, 1e-4, found[2]["learning_rate"]]
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[2] == expected[2]


def test_what_is_trained_of_a_fold_stays_until_the_fold_is_written(tmp_path, monkeypatch):
    store, write = FoldStore(tmp_path / "folds", "task", {}), folds.write_atomic

    def trained():
        with unfinished_folder(store.unfinished(1)) as place:
            (place / "part").touch()

    def full(path, content):
        raise OSError("No space left on device")

    trained()
    monkeypatch.setattr(folds, "write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        store.save(1, ["a"], [0.5], None, {})
    assert store.load(1, ["a"]) is None and (store.unfinished(1) / "part").exists()
    monkeypatch.setattr(folds, "write_atomic", write)
    store.save(1, ["a"], [0.5], None, {})
    assert not store.unfinished(1).exists()
    trained()  # as of a run that was killed when it had written the fold
    with unfinished_folder(store.unfinished(1)):  # another process is at work in it
        assert store.load(1, ["a"])["predictions"] == [0.5]
        assert (store.unfinished(1) / "part").exists()
    assert store.load(1, ["a"]) and not store.unfinished(1).exists()


@pytest.mark.parametrize("model", MODELS)
def test_encoders_of_the_papers_models_come_with_the_repository(model):
    encoder = encoder_of(model)
    assert (encoder is None) == (model == "rand_init")
    if encoder:
        path = checkpoint_path(encoder)
        objective = load_checkpoint(path)[1]["provenance"]["objective"]
        assert objective == model and path.stat().st_size < 10_000_000
        assert f"objective `{model}`" in path.with_name(f"{path.name.split('.')[0]}.md").read_text()


def test_random_encoders_differ_by_seed_and_saved_ones_do_not(tmp_path):
    random = encoder_embeddings(None, [0, 1])(["NaCl", "KCl"])
    assert random.shape == (2, 2, 200) and not np.allclose(random[0], random[1])
    PolySRLModel(pretrained=None, seed=1).save(tmp_path / "saved")
    saved = encoder_embeddings(str(tmp_path / "saved"), [0, 1])(["NaCl", "KCl"])
    np.testing.assert_allclose(saved, random[1], atol=1e-6)


def test_magpie_baselines_are_those_that_are_described():
    forest = regressor("magpie_forest", 7)
    assert (forest.n_estimators, forest.max_features, forest.random_state) == (300, 1 / 3, 7)
    with pytest.raises(ValueError, match=r"HeO: .*MeltingT is not finite"):
        magpie_features(["NaCl", "HeO"])
    x = np.random.default_rng(0).normal(size=(20, 2)) * [1, 1e-4]  # one column hardly varies
    ridge = regressor("magpie_ridge", 0).fit(x, x @ [1, 1000])
    assert len(set(ridge.predict([[0.5, 0.0], [0.5, 1.0]]))) == 1


def test_magpie_baselines_see_training_rows_only(monkeypatch):
    monkeypatch.setattr(magpie, "TREES", 10)
    target = small_target()
    assert magpie_features(["NaCl", "Fe2O3"]).shape == (2, 132)
    for model in ("magpie_ridge", "magpie_forest"):
        found = predict_baseline(model, [target], [0, 1])[target.name]
        changed = Target(**{**target.__dict__, "values": target.values.copy()})
        _, test = target.splits()[0]
        changed.values[test] += 100
        again = predict_baseline(model, [changed], [0, 1])[target.name]
        np.testing.assert_allclose(again[:, test], found[:, test])
        assert np.abs(found - target.values).mean() < 0.5
    with pytest.raises(ValueError, match="Xe"):
        magpie_features(["NaCl", "XeOg"])


def test_scores_are_in_reported_units():
    target = small_target(scale=10.0)
    predictions = target.values + 0.25
    table = prediction_scores(target, predictions, target.splits(), "s", "p", "m", 3)
    assert list(table.columns) == COLUMNS and len(table) == 10
    np.testing.assert_allclose(table[table["metric"] == "mae"]["value"], 2.5)


def test_the_comparison_is_of_the_targets_that_are_asked_for():
    columns = ["suite", "protocol", "metric", "task", "model", "seed", "fold", "value"]
    rows = [
        ("wetlab", protocol, "mae", task, model, 0, fold, value + fold / 10)
        for protocol, task in (("representation", "gap"), ("transfer", "density"))
        for model, value in (("new", 1.0), ("old", 2.0))
        for fold in range(5)
    ]
    scores = pd.DataFrame(rows, columns=columns)
    texts = {
        task: comparison(scores, "new", "old", "wetlab", [task], None, [])
        for task in ("gap", "density", "other")
    }
    assert "new, representation" in texts["gap"] and "transfer" not in texts["gap"]
    assert "new, transfer" in texts["density"] and "representation" not in texts["density"]
    assert texts["gap"].endswith("new is better than old on 1 of 1 targets")
    assert texts["other"] == ""


def test_the_fewer_rows_are_trained_on_the_wider_is_the_interval(data_dir):
    splits = matbench_target("matbench_jdft2d", data_dir).splits()
    sizes = [len(test) / len(train) for train, test in splits]
    assert held_out_ratio("paper") == pytest.approx(np.mean(sizes), rel=0.01)
    ratios = {"wetlab": 1 / 4, "paper": 0.2 / 0.72, "wetlab_10%": 0.2 / 0.08}
    values = [1.0, 2.0, 3.0, 2.0, 2.0]
    rows = pd.MultiIndex.from_tuples(
        [(suite, "transfer", "mae", "a", 0, fold) for suite in ratios for fold in range(5)],
        names=[*PLACE, "seed", "fold"],
    )
    half = over_folds(pd.DataFrame({"a": values * 3}, rows))["half"].groupby("suite").first()
    t = stats.t.ppf(0.975, 4)
    for suite, ratio in ratios.items():
        assert half[suite] == pytest.approx(t * np.std(values, ddof=1) * (0.2 + ratio) ** 0.5)


def test_paired_differences():
    def rows(model: str, values: list[float]) -> pd.DataFrame:
        keys = [("wetlab", "t", "representation", model, 0, fold, "mae") for fold in range(3)]
        return pd.DataFrame(
            [(*key, value) for key, value in zip(keys, values, strict=False)], columns=COLUMNS
        )

    scores = pd.concat([rows("new", [1.0, 2.0, 9.0]), rows("old", [2.0, 5.0])])
    (row,) = paired_differences(scores, "new", "old").itertuples()
    assert (row.Index, row.mae, row.baseline, row.difference, row.pairs) == ("t", 1.5, 3.5, -2.0, 2)
    error = 2**0.5 * (1 / 2 + 1 / 4) ** 0.5  # of -1 and -3, whose folds share training rows
    assert row.half == pytest.approx(error * stats.t.ppf(0.975, 1))
    assert row.p == pytest.approx(2 * stats.t.sf(2 / error, 1))
    for other in (rows("old", []), scores.assign(suite="paper")):
        both = pd.concat([rows("new", [1.0]), other])
        assert len(paired_differences(both, "new", "old")) == 0


def test_seeds_are_no_samples():
    keys = [
        ("wetlab", "t", "transfer", "new", seed, fold, "mae") for seed in (0, 1) for fold in (0, 1)
    ]
    scores = pd.DataFrame(
        [(*key, value) for key, value in zip(keys, [1.0, 2.0, 3.0, 6.0], strict=True)],
        columns=COLUMNS,
    )
    zero = scores.assign(model="old", value=0.0)
    (row,) = paired_differences(pd.concat([scores, zero]), "new", "old", "transfer").itertuples()
    error = 2**0.5 * (1 / 2 + 1 / 4) ** 0.5  # of 2 and 4, the means of the folds
    assert (row.difference, row.pairs) == (3.0, 4)
    assert row.half == pytest.approx(error * stats.t.ppf(0.975, 1))


def test_records_name_the_command_that_makes_them(quick):
    quick("--models", "rand_init", "--protocols", "representation")
    folder = record_path(quick.folder, "wetlab", "rand_init", "representation", 0)
    (script,) = folder.glob("*.py")
    assert "run_wetlab.py" in script.read_text() and "--models rand_init" in script.read_text()
    assert "rand_init" in json.loads((folder / "info.json").read_text())["algorithm"]


def test_the_command_of_a_record_repeats_its_seed_and_configuration(quick):
    command = ["--models", "rand_init", "--protocols", "representation"]
    quick(*command, "--config", "paper", "--seed", "2")
    record = load_record(quick.folder, "wetlab", "rand_init", "representation", 2)["one"]
    assert record.settings["arguments"] == [*command, "--seeds", "3", "--config", "paper"]

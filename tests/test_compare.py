"""Peers on the folds of the transfer protocol, the comparison printed of them, and its timing."""

import json
from dataclasses import replace
from types import SimpleNamespace

import compare
import compare_cost
import compare_speed
import numpy as np
import pandas as pd
import paper_protocol
import peers
import pytest
import recipes
import torch
import transfer
from check_submission import check_records
from compare import main
from compare_speed import WARM_UP, Contender, measure, step_seconds
from paper_records import load_record, record_path
from peers import PEERS, lacking, peer_settings
from targets import SMALL_TASKS, Target
from tasks import PAPER_TASKS
from transfer import dataset_of

pytest.importorskip("aviary", reason="Roost needs the extra 'peers'")
pytest.importorskip("pytorch_optimizer", reason="CrabNet needs the extra 'peers'")

from crabnet import CrabNetConfig
from roost import RoostModel

SALTS = ("Na{}Cl", "Na{}I", "K{}Cl", "K{}I")


def small_target(n: int = 20) -> Target:
    formulas = np.array([salt.format(i) for i in range(1, n // 4 + 1) for salt in SALTS])
    return Target("metallic", "1", formulas, np.linspace(1, 2, len(formulas)), 10.0, 8)


class MeanModel:
    """Predicts the mean of what it was fitted to, plus a hundredth of its seed."""

    device = torch.device("cpu")

    def __init__(self, calls, name, seed):
        self.calls, self.name, self.seed = calls, name, seed

    def fit(self, dataset, unfinished):
        assert unfinished.is_dir()
        self.calls.append((self.name, self.seed, sorted(dataset.ids.tolist())))
        self.mean = dataset.y.mean() + 0.01 * self.seed
        return self

    def predict_uncertainty(self, dataset):
        return np.full((len(dataset), 1), self.mean), np.full((len(dataset), 1), 0.25)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A small target and peers that predict a mean; runs the command with a folder of its own."""
    target, calls = small_target(), []
    monkeypatch.setattr(compare, "wetlab_targets", lambda data_dir: [target])
    monkeypatch.setattr(peers, "peer_model", lambda name, seed: MeanModel(calls, name, seed))

    def run(*arguments: str) -> pd.DataFrame:
        calls.clear()
        assert main([*arguments, "--output-dir", str(tmp_path)]) == 0
        return pd.read_csv(tmp_path / "wetlab_scores.csv")

    run.calls, run.folder, run.target = calls, tmp_path, target
    return run


def test_peers_learn_from_whole_training_folds_and_are_recorded_as_themselves(quick):
    scores = quick("--models", "roost", "crabnet", "--seeds", "2")
    splits = quick.target.splits()
    assert quick.calls == [
        (name, seed, train.tolist())
        for name in ("roost", "crabnet")
        for seed in (0, 1)
        for train, _ in splits
    ]
    assert set(scores["model"]) == {"roost", "crabnet"} and set(scores["protocol"]) == {"transfer"}
    run = (quick.folder, "wetlab")
    names = ("roost", "crabnet")
    folders = [record_path(*run, name, "transfer", seed) for name in names for seed in (0, 1)]
    assert check_records(folders) == []
    names = [json.loads((folder / "info.json").read_text())["algorithm"] for folder in folders]
    assert names[0] == "Roost (seed 0)" and names[3] == "CrabNet (seed 1)"
    assert "Goodall" in (folders[0] / "info.json").read_text()
    values = quick.target.values
    predictions, std, _, settings = load_record(*run, "roost", "transfer", 1)["metallic"]
    errors = scores.query("model == 'roost' and seed == 1 and metric == 'mae'")["value"]
    for (train, test), error in zip(splits, errors, strict=True):
        mean = values[train].mean() + 0.01
        np.testing.assert_allclose(predictions[test], mean, rtol=1e-6)
        assert error == pytest.approx(10 * np.abs(values[test] - mean).mean(), rel=1e-5)
    assert settings["config"].startswith("aviary-models ") and settings["epochs"] == 100
    np.testing.assert_array_equal(std, np.full(len(values), 0.25))
    assert load_record(*run, "roost", "transfer", 2) == {}


def test_what_is_there_is_not_run_again_unless_the_peer_changes(quick, monkeypatch):
    quick("--models", "roost")
    assert len(quick.calls) == 5
    quick("--models", "roost")
    assert quick.calls == []
    other = {**peer_settings("roost"), "config": "aviary-models 99"}
    monkeypatch.setattr(paper_protocol, "peer_settings", lambda name: other)
    quick("--models", "roost")
    assert len(quick.calls) == 5


def test_what_is_trained_of_a_fold_is_kept_until_it_is_finished(quick, monkeypatch):
    fit, found = MeanModel.fit, []

    def interrupted(model, dataset, unfinished):
        found.append((unfinished / "state").exists())
        (unfinished / "state").touch()
        if len(found) == 3:
            raise KeyboardInterrupt
        return fit(model, dataset, unfinished)

    monkeypatch.setattr(MeanModel, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick("--models", "crabnet")
    quick("--models", "crabnet")
    assert found == [False, False, False, True, False, False]
    left = quick.folder / "unfinished" / "wetlab_metallic"
    assert left.is_dir() and not list(left.iterdir())


def test_settings_of_peers_name_all_that_makes_them():
    assert peer_settings("crabnet") == {
        "encoder": "none",
        "config": str(CrabNetConfig()),
        "epochs": 300,
    }
    recipe, longer = peer_settings("roost"), peer_settings("roost_500_epochs")
    assert recipe["epochs"] == 100 and longer == recipe | {"epochs": transfer.EPOCHS}
    for settings, name in ((recipe, "roost"), (longer, "roost_500_epochs")):
        assert peers.peer_model(name).epochs == settings["epochs"]


def test_the_command_ends_with_table_8_and_differences_to_polysrl(quick, capsys, monkeypatch):
    def predict_fold(target, split, encoder, seed, rates, unfinished):
        return target.values[split[1]] + 0.01, None, {"learning_rate": rates[0]}

    monkeypatch.setattr(paper_protocol.transfer, "predict_fold", predict_fold)
    monkeypatch.setattr(compare.paper_protocol, "predict_baseline", predict_mean)
    scores = quick("--models", "roost", "polysrl", "magpie_forest", "--seeds", "2")
    printed = capsys.readouterr().out
    table = printed[printed.index("## Table 8") :]
    means = scores[scores["metric"] == "mae"].groupby("model")["value"].mean()
    rows = [line.split(" | ") for line in table.splitlines()]
    cells = {row[0][2:]: row[3] for row in reversed(rows) if len(row) > 3}  # the upper of two
    for name in ("roost", "polysrl", "magpie_forest"):
        assert f"{means[name]:.3f}" in cells[name] and "[2" in cells[name]
    assert cells["crabnet"].startswith("not run")
    below = table[table.index("minus polysrl") :]
    assert f"| roost | {'not run | ' * 2}**+{means['roost'] - means['polysrl']:.3f}" in below
    assert "| magpie_forest |" in below
    assert [name for name in compare.PROTOCOL if compare.PROTOCOL[name] != "transfer"] == [
        "magpie_forest"
    ]


def predict_mean(model, targets, seeds, splits_of):
    return {t.name: np.full((len(seeds), len(t.values)), t.values.mean()) for t in targets}


def test_a_peer_that_is_not_installed_is_one_line(quick, monkeypatch, capsys):
    monkeypatch.setitem(PEERS, "roost", "no_such_package")
    assert lacking("crabnet") is None
    for arguments in (["--models", "roost"], ["--speed", "--models", "roost"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "no_such_package is not installed; the extra 'peers' has it" in error


def test_dry_runs_write_nothing(quick, capsys, monkeypatch):
    main(["--dry-run", "--models", "roost", "--output-dir", str(quick.folder)])
    monkeypatch.setattr(compare_speed, "wetlab_targets", lambda data_dir: [small_target(512)])
    given = ["--speed", "--dry-run", "--steps", "1", "--output-dir", str(quick.folder)]
    main([*given, "--models", "polysrl"])
    assert capsys.readouterr().out.count("DRY RUN") == 2
    assert quick.calls == [] and not list(quick.folder.iterdir())
    with pytest.raises(SystemExit):
        main([*given[:-4], "--steps", "2"])  # of four batches, three are to warm up
    assert "--steps is 2: must be at most 1" in capsys.readouterr().err


def test_small_tasks_are_those_of_the_paper_without_its_two_large_ones():
    assert len(SMALL_TASKS) == 5 and set(SMALL_TASKS) < set(PAPER_TASKS)
    assert not any("mp_" in name for name in SMALL_TASKS)


def training(n, inner=torch.optim.SGD, wrap=lambda optimizer: optimizer):
    """A training of ``n`` steps."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = wrap(inner([weight], lr=0.1))

    def train():
        for _ in range(n):
            weight.grad = torch.ones(1)
            optimizer.step()

    return train, weight


def test_steps_are_timed_after_the_first_and_training_is_broken_off():
    train, weight = training(100)
    seconds = step_seconds(train, 4)
    assert len(seconds) == 4 and min(seconds) > 0
    assert weight.item() == pytest.approx(1 - 0.1 * (WARM_UP + 4))
    train()
    assert weight.item() == pytest.approx(1 - 0.1 * (WARM_UP + 4 + 100))  # nothing breaks it off
    with pytest.raises(ValueError, match="ended after 5 steps of 7"):
        step_seconds(training(5)[0], 4)
    with pytest.raises(ZeroDivisionError):
        step_seconds(lambda: 1 / 0, 4)


def test_an_optimizer_around_another_does_not_count_twice():
    class Around(torch.optim.SGD):
        def __init__(self, inside):
            super().__init__(inside.param_groups[0]["params"], lr=0.0)
            self.inside = inside

        def step(self):
            self.inside.step()
            super().step()

    train, weight = training(100, wrap=Around)
    assert len(step_seconds(train, 4)) == 4
    assert weight.item() == pytest.approx(1 - 0.1 * (WARM_UP + 4))


def test_rates_are_formulas_by_median_seconds(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(compare_speed.time, "perf_counter", lambda: next(clock))
    fit = Contender(lambda target: 0, lambda x: 0, lambda x: 0, 7, learns_in_steps=False)
    steps = Contender(lambda target: 0, lambda x: training(9)[0](), lambda x: 0, 8)
    for name, side in (("fit", fit), ("steps", steps)):
        monkeypatch.setitem(compare_speed.CONTENDERS, name, lambda target, seed, side=side: side)
    table = measure(small_target(), ["fit", "steps"], turns=2, steps=3, seed=0)
    assert table.to_numpy().tolist() == [
        ["fit", 7, 20.0, 20.0, 10.0],
        ["steps", 8, 128.0, 20.0, 10.0],
    ]


def test_speed_of_polysrl_and_roost_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare_speed, "wetlab_targets", lambda data_dir: [small_target(600)])
    small = {"n_graph": 1, "elem_heads": 1, "cry_heads": 1}
    model = lambda name, seed, **settings: RoostModel(seed, **settings, **small)  # noqa: E731
    monkeypatch.setattr(compare_speed, "peer_model", model)
    given = ["--models", "polysrl", "roost", "--turns", "1", "--steps", "1"]
    assert main(["--speed", *given, "--output-dir", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "compare_speed.csv")
    assert table["model"].tolist() == ["polysrl", "roost"]
    assert (table["formulas"] == 512).all() and (table["batch_size"] == 128).all()
    assert (table[["training", "prediction", "from_formulas"]] > 0).all(axis=None)
    assert table["parameters"][1] == model("roost", 0).n_parameters
    assert "polysrl is faster than roost by the factors training" in capsys.readouterr().out


def test_cost_is_the_time_of_the_first_fold(monkeypatch, tmp_path, capsys):
    clock, seen = iter([0.0, 3.0, 10.0, 17.0, 20.0, 25.0, 30.0, 39.0]), []
    monkeypatch.setattr(compare_cost.time, "process_time", lambda: next(clock))
    found = [replace(small_target(n), name=name) for n, name in ((24, "b"), (40, "c"), (20, "a"))]
    monkeypatch.setattr(compare_cost, "wetlab_targets", lambda data_dir: found)

    def way(target, split, seed):
        seen.append((target.name, split[1].tolist() == target.splits()[0][1].tolist(), seed))

    monkeypatch.setattr(compare_cost, "WAYS", {"one": way, "two": way})
    assert main(["--cost", "--seed", "4", "--output-dir", str(tmp_path)]) == 0
    assert seen == [("a", True, 4), ("a", True, 4), ("c", True, 4), ("c", True, 4)]
    table = pd.read_csv(tmp_path / "compare_cost.csv")
    rows = [["one", "a", 16, 3], ["two", "a", 16, 7], ["one", "c", 32, 5], ["two", "c", 32, 9]]
    assert table[compare_cost.COLUMNS].to_numpy().tolist() == rows
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[1] == ["target", "a", "c"]
    assert shown[3:5] == [["one", "3.0", "5.0"], ["two", "7.0", "9.0"]]


def test_cost_is_that_of_whole_trainings(monkeypatch):
    target, epochs = small_target(40), []

    def trained(model, dataset, n, name, unfinished):
        epochs.append(n)
        return SimpleNamespace(
            predict=lambda dataset: dataset.y, predict_uncertainty=lambda dataset: [dataset.y] * 2
        )

    for module in (transfer, recipes):
        monkeypatch.setattr(module, "trained", trained)
    cost = {}
    for name in ("polysrl, rate chosen", "polysrl, rate given", "three encoders"):
        compare_cost.WAYS[name](target, target.splits()[0], seed=0)
        cost[name] = [epochs.pop() for _ in range(len(epochs))]
    assert list(cost.values()) == [[500] * 5, [500], [300]]
    assert set(compare_cost.WAYS) > {*PEERS, "magpie_forest"}
    assert compare_cost.forest(target, target.splits()[0], 0).shape == (8,)


def test_the_record_names_the_gpu_that_trained_a_fold(quick, monkeypatch):
    quick("--models", "roost", "crabnet")
    monkeypatch.setattr(MeanModel, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the GPU {device}")
    quick("--models", "crabnet", "--seed", "1")
    chosen = [
        load_record(quick.folder, "wetlab", "crabnet", "transfer", seed)["metallic"].params
        for seed in (0, 1)
    ]
    assert chosen == [[{}] * 5, [{"device": "the GPU cuda", "torch": torch.__version__}] * 5]


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_of_its_own_learns_a_fold(name, monkeypatch):
    target = small_target()
    split = (np.arange(16), np.arange(16, 20))
    tiny = CrabNetConfig(width=32, layers=1, heads=2, feed_forward=32, head=(32, 16))
    few = {name: {"epochs": 1} for name in PEERS} | {"crabnet": {"epochs": 20, "config": tiny}}
    kind = peers.peer_model
    monkeypatch.setattr(peers, "peer_model", lambda name, seed: kind(name, seed, **few[name]))
    predictions, std, params = peers.predict_peer_fold(target, split, name, 3)
    expected = kind(name, 3, **few[name]).fit(dataset_of(target, split[0]))
    np.testing.assert_array_equal(
        predictions, expected.predict(dataset_of(target, split[1])).ravel()
    )
    assert predictions.shape == (4,) and np.isfinite(predictions).all() and params == {}
    assert std.shape == (4,) and (std > 0).all()

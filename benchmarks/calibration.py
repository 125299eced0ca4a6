"""Intervals one can trust: calibrated uncertainty on the wet-lab targets and matbench_dielectric.

    python benchmarks/calibration.py --data-dir DATA

Five folds by Matbench's rule. A training fold is split into five inner parts, and each is predicted
by a model of the other four; these residuals alone calibrate. The test fold is predicted by the
mean of the five models (cross-conformal prediction, Vovk 2015). A single validation part of a tenth
would be 15 rows of the smallest target, too few for a quantile of 95 %; this way no row is lost and
every training row calibrates. The mean of five is a little better than each of them, so intervals
are a little too wide rather than too narrow. Of several numbers of epochs each training fold takes
the one with the smallest residuals.

Three methods (``intervals.py``), with and without the variance of the polymorphs: ``scaled``
(Gaussian), ``normalized`` and ``constant`` conformal. Writes ``calibration.csv``, in units of the
targets. Of the settings it names encoder and protocol only; unless the others are the default ones,
results are printed and not written. Finished folds are kept, ``--again`` makes them anew.
``--peers`` scores in the same way what Roost and CrabNet say themselves in the records of
``compare.py``, as they say it and calibrated by the errors of the other folds, and trains nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from command_line import chosen_targets, refusing, runner_parser
from folds import FoldStore, output_folder
from graph_data import dataset_of
from intervals import Constant, Intervals, Laplace, Normalized, Scaled, evaluate
from paper_records import load_record
from peers import PEERS
from scores import merge_rows
from sklearn.model_selection import KFold
from submission import read_benchmark
from targets import N_FOLDS, Target, matbench_target, wetlab_targets
from tasks import find_data_dir, load_task
from tqdm import tqdm

from polysrl_dc import PolySRLModel
from polysrl_dc.recalibration import Calibration

#: Name -> kind of intervals, and the standard deviation that they are made from.
METHODS: dict[str, tuple[type[Intervals], str]] = {
    "scaled": (Scaled, "std"),
    "scaled, polymorphs": (Scaled, "total_std"),
    "normalized": (Normalized, "std"),
    "normalized, polymorphs": (Normalized, "total_std"),
    "constant": (Constant, "std"),
}
#: Of which each training fold takes one: 300 rows want more, 4,000 are learned by heart.
EPOCHS = (60, 300)
COLUMNS = ["encoder", "protocol", "target", "fold", "method", "metric", "value"]
#: Of the printed tables; ``kept`` is the MAE without the 20 % that are most uncertain.
PRINTED = {
    "coverage_50": "in 50 %",
    "coverage_80": "in 80 %",
    "coverage_95": "in 95 %",
    "width_95": "width 95 %",
    "equal_width_95": "constant, as many inside",
    "crps": "CRPS",
    "miscalibration_area": "miscal. area",
    "ause": "AUSE",
    "mae": "MAE",
    "mae_kept": "MAE of 80 %",
}


@dataclass(frozen=True)
class Settings:
    """What the predictions depend on besides the data.

    Attributes
    ----------
    encoder : str
        Name, folder or file.
    fine_tune : bool
        Train the encoder, too; else the head only.
    epochs, ensemble : int
        Of each model, in batches of the target's size, and its members.
    inner_folds : int
        Parts of a training fold; each is predicted by a model of the others.
    seed : int
    device : str, optional
        Does not count as a setting of the results.
    """

    encoder: str = "polysrl-mp"
    fine_tune: bool = False
    epochs: int = EPOCHS[-1]
    ensemble: int = 2
    inner_folds: int = 5
    seed: int = 0
    device: str | None = None

    def model(self, batch_size: int, number: int = 0) -> PolySRLModel:
        """An unfitted model; those of different numbers differ in their seeds."""
        return PolySRLModel(
            pretrained=self.encoder,
            freeze_encoder=not self.fine_tune,
            n_ensemble=self.ensemble,
            batch_size=batch_size,
            learning_rate=3e-3 if self.fine_tune else 1e-3,
            weight_decay=0.3 if self.fine_tune else 0.0,
            seed=self.seed + number,
            device=self.device,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that change with the predictions; the encoder counts by its weights."""
        weights = self.model(2).model.encoders.state_dict()
        digest = hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in weights.values()))
        values = {**asdict(self), "encoder": digest.hexdigest()}
        del values["device"]
        return values


def cross_predict(
    target: Target, train: np.ndarray, test: np.ndarray, settings: Settings
) -> dict[str, np.ndarray]:
    """Predict a training fold out of fold, and the test fold by the same models.

    Returns
    -------
    dict
        ``mean, std, total_std``, each of shape (n_train,): the row's label was not known to the
        model. ``test_mean, test_std, test_total_std``, each of shape (n_test,): the mean over
        the models, of the standard deviations as root mean square.
    """
    names = ("mean", "std", "total_std")
    found = {name: np.zeros(len(train)) for name in names}
    tests: dict[str, list[np.ndarray]] = {name: [] for name in names}
    folds = KFold(settings.inner_folds, shuffle=True, random_state=settings.seed).split(train)
    for number, (part, rest) in enumerate(folds):
        model = settings.model(target.batch_size, number)
        model.fit(dataset_of(target, train[part]), settings.epochs, checkpoint_interval=0)
        for name, values in predict(model, dataset_of(target, train[rest])).items():
            found[name][rest] = values
        for name, values in predict(model, dataset_of(target, test)).items():
            tests[name].append(values)
    found["test_mean"] = np.mean(tests["mean"], axis=0)
    for name in names[1:]:
        found[f"test_{name}"] = np.sqrt(np.mean(np.square(tests[name]), axis=0))
    return found


def predict(model: PolySRLModel, dataset: Any) -> dict[str, np.ndarray]:
    """Mean, and standard deviation without and with the Gaussians of formulas, each (n,)."""
    mean, std = model.predict_uncertainty(dataset)
    _, total = model.predict_uncertainty(dataset, polymorphs=True)
    return {"mean": mean[:, 0], "std": std[:, 0], "total_std": total[:, 0]}


def fold_predictions(
    target: Target, fold: int, settings: Settings, store: FoldStore, again: bool = False
) -> dict[str, np.ndarray]:
    """What :func:`cross_predict` finds, kept in a store."""
    train, test = target.splits()[fold]
    ids = [str(row) for row in test]
    record = None if again else store.load(fold, ids)
    if record is None:
        found = cross_predict(target, train, test, settings)
        kept = {name: values.tolist() for name, values in found.items()}
        store.save(fold, ids, kept.pop("test_mean"), kept.pop("test_std"), kept)
        return found
    kept = {**record["params"], "test_mean": record["predictions"], "test_std": record["std"]}
    return {name: np.array(values) for name, values in kept.items()}


def score_fold(target: Target, fold: int, predictions: dict[str, np.ndarray]) -> pd.DataFrame:
    """Calibrate on the training fold and score on the test fold: ``method, metric, value``."""
    train, test = target.splits()[fold]
    residuals = target.values[train] - predictions["mean"]
    errors = target.values[test] - predictions["test_mean"]
    scores = [
        _scores(fold, name, kind(residuals, predictions[std]), errors, predictions[f"test_{std}"])
        for name, (kind, std) in METHODS.items()
    ]
    return pd.concat(scores, ignore_index=True)


def _scores(
    fold: int, method: str, intervals: Intervals, errors: np.ndarray, std: np.ndarray
) -> pd.DataFrame:
    values = pd.Series(evaluate(intervals, errors, std), name="value").rename_axis("metric")
    return values.reset_index().assign(fold=fold, method=method)[COLUMNS[3:]]


def score_own(
    target: Target,
    model: str,
    protocol: str,
    predictions: np.ndarray,
    std: np.ndarray,
    method: str = "its own",
) -> pd.DataFrame:
    """Scores of the standard deviations (n,) that a model has predicted along, as it says them."""
    errors = target.values - predictions
    scores = [
        _scores(fold, method, Laplace(), errors[test], std[test])
        for fold, (_, test) in enumerate(target.splits())
    ]
    table = pd.concat(scores, ignore_index=True)
    return table.assign(encoder=model, protocol=protocol, target=target.name)


def calibrated_by_other_folds(
    target: Target, predictions: np.ndarray, std: np.ndarray
) -> np.ndarray:
    """Standard deviations (n,), those of each fold calibrated by the errors of the other folds.

    As ``PolySRLModel.calibrate`` does, without training anything: the models that predicted the
    other folds have learned from the rows of this one, so it is a little too favourable.
    """
    errors, own, found = (target.values - predictions)[:, None], std[:, None], np.empty(len(std))
    for rest, test in target.splits():
        fitted = Calibration.fit(
            errors[rest], own[rest], np.isfinite(errors[rest]), polymorphs=False
        )
        found[test] = fitted.apply(own[test])[:, 0]
    return found


def record_coverage(folder: Path, data_dir: Path | None) -> pd.DataFrame:
    """How many values the 95 % intervals of a submission hold: a row for each task and fold.

    Parameters
    ----------
    folder : path
        With ``results.json.gz``.
    data_dir : path, optional
        Of the labels, as :func:`load_task` finds them.

    Returns
    -------
    pandas.DataFrame
        Columns task, fold, n, coverage_95 and width_95 (label units); tasks without uncertainty
        are left out.
    """
    rows = []
    for name, recorded in read_benchmark(folder).tasks_map.items():
        truth = None
        for fold in recorded.folds:
            found = recorded.results[recorded.folds_map[fold]]
            if found["uncertainty"] is None:
                continue
            if truth is None:
                task = load_task(name, data_dir)
                truth = task.df[task.metadata.target]
            ids = list(found["data"])
            low, high = (
                np.array([found["uncertainty"][sample][end] for sample in ids])
                for end in ("ci_lower", "ci_upper")
            )
            values = truth.loc[ids].to_numpy(float)
            inside = ((low <= values) & (values <= high)).mean()
            rows.append((name, fold, len(ids), inside, (high - low).mean()))
    return pd.DataFrame(rows, columns=["task", "fold", "n", "coverage_95", "width_95"])


def keep(output_dir: Path, scores: pd.DataFrame) -> None:
    """Write scores in place of earlier ones of the same encoder, target and fold."""
    merge_rows(output_dir / "calibration.csv", scores[COLUMNS], COLUMNS[:4])


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over the folds: a row for each target and method, a column for each metric."""
    wide = table.pivot_table("value", ["target", "method"], "metric", "mean", sort=False)
    return wide[list(PRINTED)]


def findings(wide: pd.DataFrame) -> list[str]:
    """What the table says of each method, a line each."""
    lines = []
    constant = wide["width_95"].xs("constant", level="method")
    for method in METHODS:
        of = wide.xs(method, level="method")
        good, width = of["coverage_95"].between(0.93, 0.97), of["width_95"]
        narrower, sharper = (width < constant).sum(), (width < of["equal_width_95"]).sum()
        kept = of["mae_kept"] / of["mae"]
        lines.append(
            f"{method}: intervals of 95 % hold 93 to 97 % on {good.sum()} of {len(of)} targets; "
            f"width {(width / constant).mean():.2f} of conformal ones of one width, less on "
            f"{narrower}, and less than of those that hold as many on {sharper}; MAE without the "
            f"most uncertain fifth {kept.mean():.2f} of all, less on {(kept < 0.9999).sum()}; AUSE "
            f"{of['ause'].mean():.3f}, miscalibration area {of['miscalibration_area'].mean():.3f}"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Predict what is missing, score and print."""
    parser = runner_parser(__doc__)
    add, default = parser.add_argument, Settings()
    add("--targets", nargs="+", metavar="NAME", help="default: all ten")
    add("--encoder", default=default.encoder, help="name, folder or file")
    add("--fine-tune", action="store_true", help="train the encoder, too")
    add("--epochs", nargs="+", type=int, default=EPOCHS, help="chosen on each training fold")
    for name in ("ensemble", "inner_folds", "seed"):
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    add("--peers", nargs="+", choices=PEERS, metavar="PEER", help="score their records instead")
    add("--submission", type=Path, metavar="FOLDER", help="only say what its intervals hold")
    add("--device")
    add("--threads", type=int, default=1)
    add("--again", action="store_true", help="also what is finished")
    add("--dry-run", action="store_true", help="say what would be done, and stop")
    arguments = parser.parse_args(argv)
    with refusing(parser):
        data_dir = find_data_dir(arguments.data_dir)
        if arguments.submission:
            coverage = record_coverage(arguments.submission, data_dir).groupby("task", sort=False)
            print(coverage.mean().drop(columns="fold").to_markdown(floatfmt=".3f"))
            return
        asked = chosen_targets(parser, all_targets(data_dir), arguments.targets)
    given = {name: getattr(arguments, name) for name in asdict(default)}
    trials = [Settings(**{**given, "epochs": epochs}) for epochs in arguments.epochs]
    made = ", ".join(arguments.peers) if arguments.peers else "; ".join(map(str, trials))
    print(f"{len(asked)} targets, {made}")
    if arguments.dry_run:
        return
    torch.set_num_threads(arguments.threads)
    with output_folder(arguments.output_dir):
        if arguments.peers:
            tables = run_peers(asked, arguments)
        else:
            tables = {arguments.encoder: run(asked, trials, arguments)}
    for name, table in tables.items():
        wide = means(table)
        printed = wide.rename(columns=PRINTED).reset_index()
        print(f"{name}\n\n{printed.to_markdown(index=False, floatfmt='.3f')}\n")
        if not arguments.peers:
            print("\n".join(findings(wide)))


def run_peers(targets: Sequence[Target], arguments: argparse.Namespace) -> dict[str, pd.DataFrame]:
    """Scores of seed 0 of each peer on the targets that it has a record of."""
    tables = {}
    for peer in arguments.peers:
        records = {
            suite: load_record(arguments.output_dir, suite, peer, "transfer", 0)
            for suite in {target.suite for target in targets}
        }
        known = []
        for target in targets:
            record = records[target.suite].get(target.name)
            if record is not None and record.std is not None:
                predictions, own = record.predictions, record.std
                calibrated = calibrated_by_other_folds(target, predictions, own)
                run = (target, peer, "transfer", predictions)
                parts = [score_own(*run, own), score_own(*run, calibrated, "calibrated")]
                known.append(pd.concat(parts))
        print(f"{peer}: {len(known)} of {len(targets)} targets are recorded with uncertainty")
        if known:
            tables[peer] = pd.concat(known, ignore_index=True)
            keep(arguments.output_dir, tables[peer])
    return tables


def all_targets(data_dir: Path | None) -> list[Target]:
    """The nine of the wet lab and matbench_dielectric, the smallest first."""
    targets = [*wetlab_targets(data_dir), matbench_target("matbench_dielectric", data_dir)]
    return sorted(targets, key=lambda target: len(target.values))


def run(
    targets: Sequence[Target], trials: Sequence[Settings], arguments: argparse.Namespace
) -> pd.DataFrame:
    """Scores of all folds, written target by target; trials differ in their epochs."""
    named = {name: getattr(arguments, name) for name in ("encoder", "fine_tune", "device")}
    default = list(trials) == [Settings(**named, epochs=epochs) for epochs in EPOCHS]
    if not default:
        print("not the default settings: calibration.csv stays as it is")
    fingerprints, tables = [settings.fingerprint() for settings in trials], []
    for target in targets:
        start = time.monotonic()
        name = f"calibration_{target.name}"
        keys = [{**common, "batch_size": target.batch_size} for common in fingerprints]
        stores = [FoldStore(arguments.output_dir / "folds", name, key) for key in keys]
        scores, chosen = [], []
        for fold in tqdm(range(N_FOLDS), desc=target.name, unit="fold"):
            found = [
                fold_predictions(target, fold, settings, store, arguments.again)
                for settings, store in zip(trials, stores, strict=True)
            ]
            residuals = [mean_residual(target, fold, predictions) for predictions in found]
            best = int(np.argmin(residuals))
            scores.append(score_fold(target, fold, found[best]))
            chosen.append(trials[best].epochs)
        table = pd.concat(scores, ignore_index=True)
        protocol = "transfer" if arguments.fine_tune else "representation"
        table = table.assign(encoder=arguments.encoder, protocol=protocol, target=target.name)
        if default:
            keep(arguments.output_dir, table)
        tables.append(table)
        print(f"{target.name}: epochs {chosen}, {time.monotonic() - start:.0f} s")
    return pd.concat(tables, ignore_index=True)


def mean_residual(target: Target, fold: int, predictions: dict[str, np.ndarray]) -> float:
    """Mean absolute residual of a training fold, each row by models that have not seen it."""
    train, _ = target.splits()[fold]
    return float(np.abs(target.values[train] - predictions["mean"]).mean())


if __name__ == "__main__":
    main()

"""The page of results: cells, intervals, tests, what is missing, claims, and what is written."""

import numpy as np
import pandas as pd
import pytest
from claims import CLAIMS, MATBENCH, PAPER_MODELS, SUPERVISED, WETLAB, ZT, Claim, better, verdict
from crabnet_matbench import PROTOCOL, TASKS
from labels import MP_PROPERTIES
from paired import holm, read_paper
from paper_models import MODELS
from paper_records import save_predictions
from rates import chosen_rates
from recipe_sizes import SUITE, protocol
from recipes import AS_COMMAND, AS_ROOST, FIRST, FIXED_RATE, RECOMMENDED
from results import (
    ALL,
    COMPARED,
    CURVES,
    GROUPED,
    MATBENCH_RECIPES,
    MATBENCH_TRANSFER,
    OFFICIAL,
    PUBLICATIONS,
    RECIPES,
    TABLES,
    ZT_TABLES,
    Cell,
    cells_of,
    numbers_of,
    reached,
    shortfall,
)
from scipy import stats
from scores import COLUMNS, LEADERBOARD
from summarize import LEAK, difference_lines, main
from targets import Target

#: Errors relative to the random start.
FACTORS = {
    "rand_init": 1.0,
    "graphcl": 1.01,
    "mp_band_gap": 0.97,
    "mp_formation_energy": 0.95,
    "infomax3d": 0.9,
    "without_sampling": 0.85,
    "polysrl": 0.8,
    "magpie_ridge": 1.2,
    "magpie_forest": 1.1,
}
#: Of the models that have no encoder of ours.
PEER_FACTORS = {"roost": 1.05, "roost_500_epochs": 1.0, "crabnet": 1.3}
#: Relative to the first of them.
RECIPE_FACTORS = {FIRST: 1.0, "single, frozen": 0.9, RECOMMENDED: 0.8, FIXED_RATE: 0.95}
BY_NAME = {table.name: table for table in TABLES}


def scores_of(table, factors, seeds=3, folds=5, metrics=("mae", "r2")):
    """Made-up scores of a table's targets; errors grow with the number of the target and fold."""
    rows = []
    for number, task in enumerate(table.tasks):
        for place, (model, factor) in enumerate(factors.items()):
            for seed in range(seeds):
                for fold in range(folds):
                    wiggle = 0.001 * ((3 * fold + 2 * seed + fold * place) % 11)
                    error = factor * (0.2 + 0.02 * number) + 0.01 * fold + wiggle
                    key = (table.suite, task, table.protocol, model, seed, fold)
                    values = {"mae": error, "r2": 1 - error}
                    rows += [(*key, metric, values[metric]) for metric in metrics]
    return pd.DataFrame(rows, columns=COLUMNS)


def screening_of(table, factors):
    rows = []
    for task in ZT:
        for model, factor in factors.items():
            found = {"precision": 0.9, "recall": 0.8, "f1": 1 - factor / 2, "n_true": 12.0}
            found["n_predicted"] = 9.0
            key = (table.suite, task, table.protocol, model, 0, -1)
            rows += [(*key, *item) for item in found.items()]
    return pd.DataFrame(rows, columns=COLUMNS)


def write_scores(folder, factors=FACTORS, seeds=3):
    """All files, complete for three seeds."""
    wetlab = [list(CURVES.values())[-1], BY_NAME["Table 2"], GROUPED, PUBLICATIONS[0]]
    wetlab += list(CURVES.values())[:-1]
    matbench = [BY_NAME["Table 6"], MATBENCH_TRANSFER]
    zt = list(ZT_TABLES.values())
    folder.mkdir(parents=True, exist_ok=True)
    for name, tables in (("wetlab_scores", wetlab), ("paper_scores", matbench)):
        parts = [scores_of(table, factors, seeds) for table in tables]
        transfer = [table for table in tables if table.protocol == "transfer"]
        parts += [scores_of(table, PEER_FACTORS, seeds) for table in transfer]
        pd.concat(parts).to_csv(folder / f"{name}.csv", index=False)
    recipes = ((RECIPES, RECIPE_FACTORS), (MATBENCH_RECIPES, {AS_COMMAND: 0.7, AS_ROOST: 0.9}))
    parts = [scores_of(table, of, seeds) for table, of in recipes]
    pd.concat(parts).to_csv(folder / "recipes.csv", index=False)
    official = [
        ("matbench", task, PROTOCOL, model, 0, fold, "mae", error + 0.1 * fold)
        for task in TASKS
        for model, error in (("crabnet", 0.51), ("published", 0.5))
        for fold in range(5)
    ]
    pd.DataFrame(official, columns=COLUMNS).to_csv(folder / "crabnet_scores.csv", index=False)
    sizes = [
        (SUITE, task, protocol(rows), recipe, 0, 0, metric, value)
        for task, metric in (("matbench_expt_gap", "mae"), ("matbench_expt_is_metal", "rocauc"))
        for rows in (1000, 16000)
        for recipe, value in (("single", 0.7), ("frozen", 0.6), ("fine-tuned", 0.8))
        if (rows, recipe) != (16000, "frozen")
    ]
    pd.DataFrame(sizes, columns=COLUMNS).to_csv(folder / "recipe_sizes.csv", index=False)
    scores_of(OFFICIAL, {"PolySRL": 0.9}, 1).to_csv(folder / "scores.csv", index=False)
    parts = [scores_of(table, factors, seeds) for table in zt]
    parts += [screening_of(table, factors) for table in zt]
    pd.concat(parts).to_csv(folder / "thermoelectrics.csv", index=False)


def write_paper(tmp_path):
    """Data folder with the paper's tables beside it; its values are the errors of FACTORS."""
    (tmp_path / "data" / "matbench").mkdir(parents=True)
    records = scores_of(OFFICIAL, {"CrabNet": 1.0, "alignn": 0.5}, 1, metrics=["mae"])
    records = records.rename(columns={"model": "algorithm"})[LEADERBOARD]
    records.to_csv(tmp_path / "data" / "matbench" / "leaderboard.csv", index=False)
    (tmp_path / "paper").mkdir()
    rows = []
    for table in TABLES[:-1]:
        for number, task in enumerate(table.tasks):
            for model in MODELS:
                error = FACTORS[model] * (0.2 + 0.02 * number)
                value = 1 - error if table.metric == "r2" else error
                source = (
                    7
                    if table.name == "Table 1" and model == "without_sampling"
                    else table.sources[0]
                )
                rows.append((source, table.protocol, model, task, table.metric, value, 0.012))
    for task in WETLAB:
        rows += [(8, "transfer", model, task, "mae", 0.9, 0.1) for model in SUPERVISED]
    columns = ["table", "protocol", "model", "dataset", "metric", "mean", "std"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "paper" / "tables.csv", index=False)
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    return write_paper(tmp_path)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A folder with all scores, and its page."""
    folder = write_paper(tmp_path_factory.mktemp("complete"))
    write_scores(folder / "out")
    return folder, run(folder)


def run(folder, *arguments):
    """The page that the command writes."""
    given = ["--data-dir", str(folder / "data"), "--output-dir", str(folder / "out"), *arguments]
    assert main(given) == 0
    page = folder / "out" / "RESULTS.md"
    return page.read_text() if page.exists() else None


def part_of(page, title):
    """A section of the page."""
    (found,) = [part for part in page.split("\n## ")[1:] if part.startswith(title)]
    return found


def p_of(differences):
    """Of the t-test, its t made smaller as the training rows of folds overlap."""
    n = len(differences)
    t = stats.ttest_1samp(differences, 0).statistic / np.sqrt(1 + n / 4)
    return 2 * stats.t.sf(abs(t), n - 1)


def test_means_intervals_and_p_are_those_of_the_folds_after_averaging_over_seeds():
    rng = np.random.default_rng(0)
    ours, base = rng.random((2, 3)), rng.random((2, 3))
    rows = [
        ("wetlab", "band_gap", "transfer", model, seed, fold, "mae", values[seed, fold])
        for model, values in (("polysrl", ours), ("rand_init", base))
        for seed in range(2)
        for fold in range(3)
    ]
    cells = cells_of(pd.DataFrame(rows, columns=COLUMNS), "rand_init")
    cell = cells["wetlab", "transfer", "mae", "band_gap", "polysrl"]
    folds, other = ours.mean(axis=0), base.mean(axis=0)
    t = 4.302652729696142  # 97.5 % of Student's t with two degrees of freedom
    root = (1 / 3 + 1 / 4) ** 0.5  # Nadeau and Bengio's: test rows are 1/4 of the training rows
    assert cell.mean == pytest.approx(ours.mean())
    assert cell.half == pytest.approx(t * np.std(folds, ddof=1) * root)
    assert (cell.seeds, cell.folds, cell.size) == (2, 3, "2\N{MULTIPLICATION SIGN}3")
    assert cell.difference == pytest.approx((folds - other).mean())
    assert cell.difference_half == pytest.approx(t * np.std(folds - other, ddof=1) * root)
    assert cell.p == pytest.approx(p_of(folds - other))
    assert np.isnan(cells["wetlab", "transfer", "mae", "band_gap", "rand_init"].p)


def test_only_seeds_and_folds_of_both_models_are_paired():
    scores = scores_of(BY_NAME["Table 2"], {"rand_init": 1.0, "polysrl": 0.9})
    first = scores[(scores["model"] != "polysrl") | (scores["seed"] == 0)]
    key = ("wetlab", "transfer", "mae", "band_gap", "polysrl")
    cell = cells_of(first, "rand_init")[key]
    errors = first[(first["metric"] == "mae") & (first["task"] == "band_gap")].query("seed == 0")
    ours, base = (
        errors[errors["model"] == model]["value"].to_numpy() for model in ("polysrl", "rand_init")
    )
    assert cell.p == pytest.approx(p_of(ours - base))
    assert cell.p != pytest.approx(cells_of(scores, "rand_init")[key].p)
    one_fold = cells_of(first[first["fold"] == 0], "rand_init")[key]
    assert np.isnan(one_fold.p) and np.isnan(one_fold.half)


@pytest.mark.parametrize(
    ("p", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 0.04 alone is below 0.03 x 2
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
        ([0.6, np.nan, 0.02, 0.7], [1.0, np.nan, 0.06, 1.0]),
        ([np.nan], [np.nan]),
        ([], []),
    ],
)
def test_holms_correction_steps_down_and_never_falls(p, corrected):
    assert holm(p) == pytest.approx(corrected, nan_ok=True)


def test_the_last_columns_count_before_and_after_the_correction():
    table = BY_NAME["Table 2"]
    changes = [(-0.1, 0.001), (-0.1, 0.006), (-0.1, 0.02), (-0.1, 0.3), (-0.1, np.nan)]
    changes += [(0.1, 0.004), (0.1, 0.04), (0.0, 0.9), (np.nan, np.nan)]
    cells = {
        ("wetlab", "transfer", "mae", task, "polysrl"): Cell(1.0, 0.1, 3, 5, change, 0.1, p)
        for task, (change, p) in zip(table.tasks, changes, strict=True)
    }
    # seven tests: 0.001 x 7, 0.004 x 6, 0.006 x 5, 0.02 x 4
    (row,) = [line for line in difference_lines(cells, table, "rand_init") if "polysrl" in line]
    assert row.endswith("| 5 (3; 2) | 2 (2; 1) |")


def test_a_complete_page_shows_ours_and_the_papers_and_names_nothing_as_missing(complete):
    folder, page = complete
    assert "not run" not in page and "Not run" not in page
    assert "Everything was run with at least 3 seeds and 5 folds" in page
    table = part_of(page, "Table 1")
    cells = cells_of(pd.read_csv(folder / "out" / "wetlab_scores.csv"), "rand_init")
    cell = cells["wetlab", "representation", "mae", "band_gap", "polysrl"]
    change = 100 * (cell.mean / 0.16 - 1)
    assert (
        f"| polysrl | **{cell.mean:.3f}** ± {cell.half:.3f}<br>0.160 (0.012), {change:+.1f} % |"
        in table
    )
    assert f"**{cell.difference:+.3f} ± {cell.difference_half:.3f}**<br>p < 0.001" in table
    assert "| 11 (11; 11) | 0 (0; 0) |" in table and table.count("**0.") == 11
    r2 = part_of(page, "Table 4")
    assert (
        f"**{1 - cell.mean:.3f}** ± {cell.half:.3f}<br>0.840 (0.012), {0.16 - cell.mean:+.3f}" in r2
    )
    assert "| minus polysrl |" in part_of(page, "Table 7")
    for title in (
        "Matbench, transfer",
        "wet lab in grouped",
        "ESTM in folds by publication, representation, MAE",
    ):
        title = f"Not in the paper: {title}"
        assert "| polysrl | **" in part_of(page, title)


def test_published_models_are_compared_with_polysrl_fold_by_fold(complete):
    folder, page = complete
    means, differences = (
        [line for line in part.splitlines() if line.startswith("| ")]
        for part in part_of(page, "Table 8").split("| minus polysrl |")
    )
    means = means[2:]
    assert [row.split(" | ")[0][2:] for row in means] == list(COMPARED)
    scores = pd.read_csv(folder / "out" / "wetlab_scores.csv")
    errors = scores.query("metric == 'mae' and task == 'band_gap'").set_index(["model", "protocol"])
    ours, roost, forest = (
        errors.loc[key, "value"].groupby(errors.loc[key, "fold"]).mean()
        for key in (
            ("polysrl", "transfer"),
            ("roost", "transfer"),
            ("magpie_forest", "representation"),
        )
    )
    assert f"| roost | {roost.mean():.3f} ± " in means[2] and "<br>0.900 (0.100)" in means[2]
    assert f"| magpie_forest | {forest.mean():.3f} ± " in means[-1]
    paired = {row.split(" | ")[0][2:]: row for row in differences}
    p = p_of(roost - ours)
    assert f"| roost | **{(roost - ours).mean():+.3f} ± " in paired["roost"] and p < 0.001
    assert f"{(forest - ours).mean():+.3f} ± " in paired["magpie_forest"]
    small = part_of(page, "Not in the paper: Matbench, beside published models")
    assert "| crabnet | " in small and "mp_gap" not in small and "log_gvrh" in small
    assert "roost_500_epochs" not in small


def test_crabnet_stands_beside_its_published_scores(complete, folder):
    part = part_of(complete[1], "CrabNet beside its published scores")
    assert "| expt_gap | 5 | 0.7100 | 0.7000 | 1.0143 |" in part and "log_gvrh" in part
    write_scores(folder / "out", seeds=1)
    path = folder / "out" / "crabnet_scores.csv"
    table = pd.read_csv(path).query("task == 'matbench_expt_gap' and fold < 2")
    table.to_csv(path, index=False)
    page = run(folder)
    counts = "2 of 5 folds of expt_gap, 0 of 5 folds of dielectric, 0 of 5 folds of log_gvrh"
    assert f"- CrabNet beside its published scores: {counts}\n" in page
    part = part_of(page, "CrabNet beside its published scores")
    assert "| expt_gap | 2 | 0.5600 | 0.5500 | 1.0182 |" in part and "dielectric" not in part
    path.unlink()
    assert "Not run." in part_of(run(folder), "CrabNet beside its published scores")


def test_our_record_stands_beside_those_of_models_that_see_compositions_only(complete, folder):
    part = part_of(complete[1], "Not in the paper: Matbench, official folds, finetune, MAE")
    means, differences = part.split("| minus CrabNet |")
    models = [line.split(" | ")[0][2:] for line in means.splitlines() if line.startswith("| ")]
    assert models[2:] == ["CrabNet", "PolySRL"] and "| expt_gap |" in means
    assert "| PolySRL | **-0.0" in differences and "| 8 (8; 8) | 0 (0; 0) |" in differences
    write_scores(folder / "out")
    path = folder / "out" / "scores.csv"
    table = pd.read_csv(path).query("task != 'matbench_jdft2d'")
    table.query("task != 'matbench_log_kvrh' or fold < 3").to_csv(path, index=False)
    page = run(folder)
    assert "- Matbench, official folds: fewer than 5 folds of log_kvrh, jdft2d" in page
    (folder / "data" / "matbench" / "leaderboard.csv").unlink()
    part = part_of(run(folder), "Not in the paper: Matbench, official folds, finetune, MAE")
    assert "| PolySRL | " in part and "CrabNet" not in part


def test_recipes_are_compared_with_three_of_them_and_other_models(complete):
    _, page = complete
    part = part_of(page, "Not in the paper: wet lab, ways to train, recipe")
    means, _, rest = part.partition("| minus single |")
    assert f"| {RECOMMENDED} | **0." in means and "| roost | " in means
    first, _, recommended = rest.partition(f"| minus {RECOMMENDED} |")
    assert "| single, frozen | **-0.0" in first and "| 9 (9; 9) | 0 (0; 0) |" in first
    assert "| single, frozen | **+0.0" in recommended and "| roost | **+" in recommended
    recommended, _, fixed = recommended.partition(f"| minus {FIXED_RATE} |")
    assert "| magpie_forest | " in recommended and "| 0 (0; 0) | 9 (9; 9) |" in recommended
    assert "| single | **+0.0" in fixed and f"| {RECOMMENDED} | **-0.0" in fixed
    part = part_of(page, "Not in the paper: Matbench, ways to train, recipe")
    means, _, differences = part.partition(f"| minus {AS_COMMAND} |")
    assert f"| {AS_COMMAND} | **0." in means and "| magpie_forest | 0." in means
    differences, _, same_epochs = differences.partition(f"| minus {AS_ROOST} |")
    for part_of_page, other in ((differences, AS_ROOST), (same_epochs, "roost")):
        assert f"| {other} | **+0.0" in part_of_page and "| 0 (0; 0) | 5 (5; 5) |" in part_of_page
    assert f"| {AS_COMMAND} | **-0.0" in same_epochs
    assert "| single |" not in part and "roost" not in part_of(page, "Table 1")


def test_recipes_stand_beside_one_another_by_the_number_of_rows(complete, folder):
    title = "Not in the paper: ways to train by the number of rows, Matbench"
    lines = part_of(complete[1], title).splitlines()
    assert "| task | score | rows | frozen | fine-tuned | single |" in lines
    assert "| expt_gap | MAE | 1,000 | **0.6000** | 0.8000 | 0.7000 |" in lines
    assert "| expt_gap | MAE | 16,000 | - | 0.8000 | **0.7000** |" in lines
    assert "| expt_is_metal | ROC AUC | 1,000 | 0.6000 | **0.8000** | 0.7000 |" in lines
    write_scores(folder / "out")
    (folder / "out" / "recipe_sizes.csv").unlink()
    assert title not in run(folder)


def test_errors_of_peers_are_the_papers_only_where_they_have_not_been_run(folder):
    paper = read_paper(folder / "data")
    key = ("wetlab", "transfer", "mae", "metallic", "roost")
    ours, theirs = numbers_of({key: Cell(0.123, 0.0, 3, 5)}, paper)
    assert ours["Table 2"].loc["roost", "metallic"] == 0.123
    assert ours["Table 2"].loc["roost", "band_gap"] == 0.9
    assert theirs["Table 2"].loc["roost", "metallic"] == 0.9


def test_rates_of_transfer_are_those_of_the_records(folder):
    write_scores(folder / "out")
    assert "Learning rates" not in run(folder)
    formulas = np.array([f"Na{n}Cl" for n in range(1, 21)])
    target = Target("band_gap", "eV", formulas, np.arange(20.0), 1.0, 8)
    second = [0.51, 0.52, 0.6, 0.7, 0.5]
    params = [
        {"learning_rate": rate, "validation_mae": {"0.005": 9.0, "0.0001": error, "0.001": 0.5}}
        for rate, error in zip([1e-3, 1e-3, 1e-3, 1e-3, 1e-4], second, strict=True)
    ]
    about = (folder / "out", target, "polysrl", "transfer")
    save_predictions(*about, 0, target.values, params, {}, "run_wetlab.py")
    save_predictions(*about, 1, target.values, [{"learning_rate": 5e-3}] * 5, {}, "run_wetlab.py")
    part = part_of(run(folder), "Learning rates that transfer chose")
    assert "| model | gap |" in part and "| polysrl | 10 10 10 10 1<br>4.0 % |" in part
    assert "less than 5 % on 60 % of 5 folds" in part
    params[0] = {"learning_rate": 1e-4}  # given, not chosen
    save_predictions(*about, 0, target.values, params, {}, "run_wetlab.py")
    assert chosen_rates(folder / "out")["fold"].tolist() == [1, 2, 3, 4]


def test_learning_curves_and_screening(complete):
    _, page = complete
    curves = part_of(page, "Not in the paper: learning curves")
    (row,) = [line for line in curves.splitlines() if line.startswith("| polysrl ")]
    assert "10 % / 25 % / 50 % / 100 %" in curves and row.count("**") == 2 * 4 * 9
    assert "+0.0 / +0.0" not in row and row.split("|")[-2].count("-") == 4
    screening = part_of(page, "ZT and screening, transfer")
    assert "**0.600** | 9 / 12" in screening and "0.500 | 9 / 12" in screening


def test_recall_of_structures_stands_beside_other_ways_to_rank(folder, capsys):
    write_scores(folder / "out")
    title = "Not in the paper: structures found"
    assert title not in run(folder)
    path = folder / "out" / "retrieval.csv"
    path.write_text("k,all,chance\n1,0.331,0.000141\n100,0.953,0.014\n")
    found = part_of(run(folder), title)
    assert "| k | all | chance |" in found
    assert "| 1 | 33.1 | 0.0141 |" in found and "| 100 | 95.3 | 1.4 |" in found
    path.write_text("rank,all\n1,0.3\n")
    options = ["--data-dir", str(folder / "data"), "--output-dir", str(folder / "out")]
    assert main(options) == 2
    assert "Index k invalid" in capsys.readouterr().err


def test_missing_and_shortened_parts_are_named(folder):
    out = folder / "out"
    out.mkdir()
    table = list(CURVES.values())[-1]
    short = scores_of(table, {"polysrl": 0.8}, seeds=1)
    whole = scores_of(table, {"rand_init": 1.0})
    whole = whole[(whole["task"] != "metallic")]
    pd.concat([short, whole]).to_csv(out / "wetlab_scores.csv", index=False)
    page = run(folder)
    top = page[: page.index("## In short")]
    assert "Table 2: wet lab, transfer: not run" in top and "Table 6: Matbench" in top
    assert "rand_init: not run for glass, ZT300, ZT600" in top
    assert "polysrl: 1\N{MULTIPLICATION SIGN}5 for gap, form." in top
    assert "ways to train, recipe: not run" in top
    assert "in grouped folds, representation: not run" in top and "10 % of the" in top
    row = next(line for line in page.splitlines() if line.startswith("| polysrl | "))
    assert "[1\N{MULTIPLICATION SIGN}5]<br>0.160 (0.012)" in row and "not run<br>" in row
    assert "Table 2, transfer, 9 targets: not run" in page
    assert "Not run." in part_of(page, "ZT and screening, representation")
    assert "## Learning" not in page and "Not run." in part_of(page, "Not in the paper: learning")


def test_shortfall_sees_seeds_that_lack_folds_and_metrics_that_are_missing():
    table = BY_NAME["Table 2"]
    scores = scores_of(table, dict.fromkeys(table.models, 1.0))
    assert shortfall(cells_of(scores, "rand_init"), table) == ""
    lost = (scores["model"] == "graphcl") & (scores["seed"] == 1) & (scores["fold"] == 4)
    text = shortfall(cells_of(scores[~lost], "rand_init"), table)
    assert text == "graphcl: 3\N{MULTIPLICATION SIGN}4"
    lost = (scores["task"] == "band_gap") & (scores["metric"] == "r2")
    text = shortfall(cells_of(scores[~lost], "rand_init"), table)
    assert text == f"{', '.join(table.models)}: not run for gap"
    recipes = scores_of(RECIPES, {"single": 1.0, "single, frozen": 0.9}, seeds=1)
    text = shortfall(cells_of(recipes, "single"), RECIPES)
    assert text == "single, *single, frozen*: 1\N{MULTIPLICATION SIGN}5"


def test_claims_hold_and_flip_with_the_numbers(complete, folder):
    held = part_of(complete[1], "Claims")
    beats = (
        "| Table 2 | PolySRL consistently transfers positively: it beats the random start. | all "
    )
    assert f"{beats}| **holds** | 9 of 9 | 9 of 9 |" in held
    write_scores(folder / "out", {**FACTORS, "rand_init": 0.8, "polysrl": 1.0})
    page = run(folder)
    names = ", ".join(WETLAB.values())
    assert f"{beats}| **does not hold** | 0 of 9; not {names} | 9 of 9 |" in page
    assert page.count("**holds**") < held.count("**holds**")
    judged = len(CLAIMS) - 1  # one rests on scores that are not fair
    tally = f"Claims of the paper: {page.count('**holds**')} of {judged} hold, 1 not judged"
    assert tally in page


def test_equal_errors_are_no_better_and_one_screening_may_be_won_by_3d_infomax():
    errors = pd.DataFrame({"estm600_zt": 0.5}, index=list(PAPER_MODELS))
    assert better(errors, "polysrl", ["rand_init"]).tolist() == [False]
    (claim,) = (claim for claim in CLAIMS if "but for 3D Infomax" in claim.text)
    errors.loc[["polysrl", "infomax3d"]] = [[0.4], [0.3]]
    assert claim.check({"screening": errors}).tolist() == [True]
    errors.loc["rand_init"] = 0.3
    assert claim.check({"screening": errors}).tolist() == [False]


@pytest.mark.parametrize(
    ("rule", "values", "word"),
    [
        ("all", [True, True, np.nan], "not judged"),
        ("all", [False, True, np.nan], "does not hold"),
        ("most", [True, True, np.nan], "holds"),
        ("most", [True, False, np.nan], "not judged"),
        ("most", [True, False], "does not hold"),
        ("some", [False, np.nan], "not judged"),
        ("some", [False, True], "holds"),
        ("some", [False, False], "does not hold"),
        ("paper", [True, False], "holds"),
        ("paper", [False, False], "does not hold"),
    ],
)
def test_rules_of_claims(rule, values, word):
    items = {
        "ours": pd.Series(values, dtype=object),
        "paper": pd.Series([True, False], dtype=object),
    }
    claim = Claim("here", "text", rule, lambda numbers: items[numbers])
    found, count, published = verdict(claim, "ours", "paper")
    assert found == word and published == "1 of 2"
    assert count.startswith(f"{values.count(True)} of {sum(v is not np.nan for v in values)}")


def test_better_needs_all_numbers_and_takes_no_tie():
    errors = pd.DataFrame({"a": [1.0, 2.0], "b": [1.0, 1.0], "c": [1.0, np.nan]}, index=["x", "y"])
    assert better(errors, "x", ["y"]).tolist()[:2] == [True, False]
    assert np.isnan(better(errors, "x", ["y"])["c"])


def test_the_papers_own_numbers_agree_with_its_claims(data_dir):
    paper = read_paper(data_dir)
    if paper.empty:
        pytest.skip("no paper/tables.csv beside the data")
    rows = []
    for table in TABLES:
        for (model, task), value in table.published(paper)["mean"].items():
            rows.append(((table.suite, table.protocol, table.metric, task, model), value))
    cells = {
        (*where, task, model): Cell(value, 0.0, 3, 5, fair=MP_PROPERTIES.get(model) != task)
        for (*where, task, model), value in rows
    }
    ours, theirs = numbers_of(cells, paper)
    words = {claim: verdict(claim, ours, theirs)[0] for claim in CLAIMS}
    without = [claim.where for claim, word in words.items() if word != "holds"]
    assert without == ["Table 6", "Figure 8", "Figure 8"]  # no fair score; no F1 in its text
    nine = reached(cells, paper, BY_NAME["Table 1"], tuple(WETLAB))
    assert "9 of 9 (the random start 0)" in nine


def test_reached_compares_at_three_digits_and_names_the_misses(folder):
    paper = read_paper(folder / "data")
    table, tasks = BY_NAME["Table 6"], tuple(MATBENCH)
    key = ("paper", "representation", "mae")
    values = {tasks[0]: 0.1604, tasks[1]: 0.1776}
    cells = {(*key, task, "polysrl"): Cell(value, 0.0, 3, 5) for task, value in values.items()}
    cells[(*key, tasks[1], "rand_init")] = Cell(0.1764, 0.0, 3, 5)
    text = reached(cells, paper, table, tasks[:3])
    assert text == (
        "Table 6, representation, 3 targets: 1 of 3 (the random start 1); "
        "at or below: perovskites 0.160 (0.160); above: dielectric 0.178 (0.176); not run: log_gvrh"
    )


def test_the_same_scores_in_any_order_give_the_same_bytes(complete, folder):
    write_scores(folder / "out")
    for path in (folder / "out").glob("*.csv"):
        pd.read_csv(path).sample(frac=1, random_state=1).to_csv(path, index=False)
    assert run(folder) == complete[1]


def test_dry_run_prints_the_tally_and_writes_nothing(folder, capsys):
    write_scores(folder / "out")
    before = sorted((folder / "out").iterdir())
    assert run(folder, "--dry-run") is None
    printed = capsys.readouterr().out
    assert "DRY RUN" in printed and "Claims of the paper" in printed
    assert sorted((folder / "out").iterdir()) == before


def test_another_baseline_other_models_and_the_footnote(folder):
    write_scores(folder / "out", {**FACTORS, "another": 0.7})
    page = run(folder, "--baseline", "graphcl")
    assert "| minus graphcl |" in page and "| minus rand_init |" not in page
    models = [line.split(" | ")[0][2:] for line in part_of(page, "Table 6").splitlines()]
    assert [name for name in models if name in {*ALL, "another"}][:10] == [*ALL, "another"]
    assert f"† {LEAK}" in part_of(page, "Table 6")
    assert part_of(page, "Table 6").count("†") == 5  # two cells of each table and the note


def test_a_model_that_has_learned_the_labels_is_neither_best_nor_compared(folder):
    factors = {"rand_init": 1.0, "mp_formation_energy": 0.5, "polysrl": 0.8}
    write_scores(folder / "out", factors)
    lines = [line.strip("| ").split(" | ") for line in part_of(run(folder), "Table 6").splitlines()]
    rows, learned = {}, 1 + BY_NAME["Table 6"].tasks.index("matbench_mp_e_form")
    for model, *cells in lines:
        rows.setdefault(model, []).append([model, *cells])
    means, differences = rows["mp_formation_energy"]
    assert "†" in means[learned] and "**" not in means[learned] and "**" in means[learned - 1]
    assert "**" in rows["polysrl"][0][learned]
    assert differences[learned] == "†" and differences[-2:] == ["6 (6; 6)", "0 (0; 0)"]


def test_what_cannot_be_read_ends_with_a_line(folder, capsys):
    given = ["--output-dir", str(folder / "out")]
    assert main(given) == 2 and "wetlab_scores.csv" in capsys.readouterr().err
    (folder / "out").mkdir()
    (folder / "out" / "wetlab_scores.csv").write_text("suite,task\nwetlab,band_gap\n")
    assert main(given) == 2 and "'protocol'" in capsys.readouterr().err
    assert main([*given, "--data-dir", str(folder / "none")]) == 2


def test_without_the_papers_tables_the_page_says_so(folder, monkeypatch):
    monkeypatch.delenv("POLYSRL_DATA", raising=False)
    write_scores(folder / "out")
    assert main(["--output-dir", str(folder / "out")]) == 0
    page = (folder / "out" / "RESULTS.md").read_text()
    assert "no `paper/tables.csv` beside the data folder" in page
    assert "| polysrl | **" in part_of(page, "Table 1")

"""One page of all results beside the paper's: its Tables 1, 2 and 4 to 8, and its claims.

    python benchmarks/summarize.py --data-dir DATA

reads the tables of scores in the output folder and writes ``RESULTS.md`` there. Nothing is trained;
what is missing, or was run with fewer than three seeds or five folds, is named at the top.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from claims import CLAIMS, MATBENCH, NOT_JUDGED, PROPERTIES, RULES, SHORT, WETLAB, ZT, verdict
from command_line import runner_parser
from crabnet_matbench import beside_published
from paired import LEVEL, holm, read_paper
from rates import UNIT, chosen_rates, rate_cells
from recipe_sizes import by_rows
from recipes import AS_COMMAND, AS_ROOST, FIRST, FIXED_RATE, RECOMMENDED
from results import (
    CURVES,
    FILES,
    GROUPED,
    MATBENCH_8,
    MATBENCH_RECIPES,
    MATBENCH_TRANSFER,
    N_SEEDS,
    NOT_RUN,
    OFFICIAL,
    PUBLICATIONS,
    RECIPES,
    TABLE_8,
    TABLES,
    TIMES,
    ZT_TABLES,
    Cell,
    Cells,
    Table,
    best_of,
    cells_of,
    compared,
    numbers_of,
    ordered,
    reached,
    read_scores,
    records_beside,
    shortfall,
)
from scores import leaderboard
from targets import N_FOLDS
from tasks import DataNotFoundError, find_data_dir

from polysrl_dc.checkpoints import write_atomic

PAGE = "RESULTS.md"
RETRIEVAL = "retrieval.csv"
METRICS = {"mae": "MAE", "r2": "R²", "precision": "precision", "recall": "recall", "f1": "F1"}
#: Of encoders that ``pretrain.py`` trains on the labels of a whole table.
DAGGER = "\N{DAGGER}"
LEAK = "pretrained on the labels of this very table, test rows included: no fair score"
#: Two rates whose validation errors differ by less are hardly told apart by some dozen rows.
NARROW = 0.05
BY_NAME = {table.name: table for table in TABLES}

INTRODUCTION = """Made by `python benchmarks/summarize.py`; no result is typed by hand.

The paper's two protocols on its targets. Representation: the encoder is frozen and a head is
trained on its means. Transfer: both are trained. All models share the same five folds (Matbench's
rule). Encoders differ only in their pretraining: none (rand_init), contrasting augmented formulas
(graphcl), DFT labels (mp_band_gap, mp_formation_energy), structures (infomax3d), and structures of
all polymorphs (polysrl, and without_sampling, for which the paper's values are those of its Table
7). The Magpie models fit tabulated features without an encoder. Roost (package aviary-models) and
CrabNet (written anew, `benchmarks/crabnet.py`; beside its published scores below) are trained on
each training fold by their own recipes, untuned; roost_500_epochs is Roost trained for the 500
epochs of the transfer protocol, not for its own 100. Rows beneath them are further encoders of
ours. What is called a recipe is a way to train a model of this package on a whole training fold,
within which it chooses nothing (batches, epochs and encoders of the recipes were taken after a
look at test errors, those of the peers were not); where its standard deviation is calibrated and
not cross-validated, on four fifths of it. *polysrl train*: the recipe that the command of that name
takes for so many rows, on Matbench *frozen* for jdft2d, *fine-tuned* for dielectric, else *large*.
*Single, batches of 128*: one model in as many epochs, 100, and the batches of Roost's recipe.
*Mean of three seeds*: the predictions of three models of the transfer protocol, averaged. The other
models there are those of Table 8.

Columns: gap (eV), form. (formation enthalpy, eV/atom {x} 10), glass (T_rg {x} 10); {sigma} (ln
S/m), {kappa} (ln W/mK) and S (min-max scaled {x} 10) are electrical conductivity, thermal
conductivity and Seebeck coefficient of ESTM at 300 and 600 K, and ZT the figure of merit from the
three. Matbench: without the prefix `matbench_`; log_kvrh {x} 10, jdft2d the logarithm.

Cells: our mean ± half of its 95 % interval, the best of a column in bold; beneath, the paper's
mean (its standard deviation) and how far ours is from it, in per cent or, for R², as a difference.
A mark [seeds{x}folds] says that fewer than {seeds} seeds or {folds} folds were run.

Intervals and tests: seeds repeat the same folds, so they are no further samples. Scores are
averaged over the seeds first; the interval is that of Student's t over the means of the {folds}
folds, and it contains how much the folds differ. Folds share most of their training rows, so the
variance of their mean is taken as 1/{folds} + 1/4 of theirs, not 1/{folds} (test rows are a fourth
of the training rows; where fewer are trained on, as of Table 6, more; Nadeau and Bengio, Machine
Learning 52, 239, 2003). To compare models, look at the second table of each pair: paired
differences on the same seeds and folds, their 95 % interval, and p of a paired t-test with this
variance (bold: p < {level}). Its last columns count the targets where the model is better and worse
than the baseline, in brackets those with p < {level}, and behind the semicolon those of them that
stay so when p is corrected for the tests of the row (Holm, Scandinavian Journal of Statistics 6,
65, 1979; targets that share materials, as those of ESTM do, may be tested together): 9 (6; 2) is
better on nine targets, p < {level} on six, corrected on two. Bold is not corrected: of many tests
about one in twenty would be bold without any effect. Each encoder was pretrained once: what a
second run changes is in no interval and no p (`PRETRAINING.md`, "The same run on another machine").
In transfer the rate of a fold is chosen once, with the first seed, so the seeds share that choice.
"""


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, and the empty one after it."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def mean_text(cell: Cell | None, best: float) -> str:
    """The mean, in bold if it is fair and the best at the digits shown."""
    if cell is None:
        return NOT_RUN
    text = f"{cell.mean:.3f}"
    return f"**{text}**" if cell.fair and text == f"{best:.3f}" else text


def cell_text(cell: Cell | None, best: float) -> str:
    """Mean, half width, the size of a run that is short, and a mark if the score is not fair."""
    if cell is None:
        return NOT_RUN
    half = "" if np.isnan(cell.half) else f" ± {cell.half:.3f}"
    marks = f" [{cell.size}]" * bool(cell.size) + f" {DAGGER}" * (not cell.fair)
    return mean_text(cell, best) + half + marks


def paper_text(cell: Cell | None, paper: pd.Series, metric: str) -> str:
    """The line beneath: mean (std) of the paper, and how far ours is from it."""
    text = f"<br>{paper['mean']:.3f} ({paper['std']:.3f})"
    if cell is None:
        return text
    if metric == "mae":
        return f"{text}, {100 * (cell.mean / paper['mean'] - 1):+.1f} %"
    return f"{text}, {cell.mean - paper['mean']:+.3f}"


def score_lines(cells: Cells, paper: pd.DataFrame, table: Table) -> list[str]:
    """A table of means beside the paper's."""
    rows, theirs, lines = table.rows(cells), table.published(paper), []
    best = best_of(list(rows.values()), table.metric)
    for model, row in rows.items():
        line = [model]
        for task, cell, top in zip(table.tasks, row, best, strict=True):
            text = cell_text(cell, top)
            if (model, task) in theirs.index:
                text += paper_text(cell, theirs.loc[(model, task)], table.metric)
            line.append(text)
        lines.append(line)
    marked = any(DAGGER in text for line in lines for text in line)
    notes = [f"{DAGGER} {LEAK}", ""] if marked else []
    return markdown(["model", *(SHORT[task] for task in table.tasks)], lines) + notes


def difference_text(cell: Cell | None) -> str:
    """Difference to the baseline, half width, and p; of a score that is not fair, its mark."""
    if cell is None or np.isnan(cell.difference):
        return NOT_RUN
    if not cell.fair:
        return DAGGER
    if np.isnan(cell.p):
        return f"{cell.difference:+.3f}"
    text = f"{cell.difference:+.3f} ± {cell.difference_half:.3f}"
    p = "p < 0.001" if cell.p < 0.001 else f"p = {cell.p:.3f}"
    return f"**{text}**<br>{p}" if cell.p < LEVEL else f"{text}<br>{p}"


def difference_lines(cells: Cells, table: Table, baseline: str) -> list[str]:
    """A table of paired differences to the baseline; nothing if there is none."""
    sign, lines = 1 if table.metric == "mae" else -1, []
    for model, row in table.rows(cells).items():
        pairs = [cell for cell in row if cell and cell.fair and not np.isnan(cell.difference)]
        if pairs:
            change, p = np.array([(sign * cell.difference, cell.p) for cell in pairs]).T
            counts = [
                f"{group.sum()} ({(p[group] < LEVEL).sum()}; {(holm(p)[group] < LEVEL).sum()})"
                for group in (change < 0, change > 0)
            ]
            lines.append([model, *map(difference_text, row), *counts])
    head = [f"minus {baseline}", *(SHORT[task] for task in table.tasks), "better", "worse"]
    return markdown(head, lines) if lines else []


def section(cells: Cells, paper: pd.DataFrame, table: Table, baseline: str) -> list[str]:
    """Heading, means and paired differences of a table."""
    title = f"{table.name}: {table.title}, {table.protocol}, {METRICS[table.metric]}"
    if not table.rows(cells):
        return [f"## {title}", "", "Not run.", ""]
    means = score_lines(cells, paper, table)
    return [f"## {title}", "", *means, *difference_lines(cells, table, baseline)]


def official_lines(records: Cells, paper: pd.DataFrame) -> list[str]:
    """Our record on the official folds of Matbench beside those of others."""
    heading, empty, *tables = section(records, paper, OFFICIAL, "CrabNet")
    note = (
        "One run of each fold: an ensemble of four, fine-tuned by `run_matbench.py` "
        "(`matbench_v0.1_PolySRL`), and the published records of models that see compositions "
        "only, some of which cover some of the tasks."
    )
    return [heading, empty, note, "", *tables]


def rate_lines(chosen: pd.DataFrame) -> list[str]:
    """Learning rates of transfer, of :func:`rates.chosen_rates`; nothing if there are none."""
    if chosen.empty:
        return []
    close = (chosen["margin"] < NARROW).mean()
    lines = [
        "## Learning rates that transfer chose, wet lab",
        "",
        f"The rates of the folds {TIMES} {UNIT:g}, chosen on a fifth of the training rows; "
        "beneath, by how much the second best of the four was worse there, the median over the "
        f"folds. It was worse by less than {100 * NARROW:.0f} % on {100 * close:.0f} % of "
        f"{len(chosen)} folds.",
        "",
    ]
    texts = rate_cells(chosen).fillna(NOT_RUN)
    rows = [[model, *row] for model, row in zip(texts.index, texts.to_numpy(), strict=True)]
    return lines + markdown(["model", *texts.columns], rows)


def recipe_lines(scores: pd.DataFrame, paper: pd.DataFrame) -> list[str]:
    """Ways to train, and the models of Table 8 and its like of Matbench beneath them."""
    recipes = scores[scores["protocol"] == RECIPES.protocol]
    if len(recipes):
        recipes = pd.concat([recipes, compared(scores).assign(protocol=RECIPES.protocol)])
    lines = section(cells_of(recipes, FIRST), paper, RECIPES, FIRST)
    for recipe in (RECOMMENDED, FIXED_RATE):
        lines += difference_lines(cells_of(recipes, recipe), RECIPES, recipe)
    lines += section(cells_of(recipes, AS_COMMAND), paper, MATBENCH_RECIPES, AS_COMMAND)
    return lines + difference_lines(cells_of(recipes, AS_ROOST), MATBENCH_RECIPES, AS_ROOST)


def size_lines(scores: pd.DataFrame) -> list[str]:
    """The package's ways to train by the number of rows; nothing if they were not run."""
    table = by_rows(scores)
    if table.empty:
        return []
    rows = []
    for (task, metric, n_rows), values in table.iterrows():
        best = values.min() if metric == "mae" else values.max()
        texts = ["-" if np.isnan(value) else f"{value:.4f}" for value in values]
        bold = [f"**{text}**" if text == f"{best:.4f}" else text for text in texts]
        rows.append([_bare(task), METRICS.get(metric, "ROC AUC"), f"{n_rows:,}", *bold])
    return [
        "## Not in the paper: ways to train by the number of rows, Matbench",
        "",
        "Recipes of `polysrl train` on so many rows of the first training fold, scored on other "
        "rows of it; one run each.",
        "",
        *markdown(["task", "score", "rows", *table.columns], rows),
    ]


def reproduction_lines(scores: pd.DataFrame) -> list[str]:
    """CrabNet beside its own published scores."""
    table = beside_published(scores)
    rows = [
        [_bare(task), f"{row.folds:.0f}", *(f"{row[name]:.4f}" for name in table.columns[1:4])]
        for task, row in table.iterrows()
        if row.folds
    ]
    return [
        "## CrabNet beside its published scores: Matbench, official folds, MAE",
        "",
        *(markdown(["task", *table.columns[:4]], rows) if rows else ["Not run.", ""]),
    ]


def read_retrieval(output_dir: Path) -> pd.DataFrame:
    """What ``retrieval.py`` has written, by k; empty if it has not.

    Raises
    ------
    ValueError
        The file is no such table.
    """
    path = output_dir / RETRIEVAL
    return pd.read_csv(path, index_col="k") if path.exists() else pd.DataFrame()


def retrieval_lines(recall: pd.DataFrame) -> list[str]:
    """Recall of structures beside that of ways to rank without an encoder; nothing if not run."""
    if recall.empty:
        return []
    lines = [
        "## Not in the paper: structures found for formulas held out of pretraining",
        "",
        "Formulas with one of their structures among the k likeliest candidates, %: all of them, "
        "those with one known structure and those with several. The encoder of structures sees "
        "sites and distances, neither elements nor their proportions. The other columns, over all "
        "formulas, are ways to rank that need no encoder, see `retrieval.py`. Who is told the "
        "proportions (AB2) of each candidate knows what the encoder has to find out; in the last "
        "column it is told them too.",
        "",
    ]
    rows = [
        [str(k), *(f"{100 * x:.3g}" for x in row)]
        for k, row in zip(recall.index, recall.to_numpy(), strict=True)
    ]
    return lines + markdown(["k", *recall.columns], rows)


def curve_lines(cells: Cells, baseline: str) -> list[str]:
    """MAE by part of the training rows, and its mean change from the baseline."""
    rows = {part: table.rows(cells) for part, table in CURVES.items()}
    parts, full = list(rows), list(rows)[-1]
    models = ordered(model for part in parts if part != full for model in rows[part])
    lines = [f"## Not in the paper: learning curves, wet lab, representation, {METRICS['mae']}", ""]
    if not models:
        return [*lines, "Not run.", ""]
    texts: dict[str, list[list[str]]] = {model: [] for model in models}
    for table in CURVES.values():
        best = best_of([table.row(cells, model) for model in models], "mae")
        start = table.row(cells, baseline)
        for model in models:
            row = table.row(cells, model)
            changes = [
                cell.difference / base.mean
                for cell, base in zip(row, start, strict=True)
                if cell is not None and base is not None
            ]
            change = np.mean(changes) if len(changes) == len(row) else np.nan
            texts[model].append([mean_text(*pair) for pair in zip(row, best, strict=True)])
            texts[model][-1].append("-" if np.isnan(change) else f"{100 * change:+.1f}")
    lines += [
        f"Each cell: {' / '.join(parts)} of the training rows; the test rows stay the same. Last: "
        f"mean change from {baseline} over the targets, %.",
        "",
    ]
    head = ["model", *(SHORT[task] for task in CURVES[full].tasks), "change"]
    body = [[model, *map(" / ".join, zip(*texts[model], strict=True))] for model in models]
    return lines + markdown(head, body)


def screening_lines(cells: Cells, table: Table) -> list[str]:
    """Errors of ZT, and how well materials of high ZT are found, of one protocol."""
    models = list(table.rows(cells))
    lines = [f"## ZT and screening, {table.protocol}", ""]
    if not models:
        return [*lines, "Not run.", ""]
    head, columns = ["model"], []
    for task, name in ZT.items():
        found = {
            metric: [cells.get((table.suite, table.protocol, metric, task, m)) for m in models]
            for metric in (*METRICS, "n_predicted", "n_true")
        }
        for metric, title in METRICS.items():
            (best,) = best_of([[cell] for cell in found[metric]], metric)
            head.append(f"{name} {title}")
            columns.append([mean_text(cell, best) for cell in found[metric]])
        head.append("found / there")
        counts = zip(found["n_predicted"], found["n_true"], strict=True)
        columns.append([f"{a.mean:.3g} / {b.mean:.3g}" if a and b else NOT_RUN for a, b in counts])
    lines += [
        "MAE and R² as above; precision, recall and F1 of finding the rows of high ZT, all folds "
        "together, means over the seeds; *found / there*: rows predicted to be such, and "
        "rows that are.",
        "",
    ]
    return lines + markdown(head, [list(row) for row in zip(models, *columns, strict=True)])


def claims_of(cells: Cells, paper: pd.DataFrame) -> tuple[list[str], str]:
    """The table of claims, and the tally."""
    ours, theirs = numbers_of(cells, paper)
    rows, words = [], []
    for claim in CLAIMS:
        word, count, published = verdict(claim, ours, theirs)
        words.append(word)
        rows.append([claim.where, claim.text, claim.rule, f"**{word}**", count, published])
    held, undecided = words.count("holds"), words.count(NOT_JUDGED)
    judged = len(words) - undecided
    tally = f"Claims of the paper: {held} of {judged} hold, {undecided} {NOT_JUDGED}"
    lines = [
        "## Claims of the paper",
        "",
        "Each is judged by mean errors, without regard to p and to how many seeds a mean has. Not "
        f"judged: where a number is missing, or no fair score ({DAGGER}). Rule, ours to choose: in "
        "how many comparisons it has to be so; "
        f"{'; '.join(f'*{rule}*: {meaning}' for rule, meaning in RULES.items())}.",
        "",
        *markdown(["from", "claim", "rule", "verdict", "ours", "the paper's own"], rows),
    ]
    return lines, tally


def missing_lines(
    cells: Cells, beside: Cells, records: Cells, paper: pd.DataFrame, scores: pd.DataFrame
) -> list[str]:
    """What the page lacks, a line for each part.

    ``beside`` are the cells of Table 8, ``records`` those of Matbench's official folds.
    """
    parts = [BY_NAME[name] for name in ("Table 1", "Table 2", "Table 6")]
    parts += [
        MATBENCH_TRANSFER,
        ZT_TABLES["transfer"],
        GROUPED,
        PUBLICATIONS[0],
        *list(CURVES.values())[:-1],
        RECIPES,
        MATBENCH_RECIPES,
    ]
    found = {table: shortfall(cells, table) for table in parts}
    found |= {table: shortfall(beside, table) for table in (TABLE_8, MATBENCH_8)}
    lines = [f"- {t.name}: {t.title}, {t.protocol}: {text}" for t, text in found.items() if text]
    ours = dict(zip(OFFICIAL.tasks, OFFICIAL.row(records, OFFICIAL.models[0]), strict=True))
    short = [SHORT[task] for task, cell in ours.items() if not cell or cell.folds < N_FOLDS]
    if short:
        lines.append(f"- {OFFICIAL.title}: fewer than {N_FOLDS} folds of {', '.join(short)}")
    folds = beside_published(scores)["folds"]
    if (folds < N_FOLDS).any():
        counts = [f"{n} of {N_FOLDS} folds of {_bare(task)}" for task, n in folds.items()]
        lines.append(f"- CrabNet beside its published scores: {', '.join(counts)}")
    if paper.empty:
        lines.append("- The paper's values: no `paper/tables.csv` beside the data folder")
    if not lines:
        return [f"Everything was run with at least {N_SEEDS} seeds and {N_FOLDS} folds.", ""]
    return [f"**Missing, or shorter than the protocol (seeds{TIMES}folds):**", "", *lines, ""]


def page(
    scores: pd.DataFrame,
    paper: pd.DataFrame,
    published: pd.DataFrame,
    chosen: pd.DataFrame,
    recall: pd.DataFrame,
    baseline: str,
) -> tuple[str, str]:
    """The whole page, and its tally.

    Parameters
    ----------
    scores : pandas.DataFrame
        Of :func:`results.read_scores`.
    paper : pandas.DataFrame
        Of :func:`paired.read_paper`.
    published : pandas.DataFrame
        Of :func:`scores.leaderboard`.
    chosen : pandas.DataFrame
        Of :func:`rates.chosen_rates`.
    recall : pandas.DataFrame
        Of :func:`read_retrieval`.
    baseline : str
        Model of the paired differences.
    """
    cells, beside = cells_of(scores, baseline), cells_of(compared(scores), "polysrl")
    records = cells_of(records_beside(scores, published), "CrabNet")
    claims, tally = claims_of(cells, paper)
    goals = [("Table 1", WETLAB), ("Table 2", WETLAB), ("Table 1", ZT), ("Table 6", MATBENCH)]
    summary = [f"- {tally}."]
    for name, tasks in goals:
        line = reached(cells, paper, BY_NAME[name], tuple(tasks))
        summary.append(f"- At or below the paper's PolySRL: {line}.")
    files = [
        f"- `{name}`: {len(rows):,} scores of {rows['model'].nunique()} models, seeds "
        f"{_listed(rows['seed'])}, folds {_listed(rows['fold'][rows['fold'] >= 0])}"
        for name, rows in scores.groupby("file")
    ]
    signs = {"x": TIMES, "sigma": PROPERTIES["electrical_conductivity"]}
    signs["kappa"] = PROPERTIES["thermal_conductivity"]
    introduction = INTRODUCTION.format(seeds=N_SEEDS, folds=N_FOLDS, level=LEVEL, **signs)
    lacking = missing_lines(cells, beside, records, paper, scores)
    lines = ["# Results", "", *lacking, "## In short", "", *summary, ""]
    lines += ["## What is compared", "", introduction, "Read:", "", *files, ""]
    for table in TABLES[:-1]:
        lines += section(cells, paper, table, baseline)
    frozen = scores.query("suite == 'wetlab' and protocol == 'representation' and metric == 'mae'")
    lines += section(cells_of(frozen, "polysrl"), paper, BY_NAME["Table 7"], "polysrl")
    lines += section(beside, paper, TABLE_8, "polysrl")
    for table in (MATBENCH_TRANSFER, GROUPED, *PUBLICATIONS):
        lines += section(cells, paper, table, baseline)
    lines += section(beside, paper, MATBENCH_8, "polysrl")
    lines += official_lines(records, paper) + reproduction_lines(scores)
    lines += rate_lines(chosen) + recipe_lines(scores, paper) + size_lines(scores)
    lines += curve_lines(cells, baseline)
    for table in ZT_TABLES.values():
        lines += screening_lines(cells, table)
    lines += retrieval_lines(recall)
    return "\n".join([*lines, *claims]).rstrip() + "\n", "\n".join(summary)


def _bare(task: str) -> str:
    return task.removeprefix("matbench_")


def _listed(values: pd.Series) -> str:
    return ", ".join(str(int(value)) for value in sorted(values.unique()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 if a file cannot be read as scores."""
    parser = runner_parser(__doc__, "the paper's tables are in ../paper beside it; or POLYSRL_DATA")
    add = parser.add_argument
    add("--baseline", default="rand_init", help="model of the paired differences")
    add("--dry-run", action="store_true", help="print the tally; write nothing")
    arguments = parser.parse_args(argv)
    try:
        scores = read_scores(arguments.output_dir)
        data_dir = find_data_dir(arguments.data_dir)
        paper, published = read_paper(data_dir), leaderboard(data_dir)
        chosen = chosen_rates(arguments.output_dir)
        recall = read_retrieval(arguments.output_dir)
    except (ValueError, DataNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if scores.empty:
        where = f"none of {', '.join(FILES)} in {arguments.output_dir} has a score"
        print(f"error: {where}; run_wetlab.py makes the first", file=sys.stderr)
        return 2
    text, tally = page(scores, paper, published, chosen, recall, arguments.baseline)
    if arguments.dry_run:
        print("DRY RUN: nothing is written")
    else:
        write_atomic(arguments.output_dir / PAGE, text.encode())
        print(f"page: {arguments.output_dir / PAGE}")
    print(tally)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Put a pretrained encoder into the package, or another folder, with its model card.

    python benchmarks/ship_encoder.py runs/polysrl-mp --name polysrl-mp --model polysrl
    python benchmarks/ship_encoder.py runs/graphcl --name graphcl-mp --model graphcl
    python benchmarks/ship_encoder.py runs/mp_formation_energy --name formation-energy-mp \\
        --model mp_formation_energy
    python benchmarks/ship_encoder.py runs/infomax3d --name infomax3d --model infomax3d \\
        --folder benchmarks/encoders --formulas-only

``--model`` is its name in ``wetlab_scores.csv``. Of an encoder that has learned from structures two
files are written, one for formulas (all that property models need) and one for structures; of
others the first only. Each is below 10 MB. All numbers of the card come from the manifest and the
scores. Those that only repeat the paper's tables are kept in ``benchmarks/encoders``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from command_line import HERE
from paired import paired_differences

from polysrl_dc import PolySRLConfig, PolySRLModel
from polysrl_dc.checkpoints import (
    SHIPPED,
    checkpoint_path,
    load_checkpoint,
    save_checkpoint,
    write_atomic,
)

FORMULAS = "encoders.0."
#: Objectives that look at structures, whose encoder is worth keeping.
WITH_STRUCTURES = ("polysrl", "without_sampling", "infomax3d")

CARD = """# {name}

{about}

## Trained on

{data}
- Licence of the data: CC BY 4.0. Attribution: A. Jain et al., "Commentary: The Materials Project",
  APL Materials 1, 011002 (2013). Licence of these weights: MIT, as the code.
- Element features: {element_features} (Tshitoyan et al., Nature 571, 95, 2019).

## How

`benchmarks/pretrain.py`, code revision {revision}, objective `{objective}`, {epochs} epochs
({steps:,} steps of {batch_size}), peak learning rate {learning_rate:g} ({schedule}), seed {seed}.
Configuration, where it differs from the published one:

{changes}
{final_whitening}
## Scores

{diagnostics}Wet-lab data, representation protocol (encoder frozen, the paper's head on the
unit-length mean, five folds, {seeds} seeds); mean absolute error beside that of a random start
(`{baseline}` in `benchmarks/wetlab_scores.csv`) on the same folds; half: of the 95 % interval of
the difference, p: of its paired test (`benchmarks/paired.py`):

{scores}

## Limits

- It knows formulas, not structures: polymorphs get one vector.
- Its training set is of ordered, mostly stoichiometric compounds computed with DFT; doped and
  disordered materials lie outside of it.
- Elements without a Matscholar embedding (Rf and beyond) are refused.
{limits}"""

#: What stands at the top of a card, by objective.
ABOUT = {
    "polysrl": """\
Encoder of chemical formulas, pretrained with PolySRL on crystal structures: a formula becomes a
Gaussian in {n_features} dimensions, its mean the representation, its variance the uncertainty due
to polymorphs. `PolySRLModel(...)` starts from it by default;
`PolySRLModel.from_pretrained("{name}")` is the pretraining model with both encoders.""",
    "graphcl": """\
Encoder of chemical formulas, pretrained with GraphCL: a formula with its fractions perturbed, or an
element dropped, is to be told from other rows of the batch (which hold a formula once for each of
its structures). It has seen no structure and no property. Its
variance has not been trained. A companion of `polysrl-mp`:
`PolySRLModel(pretrained=["polysrl-mp", "{name}"], freeze_encoder=True)`.""",
    "infomax3d": """\
Encoder of chemical formulas, pretrained by 3D Infomax on crystal structures: a formula is to be
told from others by one of its structures (NT-Xent, eq. 15, at a temperature of 0.1, where the paper
prints none), without regard to polymorphs. Its variance has not been trained. It serves to repeat
the paper's tables.""",
    "without_sampling": """\
Encoder of chemical formulas, pretrained on crystal structures by the loss of PolySRL on its means,
without samples of the Gaussians (the paper's Table 7). Its variance has not been trained. It serves
to repeat the paper's tables.""",
    "mp_band_gap": """\
Encoder of chemical formulas, pretrained on band gaps that were computed with density functional
theory. Its variance has not been trained. It serves to repeat the paper's tables.
`PolySRLModel.from_pretrained` of its file predicts them (eV, most stable space group).""",
    "mp_formation_energy": """\
Encoder of chemical formulas, pretrained on formation energies that were computed with density
functional theory. Its variance has not been trained. A companion of `polysrl-mp`:
`PolySRLModel(pretrained=["polysrl-mp", "{name}"], freeze_encoder=True)`.
`PolySRLModel.from_pretrained("{name}")` predicts them (eV/atom, most stable structure).""",
}
STRUCTURES = """\
- {what}{rows:,} DFT-relaxed structures of {stoichiometries:,} stoichiometries: Materials Project,
  database version 2025.02.12, without the GNoME entries; file `{structures}`, SHA-256
  `{sha256}`.
  {held_out_stoichiometries:,} more stoichiometries were held out for diagnostics. No label was
  seen."""
LABELS = """\
- {rows:,} formulas, each with {label}: `{labels}` of
  Matbench, from the Materials Project. All of them, so no score on that task is a fair one."""
LABEL = {
    "mp_band_gap": "the mean band gap of its structures in the space group of the most stable",
    "mp_formation_energy": "the lowest formation energy of its structures",
}
DIAGNOSTICS = """\
Held-out stoichiometries: their structure is the nearest among 256 for {retrieval@1:.1%} of the
formulas and among the ten nearest for {retrieval@10:.1%}.
Effective rank of the means {rank_formulas:.1f}.

"""
FINAL_WHITENING = """
The saved means are decorrelated with the power {power:g} (chosen on the scores below) instead of \
that of the training.
"""
NO_VARIANCE = "- The variance is that of the contrastive loss; it does not follow polymorphism.\n"
UNTRAINED_VARIANCE = "- `predict_polymorphism` has no meaning: its weights are random.\n"
VARIANCE = """- The variance was fitted to the spread of the known polymorphs by
  `benchmarks/fit_variance.py`: {structures:,} structures, {n_steps:,} steps, {unknown:g} doped
  formulas for each known one. What it says, and where it does not: `benchmarks/UNCERTAINTY.md`.
"""


def main(argv: list[str] | None = None) -> None:
    """Write the two files and the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", type=Path, help="folder that pretrain.py has written")
    add("--name", default="polysrl-mp")
    add("--model", required=True, help="its name in wetlab_scores.csv")
    add("--baseline", default="rand_init", help="random start in wetlab_scores.csv")
    add("--scores", type=Path, default=HERE / "wetlab_scores.csv")
    add("--folder", type=Path, default=SHIPPED, help="where to put it; default: the package")
    add("--formulas-only", action="store_true", help="leave out the encoder of structures")
    add("--dry-run", action="store_true", help="print the card; write nothing")
    arguments = parser.parse_args(argv)
    tensors, manifest = load_checkpoint(checkpoint_path(arguments.run))
    card = model_card(arguments, manifest)
    print(card)
    if arguments.dry_run:
        return
    folder, objective = arguments.folder, manifest["provenance"]["objective"]
    folder.mkdir(exist_ok=True)
    if objective in WITH_STRUCTURES and not arguments.formulas_only:
        structures = {n: value for n, value in tensors.items() if not n.startswith(FORMULAS)}
        tensors = {n: value for n, value in tensors.items() if n.startswith(FORMULAS)}
        manifest = {**manifest, "run": None, "schedule": None}
        save_checkpoint(folder / f"{arguments.name}.structures.safetensors", structures, manifest)
    elif manifest["settings"]["task"] == "pretraining":
        tensors, manifest = as_property_model(arguments.run, manifest["provenance"])
    save_checkpoint(folder / f"{arguments.name}.formulas.safetensors", tensors, manifest)
    write_atomic(folder / f"{arguments.name}.md", card.encode())


def as_property_model(
    run: Path, provenance: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and manifest of an unfitted model that starts from the encoder of a run."""
    model = PolySRLModel(pretrained=run)
    model.provenance = provenance
    with TemporaryDirectory() as folder:
        model.save(folder)
        return load_checkpoint(checkpoint_path(folder))


def model_card(arguments: argparse.Namespace, manifest: dict[str, Any]) -> str:
    """The card as Markdown."""
    published = PolySRLConfig.named("paper").to_dict()
    changes = [
        f"- `{field}`: {value} (published: {published[field]})"
        for field, value in manifest["config"].items()
        if value != published[field]
    ]
    provenance = manifest["provenance"]
    data, objective = provenance["data"], provenance["objective"]
    power, fitted = provenance["final_whitening"], provenance.get("variance")
    final = "" if power is None else FINAL_WHITENING.format(power=power)
    about = {"name": arguments.name, "n_features": manifest["config"]["n_features"]}
    diagnostics = ""
    if objective in WITH_STRUCTURES:
        diagnostics = DIAGNOSTICS.format(**provenance["diagnostics"])
    limits = NO_VARIANCE if objective == "polysrl" else UNTRAINED_VARIANCE
    if fitted:
        limits = VARIANCE.format(**fitted)
    what = "" if objective in WITH_STRUCTURES else "The formulas alone of "
    scores = pd.read_csv(arguments.scores)
    table = paired_differences(scores, arguments.model, arguments.baseline)
    rows = scores[scores["model"] == arguments.model]
    told = {
        "name": arguments.name,
        "about": ABOUT[objective].format(**about),
        "data": (LABELS if "labels" in data else STRUCTURES).format(
            what=what, label=LABEL.get(objective), **data
        ),
        "diagnostics": diagnostics,
        "limits": limits,
        "revision": provenance["revision"] or "not recorded",
        "steps": provenance.get("steps", manifest["step"]),
        "changes": "\n".join(changes),
        "final_whitening": final,
        "seeds": rows["seed"].nunique(),
        "baseline": arguments.baseline,
        "scores": table.round(3).to_markdown(),
    }
    return CARD.format(**{**provenance, **told})


if __name__ == "__main__":
    main()

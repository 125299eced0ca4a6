"""Put a pretrained encoder into the package, with its model card.

    python benchmarks/ship_encoder.py runs/polysrl --name polysrl-mp --model shipped

``--model`` is its name in ``wetlab_scores.csv``. Two files are written, one for formulas (all that
property models need) and one for structures, each below 10 MB, and a card whose numbers all come
from the manifest and the scores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from paired import paired_differences

from polysrl_dc import PolySRLConfig
from polysrl_dc.checkpoints import (
    SHIPPED,
    checkpoint_path,
    load_checkpoint,
    save_checkpoint,
    write_atomic,
)

FORMULAS = "encoders.0."

CARD = """# {name}

Encoder of chemical formulas, pretrained with PolySRL on crystal structures: a formula becomes a
Gaussian in {n_features} dimensions, its mean the representation, its variance the uncertainty due
to polymorphs. `PolySRLModel(...)` starts from it by default;
`PolySRLModel.from_pretrained("{name}")` is the pretraining model with both encoders.

## Trained on

- {rows:,} DFT-relaxed structures of {stoichiometries:,} stoichiometries: Materials Project,
  database version 2025.02.12, without the GNoME entries; file `{structures}`, SHA-256
  `{sha256}`.
  {held_out:,} more stoichiometries were held out for the diagnostics below. No label was seen.
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

Held-out stoichiometries: their structure is the nearest among 256 for {r1:.1%} of the formulas and
among the ten nearest for {r10:.1%}. Effective rank of the means {rank:.1f}.

Wet-lab data, representation protocol (encoder frozen, the paper's head on the unit-length mean,
five folds, {seeds} seeds); mean absolute error beside that of a random start (`{baseline}` in
`benchmarks/wetlab_scores.csv`) on the same folds:

{scores}

## Limits

- It knows formulas, not structures: polymorphs get one vector.
- Its training set is of ordered, mostly stoichiometric compounds computed with DFT; doped and
  disordered materials lie outside of it.
- Elements without a Matscholar embedding (Rf and beyond) are refused.
{variance}"""

NO_VARIANCE = "- The variance is that of the contrastive loss; it does not follow polymorphism.\n"
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
    add("--scores", type=Path, default=Path("benchmarks/wetlab_scores.csv"))
    add("--dry-run", action="store_true", help="print the card; write nothing")
    arguments = parser.parse_args(argv)
    tensors, manifest = load_checkpoint(checkpoint_path(arguments.run))
    card = model_card(arguments, manifest)
    print(card)
    if arguments.dry_run:
        return
    SHIPPED.mkdir(exist_ok=True)
    manifest = {**manifest, "run": None, "schedule": None}
    formulas = {name: value for name, value in tensors.items() if name.startswith(FORMULAS)}
    structures = {name: value for name, value in tensors.items() if name not in formulas}
    save_checkpoint(SHIPPED / f"{arguments.name}.structures.safetensors", structures, manifest)
    save_checkpoint(SHIPPED / f"{arguments.name}.formulas.safetensors", formulas, manifest)
    write_atomic(SHIPPED / f"{arguments.name}.md", card.encode())


def model_card(arguments: argparse.Namespace, manifest: dict[str, Any]) -> str:
    """The card as Markdown."""
    published = PolySRLConfig.named("paper").to_dict()
    changes = [
        f"- `{field}`: {value} (published: {published[field]})"
        for field, value in manifest["config"].items()
        if value != published[field]
    ]
    provenance = manifest["provenance"]
    found = provenance["diagnostics"]
    power = provenance["final_whitening"]
    final = "" if power is None else (
        f"\nThe saved means are decorrelated with the power {power:g} (chosen on the scores below) "
        "instead of that of the training.\n"
    )
    scores = pd.read_csv(arguments.scores)
    table = paired_differences(scores, arguments.model, arguments.baseline)
    rows = scores[scores["model"] == arguments.model]
    fitted = provenance.get("variance")
    variance = VARIANCE.format(**fitted) if fitted else NO_VARIANCE
    return CARD.format(
        name=arguments.name,
        variance=variance,
        n_features=manifest["config"]["n_features"],
        rows=provenance["data"]["rows"],
        stoichiometries=provenance["data"]["stoichiometries"],
        held_out=provenance["data"]["held_out_stoichiometries"],
        structures=provenance["data"]["structures"],
        sha256=provenance["data"]["sha256"],
        steps=provenance.get("steps", manifest["step"]),
        changes="\n".join(changes),
        r1=found["retrieval@1"],
        r10=found["retrieval@10"],
        rank=found["rank_formulas"],
        final_whitening=final,
        seeds=rows["seed"].nunique(),
        baseline=arguments.baseline,
        scores=table.round(3).to_markdown(),
        **{
            key: provenance[key]
            for key in (
                "element_features",
                "revision",
                "objective",
                "epochs",
                "batch_size",
                "learning_rate",
                "schedule",
                "seed",
            )
        },
    )


if __name__ == "__main__":
    main()

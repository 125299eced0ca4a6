"""Fit the variance of a pretrained encoder to the spread of the known polymorphs.

    python benchmarks/fit_variance.py polysrl-mp --data-dir DATA --output-dir runs/polysrl-mp

Means, and all that is made of them, stay as they are to the bit. Writes ``model.safetensors``,
whose manifest says how; ``uncertainty.py --encoders FOLDER`` judges it.
"""

from __future__ import annotations

from inspect import signature

import torch
from command_line import refusing, runner_parser
from pretrain import split
from tasks import structures_path

from polysrl_dc import PolymorphDataset, PolySRLModel
from polysrl_dc.checkpoints import checkpoint_path, load_checkpoint
from polysrl_dc.polymorph_variance import fit_polymorph_variance

SETTINGS = {
    name: parameter.default
    for name, parameter in signature(fit_polymorph_variance).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}


def main(argv: list[str] | None = None) -> None:
    """Fit and save."""
    parser = runner_parser(__doc__, cache=True, output_dir=None)
    add = parser.add_argument
    add("encoder", help="saved pretraining model: a name, folder or file")
    add("--structures", help="as for pretrain.py; default: DATA/mp")
    add("--hold-out", type=int, default=2000, help="stoichiometries left out, as in pretraining")
    add("--max-structures", type=int, help="random sample of the structures")
    add("--threads", type=int, default=1)
    for name, default in SETTINGS.items():
        add(f"--{name.replace('_', '-')}", type=type(default), default=default)
    add("--dry-run", action="store_true", help="say what would be done, and stop")
    arguments = parser.parse_args(argv)
    with refusing(parser):
        path = structures_path(arguments.structures, arguments.data_dir)
    torch.set_num_threads(arguments.threads)
    dataset = PolymorphDataset(
        path,
        on_error="skip",
        cache_dir=arguments.cache_dir,
        max_structures=arguments.max_structures,
    )
    seen, _ = split(dataset, arguments.hold_out, set(), arguments.seed)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    print(f"{len(seen):,} structures, {settings}")
    if arguments.dry_run:
        return
    model = PolySRLModel.from_pretrained(arguments.encoder)
    losses = fit_polymorph_variance(model, seen, **settings)
    print("mean loss of each tenth of the steps:", " ".join(f"{loss:.4f}" for loss in losses))
    steps = load_checkpoint(checkpoint_path(arguments.encoder))[1]["step"]
    model.provenance.setdefault("steps", steps)  # those of the pretraining
    model.provenance["variance"] = {**settings, "structures": len(seen), "loss": losses[-1]}
    model.save(arguments.output_dir)


if __name__ == "__main__":
    main()

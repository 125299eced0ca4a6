"""Throughput and memory of ``polysrl_dc`` beside a literal reference, in one run.

    python benchmarks/speed.py --data-dir DATA --output-dir RESULTS

``reference.py`` and ``polysrl_dc`` get equal weights and the same batches of real structures, and
take turns, so that whatever else the machine does slows both. Numbers are medians over batches;
``ratio`` says how many times better ours is. Both are first shown to compute the same loss.
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import reference
import torch
from command_line import refusing, runner_parser
from files import write_csv
from graph_data import NumpyDataset
from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY
from pymatgen.core import Composition, Lattice, Structure
from tasks import find_data_dir
from torch import Tensor, nn
from torch_geometric.data import Batch
from tqdm import tqdm

from polysrl_dc import (
    PolySRLConfig,
    PolySRLModel,
    StoichiometryGraphFeaturizer,
    StructureGraphFeaturizer,
    losses,
)
from polysrl_dc.datasets import PolymorphDataset
from polysrl_dc.graphs import StoichiometryBatch, StructureBatch
from polysrl_dc.objectives import PretrainingNetwork

COLUMNS = ["stage", "reference", "ours", "ratio", "unit"]
N_FORMULAS = 4096
LEARNING_RATE, GRAD_CLIP = 5e-5, 2.0  # Table 3 and Appendix B.3
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "ours in bfloat16": {"precision": torch.bfloat16},
}
COMPILED: dict[str, dict[str, Any]] = {"ours compiled": {"fuse": True}}


@dataclass(frozen=True)
class Sample:
    """Structures, formulas, and where they come from."""

    structures: list[Structure]
    formulas: list[str]
    source: str


@dataclass(frozen=True)
class Settings:
    """What both sides share; the threads are those of the processes that measure memory."""

    config: PolySRLConfig
    device: torch.device
    seed: int
    threads: int

    def generator(self) -> torch.Generator:
        """A fresh source of the samples of eq. 3, the same for both sides."""
        return torch.Generator(self.device).manual_seed(self.seed)


def load_sample(data_dir: Path | None, n: int, max_sites: int, seed: int) -> Sample:
    """A random sample of structures of at most ``max_sites`` sites, and of formulas.

    From ``mp/structures.parquet`` in ``data_dir``; without it, from the AFLOW prototypes in
    pymatgen.
    """
    rng = np.random.default_rng(seed)
    path = (data_dir or Path()) / "mp" / "structures.parquet"
    if real := data_dir is not None and path.is_file():
        table = pq.read_table(path, columns=["formula", "cell", "numbers", "frac_coords"])
        sizes = table["numbers"].combine_chunks().value_lengths().to_numpy()
        source = f"{len(table):,} structures of {path.parent.name}/{path.name}"
        formulas = table["formula"].unique().to_pylist()
    else:
        library = [entry["snl"].structure for entry in AFLOW_PROTOTYPE_LIBRARY]
        library = [structure for structure in library if structure.is_ordered]
        sizes = np.array([len(structure) for structure in library])
        source = f"{len(library)} AFLOW prototypes, for lack of mp/structures.parquet"
        formulas = sorted({structure.composition.reduced_formula for structure in library})
    rows = np.flatnonzero(sizes <= max_sites)
    rows = rng.choice(rows, min(n, len(rows)), replace=False)
    if real:
        structures = [
            Structure(Lattice.from_parameters(*cell), numbers, np.reshape(coordinates, (-1, 3)))
            for _, cell, numbers, coordinates in map(dict.values, table.take(rows).to_pylist())
        ]
    else:
        structures = [library[row] for row in rows]
    chosen = rng.choice(len(formulas), min(N_FORMULAS, len(formulas)), replace=False)
    return Sample(structures, [formulas[i] for i in chosen], source)


# ---------------------------------------------------------- the two sides, with equal methods


class Side:
    """What is done alike on both sides; subclasses add the calls into their own code."""

    settings: Settings
    network: Any
    dataset: Any  # what batches are assembled from
    formula_graphs: Any
    load: Callable[[np.ndarray], tuple[Any, ...]]  # rows -> formulas, structures, groups; on CPU
    loss: Callable[..., Tensor]  # of losses.polysrl_loss, and its signature

    def take(self, batch_rows: Sequence[np.ndarray]) -> None:
        """Keep batches on the device, and the outputs of the encoders for the first."""
        self.batches = [_to(self.load(rows), self.settings.device) for rows in batch_rows]
        self.outputs = self.forward(0)

    def forward(self, k: int) -> list[Tensor]:
        """Mean, log sigma and structure embedding of batch k, without gradients."""
        formulas, structures, _ = self.batches[k]
        with torch.no_grad():
            gaussian = self.network.encoders[0](formulas)
            return [*gaussian, self.network.structure_encoder(structures)]

    def loss_and_gradients(self) -> float:
        """Of the first batch, from its embeddings."""
        leaves = [output.detach().requires_grad_() for output in self.outputs]
        groups, config = self.batches[0][2], self.settings.config
        loss = self.loss(
            *(*leaves, groups, groups, self.network.c, self.network.d),
            n_samples=config.n_samples,
            beta=config.beta,
            generator=self.settings.generator(),
        )
        torch.autograd.backward(loss, inputs=leaves)
        return loss.item()


class Ours(Side):
    """Every timed call into ``polysrl_dc``."""

    loss = staticmethod(losses.polysrl_loss)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.manual_seed(settings.seed)
        self.network = PretrainingNetwork(settings.config, "polysrl").to(settings.device)
        self.model = PolySRLModel(config=settings.config, pretrained=None, device=settings.device)

    def prepare(self, structures: Sequence[Structure]) -> Any:
        """Structures -> everything that batches are assembled from."""
        return PolymorphDataset.from_graphs(StructureGraphFeaturizer().featurize(structures))

    def load(self, rows: np.ndarray) -> tuple[StoichiometryBatch, StructureBatch, Tensor]:
        return self.dataset.batch(rows)

    def size(self, k: int) -> tuple[int, int]:
        """Nodes and edges the structure encoder works on."""
        structures = self.batches[k][1]
        return len(structures.index), len(structures.centers)

    def parse(self, formulas: Sequence[str]) -> Any:
        """Strings -> graphs."""
        return StoichiometryGraphFeaturizer().featurize(formulas)

    def embed(self, graphs: Any) -> np.ndarray:
        """Graphs -> means."""
        return self.model.predict_embedding(NumpyDataset(graphs))


class Reference(Side):
    """The same by ``reference.py``, with the weights of ours."""

    loss = staticmethod(reference.reference_loss)

    def __init__(self, settings: Settings, ours: Ours) -> None:
        self.settings = settings
        self.network = reference.ReferenceNetwork(settings.config).to(settings.device)
        reference.load_weights(self.network, ours.network.state_dict())
        self.encoder = reference.ReferenceStoichiometryEncoder(settings.config).eval()
        reference.load_weights(self.encoder, ours.model.model.encoders[0].state_dict())
        self.encoder.to(settings.device)

    def prepare(self, structures: Sequence[Structure]) -> list[reference.Crystal]:
        return [reference.crystal_from_structure(structure) for structure in structures]

    def load(self, rows: np.ndarray) -> tuple[Batch, Batch, Tensor]:
        return reference.collate([self.dataset[row] for row in rows])

    def size(self, k: int) -> tuple[int, int]:
        return self.batches[k][1].num_nodes, self.batches[k][1].num_edges

    def parse(self, formulas: Sequence[str]) -> Any:
        return [reference.formula_data(Composition(formula)) for formula in formulas]

    def embed(self, graphs: Any) -> np.ndarray:
        with torch.no_grad():
            batch = Batch.from_data_list(graphs).to(self.settings.device)
            return self.encoder(batch)[0].cpu().numpy()


def trainer(
    network: Any, settings: Settings, precision: torch.dtype | None = None, fuse: bool = False
) -> Callable[[Any], None]:
    """A training step: forward (in autocast, compiled, if asked), backward, clipping, Adam."""
    if fuse:
        network.structure_encoder.compile(dynamic=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)

    def step(batch: Sequence[Any]) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(settings.device.type, precision, enabled=precision is not None):
            loss = network.loss(*batch, settings.generator())
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), GRAD_CLIP)
        optimizer.step()

    return step


# ---------------------------------------------------------------------------------- measuring


def measure(
    sample: Sample,
    settings: Settings,
    n_batches: int,
    batch_size: int,
    memory: bool = True,
    fuse: bool = False,
) -> pd.DataFrame:
    """Time every stage on ``n_batches`` batches, each drawn anew, after one call that is not timed.

    Returns
    -------
    pandas.DataFrame
        Columns ``stage, reference, ours, ratio, unit``; memory, and ours compiled, if asked for.

    Raises
    ------
    RuntimeError
        When the two sides do not compute the same.
    """
    structures, formulas = sample.structures, sample.formulas
    ours = Ours(settings)
    theirs = Reference(settings, ours)
    rng = np.random.default_rng(settings.seed)
    chosen = [rng.choice(len(structures), batch_size, replace=False) for _ in range(n_batches)]
    crystals = [[structures[row] for row in rows] for rows in chosen]
    ours.dataset = ours.prepare(structures)
    graphs = StructureGraphFeaturizer().featurize(structures)
    theirs.dataset = [reference.crystal_from_graph(graph) for graph in graphs]  # equal edges
    for side in (theirs, ours):
        side.take(chosen)
        side.formula_graphs = side.parse(formulas)
    _check_equal(theirs, ours)

    rows: list[list[Any]] = []
    sizes = [
        np.sum([side.size(k) for k in range(n_batches)], axis=0) / (n_batches * batch_size)
        for side in (theirs, ours)
    ]
    for what, published, own in zip(("nodes", "edges"), *sizes, strict=True):
        rows.append([f"{what} per structure", published, own, published / own, what])

    def compare(
        stage: str,
        n: int,
        unit: str,
        call: Callable[[Any, int], Any],
        between: tuple[Any, Any] = (theirs, ours),
    ) -> None:
        calls = [partial(call, side) for side in between]
        published, own = (n / s for s in _interleaved(calls, n_batches, settings.device))
        rows.append([stage, published, own, own / published, unit])
        bar.update()

    n, rate = batch_size, "structures/s"
    variants = VARIANTS | (COMPILED if fuse else {})
    with tqdm(total=6 + len(variants) + 2 * memory, unit="stage") as bar:
        compare("structure to graph", n, rate, lambda side, k: side.prepare(crystals[k]))
        compare("data loading", n, rate, lambda side, k: side.load(chosen[k]))
        compare("forward, both encoders", n, rate, lambda side, k: side.forward(k))
        compare("loss and its gradients", n, rate, lambda side, k: side.loss_and_gradients())
        for label, variant in variants.items():
            steps = (
                (trainer(copy.deepcopy(theirs.network), settings), theirs.batches),
                (trainer(copy.deepcopy(ours.network), settings, **variant), ours.batches),
            )
            stage = f"training step, {label}"
            compare(stage, n, rate, lambda pair, k: pair[0](pair[1][k]), steps)
        n, rate = len(formulas), "formulas/s"
        compare("strings to embeddings", n, rate, lambda side, _: side.embed(side.parse(formulas)))
        compare("graphs to embeddings", n, rate, lambda side, _: side.embed(side.formula_graphs))
        if memory:
            published = _memory(theirs)
            for label, variant in VARIANTS.items():
                own = _memory(ours, **variant)
                stage = f"memory of a training step, {label}"
                rows.append([stage, published, own, published / own, "MiB"])
                bar.update()
    return pd.DataFrame(rows, columns=COLUMNS)


def _interleaved(
    calls: Sequence[Callable[[int], Any]], n_batches: int, device: torch.device
) -> list[float]:
    """Median seconds of each call over the batches; the calls take turns."""
    for call in calls:
        call(0)
    seconds: list[list[float]] = [[] for _ in calls]
    for k in range(n_batches):
        for call, taken in zip(calls, seconds, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            call(k)
            _synchronize(device)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _to(batch: Sequence[Any], device: torch.device | str) -> tuple[Any, ...]:
    return tuple(part.to(device) for part in batch)


def _check_equal(theirs: Reference, ours: Ours) -> None:
    published, own = theirs.loss_and_gradients(), ours.loss_and_gradients()
    pairs = [
        *zip(theirs.outputs, ours.outputs, strict=True),
        tuple(torch.from_numpy(side.embed(side.formula_graphs)) for side in (theirs, ours)),
    ]
    apart = max((one - other).abs().max().item() for one, other in pairs)
    said = (
        f"loss of the first batch: reference {published:.6f}, ours {own:.6f}; "
        f"embeddings differ by at most {apart:.1e}"
    )
    if apart > 0.01 or abs(own - published) > 1e-3 * abs(published):
        raise RuntimeError(f"the two sides do not compute the same: {said}")
    print(said)


# ------------------------------------------------------------------------------------- memory


def _memory(side: Side, **variant: Any) -> float:
    """Peak memory in MiB of a training step, in a process of its own."""
    network, batch = copy.deepcopy(side.network).to("cpu"), _to(side.batches[0], "cpu")
    payload = pickle.dumps((network, batch, side.settings))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(step_memory, payload, variant).result() / 2**20


def step_memory(payload: bytes, variant: dict[str, Any]) -> int:
    """Bytes that two training steps add at their peak to a process that holds model and batch."""
    network, batch, settings = pickle.loads(payload)
    torch.set_num_threads(settings.threads)
    device = settings.device
    batch = _to(batch, device)
    step = trainer(network.to(device), settings, **variant)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = _allocated(device, "VmRSS")
    for _ in range(2):  # Adam's state is there from the second on
        step(batch)
    _synchronize(device)
    return _allocated(device, "VmHWM") - before


def _allocated(device: torch.device, entry: str) -> int:
    """Bytes in use now (VmRSS) or at the peak (VmHWM).

    On Linux ``ru_maxrss`` of a new process starts at the peak of its parent, VmHWM at its own.
    """
    if device.type == "cuda":
        peak = entry == "VmHWM"
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device)
    if (status := Path("/proc/self/status")).exists():
        return int(status.read_text().split(f"{entry}:")[1].split()[0]) * 1024
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


# ---------------------------------------------------------------------------------- the script


def main(argv: list[str] | None = None) -> int:
    """Measure, write ``speed.csv``, print the table."""
    parser = runner_parser(
        __doc__, "layout of the shared data; or POLYSRL_DATA; else AFLOW prototypes"
    )
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--threads", type=int, help="default: torch's own choice")
    add("--structures", type=int, default=1024, help="structures that batches are drawn from")
    add("--max-sites", type=int, default=60, help="leave out larger cells")
    add("--batches", type=int, default=5, help="batches each stage is timed on")
    add("--batch-size", type=int, default=256)
    add("--compile", action="store_true", help="ours compiled as well; needs a C++ compiler")
    add("--dry-run", action="store_true", help="read the data; time and write nothing")
    arguments = parser.parse_args(argv)
    if min(arguments.batches, arguments.structures, arguments.max_sites) < 1:
        parser.error("--batches, --structures and --max-sites must be positive")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    with refusing(parser):
        data_dir = find_data_dir(arguments.data_dir)
    sample = load_sample(data_dir, arguments.structures, arguments.max_sites, arguments.seed)
    if not 2 <= arguments.batch_size <= len(sample.structures):
        parser.error(f"--batch-size must be between 2 and {len(sample.structures)} structures")
    settings = Settings(
        PolySRLConfig.named("paper"), arguments.device, arguments.seed, torch.get_num_threads()
    )
    facts = {
        "device": _name(settings.device),
        "threads": settings.threads,
        "torch": torch.__version__,
        "structures": len(sample.structures),
        "source": sample.source,
        "mean_sites": round(float(np.mean([len(s) for s in sample.structures])), 1),
        "batches": arguments.batches,
        "batch_size": arguments.batch_size,
        "formulas": len(sample.formulas),
        "seed": arguments.seed,
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if arguments.dry_run:
        print("dry run: nothing was timed, nothing is written")
        return 0
    table = measure(
        sample, settings, arguments.batches, arguments.batch_size, fuse=arguments.compile
    )
    path = arguments.output_dir / "speed.csv"
    write_csv(path, table.assign(**facts))
    print(table.to_string(index=False, float_format="{:,.1f}".format))
    print(f"ratio: how many times faster, or smaller, ours is; written to {path}")
    return 0


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    sys.exit(main())

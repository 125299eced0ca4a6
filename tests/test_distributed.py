"""Two processes that share every batch, against one process with the whole batch, in float64."""

import functools

import pytest
import torch
from processes import (
    SHARED_ROWS,
    crystals,
    empty_part,
    fitted_in_double_precision,
    one_step,
    outcome,
    pretraining,
)

from polysrl_dc.checkpoints import load_checkpoint
from polysrl_dc.distributed import gather_rows, process_count, process_rank, sum_over_processes


@functools.cache
def read(name):
    return [torch.load(outcome() / f"{name}{rank}.pt") for rank in range(2)]


def assert_all_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, n=name: f"{n}: {text}",
                                   **tolerance)  # fmt: skip


def test_one_process_is_the_identity():
    rows = torch.randn(3, 2)
    assert (process_count(), process_rank()) == (1, 0)
    assert gather_rows(rows) is rows and sum_over_processes(rows) is rows


@pytest.mark.parametrize("objective", ["polysrl", "infomax3d"])
def test_two_processes_have_the_loss_and_the_gradients_of_the_whole_batch(objective):
    """With feature norm, whitening and parts of unequal size."""
    assert len(SHARED_ROWS) % 2 == 1
    whole = one_step(objective)
    gradients = [name for name in whole if name.startswith("gradient ")]
    assert len(gradients) > 50
    assert sum(float(whole[name].abs().max()) > 1e-6 for name in gradients) > 40
    assert not torch.equal(
        whole["encoders.0.mean_norm.decorrelation"], torch.eye(16, dtype=torch.float64)
    )
    for part in read(objective):
        # DistributedDataParallel knows no unused parameter: their gradient is zero
        known = {name: value for name, value in part.items() if name in whole}
        assert all(not part[name].any() for name in part.keys() - whole.keys())
        assert_all_close(known, whole, rtol=1e-9, atol=1e-12)


def test_two_processes_train_to_the_weights_of_one(tmp_path):
    whole = fitted_in_double_precision(str(tmp_path))
    first, second = read("fit")
    assert_all_close(first, second, rtol=0, atol=0)
    assert_all_close(first, whole, rtol=1e-6, atol=1e-8)
    start = pretraining().model.state_dict()
    moved = "structure_encoder.node_encoder.0.weight"
    assert (first[moved] - start[moved]).abs().max() > 1e-3


def test_only_the_first_process_writes_checkpoints():
    folder = outcome()
    assert len(list((folder / "fit0").glob("checkpoint*.safetensors"))) == 4
    assert list((folder / "fit1").iterdir()) == []
    tensors, manifest = load_checkpoint(folder / "fit0" / "checkpoint1.safetensors")
    assert manifest["step"] == 10
    weight = read("fit")[0]["encoders.0.mean_output.weight"]
    torch.testing.assert_close(tensors["model.encoders.0.mean_output.weight"], weight)


def test_a_process_may_have_no_row():
    encoder = pretraining().model.structure_encoder.eval()
    assert encoder(empty_part()).shape == (0, 16)
    assert len(crystals()) > 0

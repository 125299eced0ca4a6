"""Checkpoints: exact round trip, and refusal of everything that is not one."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from polysrl_dc import checkpoints
from polysrl_dc.checkpoints import CheckpointError, load_checkpoint, load_into, save_checkpoint

MANIFEST = {"config": {"F": 200, "beta": 1e-8}, "units": ["eV", "Å"], "note": None, "1": True}


def some_tensors():
    shared = torch.randn(4, 3)
    return {
        "weight": shared,
        "tied": shared,
        "transposed": torch.randn(2, 5).T,
        "half": torch.randn(3).to(torch.bfloat16),
        "double": torch.randn(2, dtype=torch.float64),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.tensor([float("nan"), float("inf"), -0.0])),
    }


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_checkpoint(path, some_tensors(), MANIFEST)
    return path


def test_round_trip_is_exact(tmp_path):
    path, tensors = tmp_path / "encoder.safetensors", some_tensors()
    save_checkpoint(path, tensors, MANIFEST)
    loaded, manifest = load_checkpoint(str(path))
    assert manifest == MANIFEST
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and not loaded[name].requires_grad
        torch.testing.assert_close(
            loaded[name], tensor.detach(), rtol=0, atol=0, equal_nan=True, msg=name
        )


def test_equal_content_gives_equal_bytes(tmp_path):
    torch.manual_seed(1)
    save_checkpoint(tmp_path / "a", some_tensors(), MANIFEST)
    torch.manual_seed(1)
    save_checkpoint(tmp_path / "b", some_tensors(), dict(reversed(MANIFEST.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tuples_and_integer_keys_become_what_json_makes_of_them(tmp_path):
    save_checkpoint(tmp_path / "a", {}, {"shape": (1, 2), "counts": {10: "x", 9: "y"}})
    assert load_checkpoint(tmp_path / "a") == (
        {},
        {"shape": [1, 2], "counts": {"10": "x", "9": "y"}},
    )


def test_file_is_plain_safetensors_without_pickle(saved):
    content = saved.read_bytes()
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    header = json.loads(metadata["polysrl_dc"])
    assert (header["format"], header["version"]) == ("polysrl-dc-checkpoint", 1)
    assert header["manifest"] == MANIFEST
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(content)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_truncation(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors"):
        load_checkpoint(saved)


def test_appended_bytes(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors"):
        load_checkpoint(saved)


def test_every_flipped_bit_is_noticed(saved):
    content = saved.read_bytes()
    for position in range(len(content)):
        altered = bytearray(content)
        altered[position] ^= 1 << (position % 8)
        saved.write_bytes(altered)
        try:
            load_checkpoint(saved)
        except CheckpointError as error:
            assert "encoder.safetensors" in str(error)
        else:
            pytest.fail(f"flipping bit {position % 8} of byte {position} went unnoticed")


def test_foreign_files(tmp_path):
    path = tmp_path / "foreign"
    contents = [b"", b"not a checkpoint", pickle.dumps({"w": [1.0]}), b"\xff" * 64]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="foreign"):
            load_checkpoint(path)
    torch.save({"w": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="foreign"):
        load_checkpoint(path)
    headers = [None, {"format": "pt"}, {"polysrl_dc": "{"}, {"polysrl_dc": "[]"}]
    headers.append({"polysrl_dc": json.dumps({"format": "polysrl-dc-checkpoint", "version": 1})})
    for metadata in headers:
        save_file({"w": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(CheckpointError, match="foreign"):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match=tmp_path.name):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        load_checkpoint(tmp_path / "nothing_here")


def test_other_version(saved, monkeypatch):
    monkeypatch.setattr(checkpoints, "VERSION", 2)
    with pytest.raises(CheckpointError, match=r"version 1 of .*reads 2"):
        load_checkpoint(saved)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(saved, {"other": torch.ones(1)}, {})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("manifest", [{"x": float("nan")}, {"x": torch.ones(1)}, {"x": {1, 2}}])
def test_manifests_that_are_not_json(tmp_path, manifest):
    with pytest.raises((TypeError, ValueError)):
        save_checkpoint(tmp_path / "a", {}, manifest)
    assert not os.listdir(tmp_path)


def test_load_into_copies_everything():
    source, target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    source(torch.randn(5, 3))
    load_into(target, source.state_dict())
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name


def test_load_into_names_every_difference_and_changes_nothing():
    module = nn.Linear(2, 3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_into(module, {"weight": torch.ones(2, 3), "scale": torch.ones(1)})
    for part in ("missing ['bias']", "unexpected ['scale']", "weight: (2, 3), not (3, 2)"):
        assert part in str(caught.value)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())

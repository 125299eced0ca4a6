"""Which rows stand in which batch."""

from itertools import pairwise

import deepchem as dc
import numpy as np
import pytest
import torch
from models import CONFIG, FORMULAS, data
from processes import crystals, pretraining

from polysrl_dc.batches import (
    LabeledData,
    PolymorphData,
    batch_rows,
    capped_rows,
    polymorphs_together,
)
from polysrl_dc.errors import InvalidInputError

GROUPS = np.random.default_rng(1).integers(0, 40, 200)


def runs(values):
    """Lengths of the runs of equal values."""
    ends = np.flatnonzero(np.r_[values[1:] != values[:-1], True])
    return np.diff(np.r_[-1, ends])


@pytest.mark.parametrize("together", [1, 2, 3, 100])
def test_every_row_comes_once_and_polymorphs_follow_one_another(together):
    order = polymorphs_together(GROUPS, together, np.random.default_rng(0))
    assert sorted(order) == list(range(len(GROUPS)))
    same = polymorphs_together(GROUPS, together, np.random.default_rng(0))
    np.testing.assert_array_equal(order, same)
    other = polymorphs_together(GROUPS, together, np.random.default_rng(1))
    assert not np.array_equal(order, other)
    if together == 1:
        return
    # a group of n is cut into ceil(n / together) runs, all of them full but one
    sizes = np.bincount(GROUPS, minlength=40)
    pieces = -(-sizes // together)
    assert len(runs(GROUPS[order])) <= pieces.sum()
    start = 0
    while start < len(order):
        group = GROUPS[order[start]]
        end = start
        while end < len(order) and GROUPS[order[end]] == group and end - start < together:
            end += 1
        assert end - start in (together, sizes[group] % together)
        start = end


def test_groups_are_in_random_order_and_so_are_the_rows_of_a_group():
    together = np.stack(
        [polymorphs_together(np.zeros(4, int), 4, np.random.default_rng(i)) for i in range(200)]
    )
    assert all(len(np.unique(column)) == 4 for column in together.T)
    firsts = [polymorphs_together(GROUPS, 4, np.random.default_rng(i))[0] for i in range(99)]
    assert len(np.unique(GROUPS[firsts])) > 25


def test_one_together_does_not_look_at_the_groups():
    expected = np.random.default_rng(5).permutation(len(GROUPS))
    found = polymorphs_together(GROUPS, 1, np.random.default_rng(5))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("size", "cap"), [(8, 100), (3, 1000), (100, 60), (100, 10**6)])
def test_caps_are_kept_and_every_row_comes_once(size, cap):
    edges = np.random.default_rng(0).integers(1, 60, 101).astype(np.int32)
    batches = list(capped_rows(edges, size, cap))
    np.testing.assert_array_equal(np.concatenate(batches), np.arange(101))
    assert all(0 < len(batch) <= size and edges[batch].sum() <= cap for batch in batches)
    for batch, following in pairwise(batches[:-1]):  # none but the last two is too short
        assert len(batch) == size or edges[batch].sum() + edges[following[0]] > cap
    assert all(len(batch) > 1 for batch in batches) or cap < 120 or size == 3
    if cap == 10**6:
        assert [len(batch) for batch in batches] == [99, 2]  # not 100 and one that is alone


def test_edges_are_counted_beyond_32_bits():
    edges = np.full(5, 2**30, np.int32)
    assert [len(batch) for batch in capped_rows(edges, 5, 2**40)] == [5]


def test_a_structure_above_the_cap_is_refused():
    with pytest.raises(InvalidInputError, match="61 edges, more than 60"):
        list(capped_rows(np.array([5, 61, 7]), 8, 60))


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, [1]), (2, [2]), (8, [8]), (9, [9]), (10, [8, 2]), (17, [8, 9]), (24, [8, 8, 8])],
)
def test_a_last_row_that_is_alone_joins_the_batch_before(n, expected):
    batches = list(batch_rows(n, 8))
    assert [len(batch) for batch in batches] == expected
    np.testing.assert_array_equal(np.concatenate(batches), np.arange(n))


@pytest.mark.parametrize(("n", "expected"), [(19, [8, 11]), (20, [8, 8, 4]), (3, [3])])
def test_few_labeled_rows_are_no_last_batch(n, expected):
    labeled = LabeledData.from_dataset(data().select(range(n)), 1, False)
    assert [rows.shape[1] for rows in labeled.epoch(8, 1, None)] == expected


def epochs(model, dataset, n=3, deterministic=False):
    data = model._training_data(dataset)
    return [
        [rows.tolist() for rows in model._epoch_rows(data, epoch, deterministic)]
        for epoch in range(n)
    ]


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"polymorphs_per_batch": 4}, {"max_edges": 60, "polymorphs_per_batch": 2}],
    ids=str,
)
def test_epochs_differ_and_the_seed_decides_them(kwargs):
    one, same = (epochs(pretraining(**kwargs), crystals()) for _ in range(2))
    assert one == same and one[0] != one[1] != one[2]
    assert one != epochs(pretraining(seed=1, **kwargs), crystals())
    n_edges = crystals().n_edges
    for epoch in one:
        rows = np.concatenate([batch[0] for batch in epoch])
        assert len(np.unique(rows)) == len(rows)
        missing = set(range(len(crystals()))) - set(rows.tolist())
        assert not missing or ("max_edges" in kwargs and len(missing) < 3)
        assert all(1 < len(batch[0]) <= 8 for batch in epoch)
        if "max_edges" in kwargs:
            assert all(n_edges[batch[0]].sum() <= 60 for batch in epoch)


def test_a_deterministic_epoch_keeps_the_order():
    batches = epochs(pretraining(), crystals(), 1, deterministic=True)[0]
    assert np.concatenate([batch[0] for batch in batches]).tolist() == list(range(37))


def test_a_structure_that_is_alone_is_left_out():
    """A contrastive loss of one row has no negatives; NT-Xent refuses it."""
    cap = int(crystals().n_edges.max())
    data = PolymorphData(crystals(), max_edges=cap)
    order = np.random.default_rng(0)
    assert all(rows.shape[1] > 1 for _ in range(20) for rows in data.epoch(8, 1, order))
    model = pretraining(objective="infomax3d", max_edges=cap)
    assert np.isfinite(model.fit(crystals(), nb_epoch=4, checkpoint_interval=0))


def test_more_polymorphs_share_a_batch_when_they_are_kept_together():
    def pairs(together):
        model = pretraining(polymorphs_per_batch=together)
        groups = crystals().groups
        rows = [groups[batch[0]] for epoch in epochs(model, crystals()) for batch in epoch]
        return sum(len(batch) - len(np.unique(batch)) for batch in rows)

    assert pairs(4) > 1.5 * pairs(1) > 0


def test_members_of_an_ensemble_meet_the_rows_in_orders_of_their_own():
    labeled = LabeledData.from_dataset(data(), 1, False)
    batches = list(labeled.epoch(8, 3, np.random.default_rng(0)))
    order = np.concatenate(batches, axis=1)
    assert [sorted(member) for member in order] == [list(range(len(FORMULAS)))] * 3
    assert len(np.unique(order, axis=0)) == 3


def test_frozen_embeddings_move_with_their_data():
    labeled = LabeledData.from_dataset(data(), 1, False).with_embeddings(torch.ones(3, 36, 2))
    assert torch.equal(labeled.to(torch.device("cpu")).embeddings, labeled.embeddings)


def test_fingerprints_tell_data_apart():
    labeled = [LabeledData.from_dataset(d, 1, False).fingerprint() for d in (
        data(), data(), data(np.arange(36.0)), data(w=np.r_[2.0, np.ones(35)]),
        data(formulas=["NaCl", *FORMULAS[1:]]))]  # fmt: skip
    assert labeled[0] == labeled[1] and len(set(labeled)) == 4
    rows = np.arange(len(crystals()))
    structures = [
        PolymorphData(crystals().select(chosen)).fingerprint()
        for chosen in (rows, rows, rows[:-1], rows[::-1])
    ]
    assert structures[0] == structures[1] and len(set(structures)) == 3


def test_featurized_structures_are_packed_to_the_same_batches():
    graphs = dc.data.NumpyDataset(crystals().X, ids=crystals().ids)
    packed, rows = PolymorphData.from_dataset(graphs, CONFIG), np.arange(9)
    assert packed.fingerprint() == PolymorphData(crystals()).fingerprint()
    formulas, structures, groups = packed.dataset.batch(rows)
    expected = crystals().batch(rows)
    torch.testing.assert_close(formulas.fractions, expected[0].fractions)
    torch.testing.assert_close(structures.distances, expected[1].distances)
    same = [a == a[:, None] for a in (groups.numpy(), expected[2].numpy())]
    np.testing.assert_array_equal(*same)

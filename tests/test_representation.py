"""Heads trained side by side are the heads that would have been trained alone."""

from dataclasses import replace

import numpy as np
import pytest
import representation
import torch
from models import fitted, make
from representation import (
    PAPER,
    HeadStack,
    predict_folds,
    predict_targets,
    representation_digest,
    train_heads,
)
from sklearn.model_selection import KFold
from targets import Target
from torch import nn

from polysrl_dc.batches import batch_rows
from polysrl_dc.heads import PredictionHead


def plain_head(
    x: torch.Tensor, y: torch.Tensor, seed: int, batch_size: int, epochs: int, clip: float = 2.0
) -> PredictionHead:
    """One head by ordinary means."""
    torch.manual_seed(seed)
    head = PredictionHead(x.shape[1], 128, 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    for epoch in range(epochs):
        order = np.arange(len(x))[None]
        order = np.random.default_rng([seed, epoch]).permuted(order, axis=1)[0]
        for part in batch_rows(len(x), batch_size):
            rows = order[part]
            optimizer.zero_grad()
            (head(x[rows])[:, 0] - y[rows]).abs().mean().backward()
            nn.utils.clip_grad_norm_(head.parameters(), clip)
            optimizer.step()
    return head


def data(n: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 6, generator=generator) * scale
    return x, torch.randn(n, generator=generator)


@pytest.mark.parametrize("scale", [0.3, 30.0], ids=["not clipped", "clipped"])
@pytest.mark.parametrize("n_train", [16, 17, 18], ids=["even", "one left over", "two left over"])
def test_members_equal_heads_trained_alone(n_train: int, scale: float) -> None:
    x, y = data(25, scale)
    rows = np.stack([np.arange(n_train), np.arange(25 - n_train, 25), np.arange(n_train)])
    seeds = [0, 1, 5]
    heads = train_heads(x, rows, y.numpy()[rows], seeds, batch_size=8, epochs=range(3))
    outputs = heads.predict(x.expand(3, -1, -1))
    for member, seed in enumerate(seeds):
        alone = plain_head(x[rows[member]], y[rows[member]], seed, 8, 3)
        expected = alone(x)[:, 0].detach()
        torch.testing.assert_close(outputs[member], expected, rtol=1e-5, atol=1e-5)


def test_the_settings_are_those_of_the_paper() -> None:
    settings = representation.EPOCHS, representation.LEARNING_RATE, PAPER.head_hidden
    assert settings == (300, 1e-3, 128) and PAPER.grad_clip == 2


def test_the_clipped_case_is_clipped() -> None:
    x, y = data(18, 30.0)
    clipped, free = (plain_head(x, y, 0, 8, 3, clip)(x) for clip in (2.0, 1e9))
    assert (clipped - free).abs().max() > 1e-3


def test_clipping_one_member_leaves_another_alone() -> None:
    x, y = data(8)
    stack = HeadStack(6, seeds=[0, 1])
    alone = HeadStack(6, seeds=[0])
    for _ in range(3):
        stack.step(torch.stack([x, 1e3 * x]), torch.stack([y, y]))
        alone.step(x[None], y[None])
    assert torch.allclose(stack.predict(x.expand(2, -1, -1))[0], alone.predict(x[None])[0])


def five_folds(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(KFold(5, shuffle=True, random_state=1).split(np.arange(n)))


def test_folds_of_unequal_size_are_those_of_plain_heads() -> None:
    x, y = data(23)  # training folds of 18 and 19 rows
    values = np.stack([y.numpy(), 7 + 3 * y.numpy() ** 2]).astype(float)
    seeds = [4, 2]
    predicted = predict_folds(x.numpy(), values, five_folds(23), seeds, batch_size=6, epochs=2)
    for target, i in np.ndindex(2, 2):
        expected = np.full(23, np.nan)
        for train, test in five_folds(23):
            mean, std = values[target, train].mean(), values[target, train].std()
            labels = torch.as_tensor((values[target] - mean) / std, dtype=torch.float32)
            head = plain_head(x[train], labels[train], seeds[i], 6, 2)
            expected[test] = head(x[test])[:, 0].detach().numpy() * std + mean
        np.testing.assert_allclose(predicted[target, i], expected, rtol=1e-4, atol=1e-4)


def test_rows_in_no_test_part_have_no_prediction() -> None:
    x, y = data(12)
    splits = [(np.arange(6), np.arange(6, 9)), (np.arange(6), np.arange(9, 11))]
    predicted = predict_folds(x.numpy(), y.numpy()[None], splits, [0], batch_size=4, epochs=1)
    assert np.isnan(predicted[0, 0]).tolist() == [True] * 6 + [False] * 5 + [True]


def test_predictions_follow_the_unit_and_the_zero_of_the_labels() -> None:
    x, y = data(10)
    shifts = np.array([[0.0], [1000.0], [500.0]])
    values = np.outer([1.0, 1e-3, 0.0], y.numpy()) + shifts
    predicted = predict_folds(x.numpy(), values, five_folds(10), [0], 4, epochs=1)[:, 0]
    np.testing.assert_allclose(predicted[1], 1000 + 1e-3 * predicted[0], rtol=0, atol=1e-6)
    assert (np.abs(predicted[2] - 500) < 2).all()


def test_each_seed_reads_its_own_embeddings() -> None:
    x = np.stack([data(15)[0].numpy(), 2 * data(15)[0].numpy()])
    values = data(15)[1].numpy()[None].astype(float)
    both = predict_folds(x, values, five_folds(15), [0, 1], batch_size=4, epochs=1)
    for i in range(2):
        alone = predict_folds(x[i], values, five_folds(15), [i], batch_size=4, epochs=1)
        np.testing.assert_allclose(both[:, i], alone[:, 0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="3 seeds"):
        predict_folds(x, values, five_folds(15), [0, 1, 2], batch_size=4, epochs=1)


def test_targets_on_the_same_formulas_are_embedded_once() -> None:
    calls = []

    def embed(formulas: list[str]) -> np.ndarray:
        calls.append(formulas)
        return np.random.default_rng(0).normal(size=(len(formulas), 5))

    formulas = np.array([f"Na{i}Cl" for i in range(1, 31)])
    values = np.linspace(1, 2, 30)
    targets = [
        Target("a", "1", formulas, values, 1.0, 8),
        Target("b", "1", formulas, 3 * values, 1.0, 8),
        Target("other batches", "1", formulas, values, 1.0, 16),
        Target("other formulas", "1", formulas[::-1], values, 1.0, 8),
    ]
    found = predict_targets(embed, targets, [0, 1], epochs=2)
    assert [names[0] for names in calls] == ["Na1Cl", "Na1Cl", "Na30Cl"]
    assert found["a"].shape == (2, 30)
    for target in targets[2:]:
        alone = predict_targets(embed, [target], [0, 1], epochs=2)[target.name]
        np.testing.assert_array_equal(found[target.name], alone)
    one_part = predict_targets(embed, targets[:1], [0], lambda target: five_folds(30)[:1], 2)["a"]
    assert np.flatnonzero(~np.isnan(one_part[0])).tolist() == five_folds(30)[0][1].tolist()
    np.testing.assert_allclose(found["b"], 3 * found["a"], rtol=1e-4)
    assert not np.allclose(found["a"][0], found["a"][1])


def test_the_digest_is_that_of_what_makes_the_means(tmp_path):
    def digest_of(model, name):
        model.save(tmp_path / name)
        return representation_digest(tmp_path / name)

    model = make("pretraining")
    first = digest_of(model, "first")
    with torch.no_grad():
        for parameter in model.model.encoder.variance_parameters():
            parameter += 1
    assert digest_of(model, "other variance") == first
    trained = fitted(pretrained=tmp_path / "first", freeze_encoder=True)
    assert digest_of(trained, "with a head") == first
    with torch.no_grad():
        model.model.encoder.mean_output.bias += 1
    assert digest_of(model, "other mean") != first
    config = replace(model.config, message_power=1.0)
    assert digest_of(make("pretraining", config=config), "other configuration") != first

"""The representation protocol with a random encoder: pins data, features and protocol at once."""

import numpy as np
import pytest
import torch
from paper_models import encoder_embeddings
from paper_records import prediction_scores
from representation import predict_targets
from search import folds_of
from targets import wetlab_targets

#: Number of formulas, and the MAE of the random start measured independently before this code.
RANDOM_START = {
    "band_gap": (2482, 0.440),
    "formation_enthalpy": (1140, 0.714),
    "metallic": (584, 0.235),
    "estm300_electrical_conductivity": (368, 1.077),
    "estm300_thermal_conductivity": (368, 0.231),
    "estm300_seebeck": (368, 0.479),
    "estm600_electrical_conductivity": (188, 0.664),
    "estm600_thermal_conductivity": (188, 0.224),
    "estm600_seebeck": (188, 0.492),
}


def test_targets_have_the_sizes_of_the_paper(data_dir):
    targets = wetlab_targets(data_dir)
    assert {t.name: len(t.values) for t in targets} == {k: n for k, (n, _) in RANDOM_START.items()}
    assert all(np.isfinite(t.values).all() for t in targets)


@pytest.mark.parametrize("name", ["metallic", "estm600_thermal_conductivity"])
def test_random_start_is_reproduced(data_dir, name):
    torch.set_num_threads(1)
    target = next(t for t in wetlab_targets(data_dir) if t.name == name)
    folds = folds_of(0)
    embed = encoder_embeddings(None, [0], "paper")
    (predictions,) = predict_targets(embed, [target], [0], folds)[name]
    scores = prediction_scores(target, predictions, folds(target), "", "", "", 0)
    errors = scores.loc[scores["metric"] == "mae", "value"].to_numpy()
    assert len(errors) == 5
    # both means are over five folds with about the same spread
    standard_error = np.sqrt(2) * errors.std(ddof=1) / np.sqrt(5)
    assert abs(errors.mean() - RANDOM_START[name][1]) < 2 * standard_error

"""Normalisation where it is not the published example's, which test_reference.py holds it to."""

import torch

from tests.training.test_reference import random_pictures
from training.preprocessing import Preprocess


def test_a_channel_that_never_changes_deviates_by_one_level() -> None:
    images = random_pictures(5, 6) * torch.tensor([1, 0, 1], dtype=torch.uint8)
    preprocess = Preprocess(6)
    preprocess.fit(images)
    stained = images.clone()
    stained[..., 1] = 2  # as a JPEG does it
    assert preprocess(stained)[:, 1].unique().tolist() == [2]

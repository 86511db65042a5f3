"""Normalisation where it is not the published example's, which test_reference.py holds it to."""

import torch

from tests.training.test_reference import random_images
from training.preprocessing import Preprocess


def test_a_channel_that_never_changes_deviates_by_one_level() -> None:
    images = random_images(5, 6) * torch.tensor([1, 0, 1], dtype=torch.uint8)
    preprocess = Preprocess(6)
    preprocess.fit(images)
    stained = images.clone()
    stained[..., 1] = 2  # as a JPEG does it
    assert preprocess(stained)[:, 1].unique().tolist() == [2]


def test_mean_and_variance_are_exact_however_many_images_are_summed_at_once() -> None:
    splits = [random_images(5, 6), random_images(2, 6)]
    values = torch.cat(splits).reshape(-1, 3).double()
    for chunk in (1, 6 * 6, 3 * 6 * 6 + 1, 1 << 22):  # pixels
        preprocess = Preprocess(6)
        preprocess.fit(*splits, chunk=chunk)
        torch.testing.assert_close(preprocess.mean.double(), values.mean(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(preprocess.variance.double(), values.var(0, correction=0), rtol=1e-6, atol=0)

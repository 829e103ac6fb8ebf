"""The demo's data: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, and a classifier for them.

The images ship inside scikit-learn, so nothing is downloaded
(https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html).
"""

from functools import cache

import torch
from sklearn.datasets import load_digits as load_from_sklearn
from sklearn.svm import SVC
from torch import Tensor

NUM_CLASSES = 10
IMAGE_SIZE = 8


def load_digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] float32 in [-1, 1] and labels [1797] int64."""
    data = load_from_sklearn()
    images = torch.from_numpy(data.images).float() / 8 - 1  # the set stores 17 grey levels, 0 to 16
    return images.unsqueeze(1), torch.from_numpy(data.target)


@cache
def _classifier() -> SVC:
    images, labels = load_digits()
    return SVC(gamma=0.03, C=10.0).fit(images.flatten(1).numpy(), labels.numpy())


def read(images: Tensor) -> Tensor:
    """The digit [N] that a support vector classifier trained on the real ones sees in images [N, 1, 8, 8]."""
    return torch.from_numpy(_classifier().predict(images.clamp(-1, 1).flatten(1).float().numpy()))


def agreement(images: Tensor, labels: Tensor) -> float:
    """Share of images [N, 1, 8, 8] in [-1, 1] that :func:`read` as their label."""
    return float((read(images) == labels).float().mean())

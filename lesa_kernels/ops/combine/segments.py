"""Block sizes of the Triton kernels of ``combine``, which are chosen without Triton.

They follow from shapes and dtypes alone, so that equal calls round equally. They were chosen by the compiled code for
sm_90 (registers, width of accesses), not by measurements on a GPU.
"""

from collections.abc import Sequence

THREADS = 128
# A thread of combine_kernel holds 16 bytes of every feature in registers, as float32: 16 features of bf16 take 167
# registers; 32 would spill, so they get 8 bytes. Per channel the coefficients are vectors in registers too: 8 features
# and 6 predictions take 146, and 16 features get 8 bytes.
WIDE_FEATURES, WIDE_FEATURES_PER_CHANNEL = 16, 8
MAX_FEATURES = 32
# Predictions of one launch, for which each feature is read once. More would only lengthen the code.
PREDICTIONS, PREDICTIONS_PER_CHANNEL = 12, 6
# Sums in a thread of dots_kernel: one register each, or per channel one for every element of its vector.
SUMS, SUMS_PER_CHANNEL = 48, 4


def segmentation(feature: Sequence[int], channels: Sequence[int]) -> tuple[int, int, bool] | None:
    """Segments, their length, and whether coefficients [.., *channels] vary along them; None: no kernel exists.

    A feature [B, T, D] is one segment if coefficients are shared, B segments if they are [B, 1, 1], and B * T segments
    if they are [1, 1, D].
    """
    size = 1
    for n in feature:
        size *= n
    if all(c == 1 for c in channels):
        return 1, size, False
    if channels[-1] == feature[-1] and all(c == 1 for c in channels[:-1]):
        return size // feature[-1], feature[-1], True
    if channels[0] == feature[0] and all(c == 1 for c in channels[1:]):
        return feature[0], size // feature[0], False
    return None


def block(features: int, itemsize: int, per_channel: bool) -> int:
    """Elements of a program of combine_kernel."""
    wide = WIDE_FEATURES_PER_CHANNEL if per_channel else WIDE_FEATURES
    return THREADS * (16 if features <= wide else 8) // itemsize


def group(features: int, predictions: int, per_channel: bool) -> int:
    """Rows of history in a program of dots_kernel; the rows of left are read again for every group."""
    return min(features, (SUMS_PER_CHANNEL if per_channel else SUMS) // predictions)


def most_predictions(per_channel: bool) -> int:
    """Rows of left of a launch of dots_kernel."""
    return SUMS_PER_CHANNEL if per_channel else PREDICTIONS

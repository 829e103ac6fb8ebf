"""How a feature is cut into segments, blocks and vectors for the Triton kernels; decided without Triton.

All settings follow from shapes and dtypes, so that equal calls run equal programs and round equally. They were chosen
by what the code compiled for sm_90 shows (registers, width of accesses); no GPU was there to measure on.
"""

from collections.abc import Sequence

THREADS = 128
# A block of combine_kernel gives every thread 16 bytes of every feature, in registers as float32: 16 features of bf16
# take 167 registers, 32 would spill, and get 8 bytes. Per channel the coefficients are vectors, and those loaded ahead
# wait in registers too: 8 features and 6 predictions take 146, and 16 features get 8 bytes.
WIDE_FEATURES, WIDE_FEATURES_PER_CHANNEL = 16, 8
MAX_FEATURES = 32
# Predictions of one launch: each feature is read once for so many. More would only lengthen the code.
PREDICTIONS, PREDICTIONS_PER_CHANNEL = 12, 6
# Sums that a thread of dots_kernel keeps: a register each, or per channel one for every element of its vector.
SUMS, SUMS_PER_CHANNEL = 48, 4


def segmentation(feature: Sequence[int], channels: Sequence[int]) -> tuple[int, int, bool] | None:
    """Segments, their length and whether coefficients [.., *channels] vary along them; None if no kernel serves them.

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
    """Rows of history of a program of dots_kernel; the rows of left are read again for every group."""
    return min(features, (SUMS_PER_CHANNEL if per_channel else SUMS) // predictions)


def most_predictions(per_channel: bool) -> int:
    """Rows of left of a launch of dots_kernel."""
    return SUMS_PER_CHANNEL if per_channel else PREDICTIONS

"""Metrics: PSNR, SSIM, CLIP score, and the images of a pipeline's output."""

import numpy as np
import pytest
import torch
from PIL import Image

from lesa.evaluation import metrics
from lesa.evaluation.images import as_frames, images_of
from lesa.evaluation.metrics import METRICS, choose_metrics, psnr, ssim


def test_psnr_is_computed_for_each_image():
    reference = torch.full((2, 3, 16, 16), 0.5)
    images = reference + torch.tensor([0.1, 0.001]).reshape(2, 1, 1, 1)
    expected = [-20 * np.log10(error) for error in (0.1, 0.001)]
    assert psnr(images, reference).tolist() == pytest.approx(expected, abs=1e-3)
    assert psnr(reference, reference).isinf().all()


def test_psnr_of_a_video_is_computed_over_all_frames():
    reference = torch.full((1, 4, 3, 8, 8), 0.5)
    video = reference.clone()
    video[:, 0] += 0.1
    assert psnr(video, reference).tolist() == pytest.approx([-10 * np.log10(0.01 / 4)], abs=1e-3)


@pytest.mark.parametrize("size", [7, 8, 11, 12, 32])
def test_ssim_is_one_for_equal_images_of_any_size_and_lower_for_others(size):
    images = torch.rand(2, 3, size, size)
    assert ssim(images, images).tolist() == pytest.approx([1, 1])
    other = images.clone()
    other[1] = torch.rand(3, size, size)
    first, second = ssim(other, images).tolist()
    assert first == pytest.approx(1)
    assert second < 0.5


def test_ssim_of_a_video_is_the_mean_of_its_frames():
    video, reference = torch.rand(2, 3, 1, 16, 16), torch.rand(2, 3, 1, 16, 16)
    frames = torch.stack([ssim(video[:, i], reference[:, i]) for i in range(3)], 1)
    torch.testing.assert_close(ssim(video, reference), frames.mean(1))


def test_a_metric_without_local_weights_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nowhere")
    names = [metric.name for metric in choose_metrics()]
    assert names[:2] == ["psnr", "ssim"]
    assert "lpips" not in names
    with pytest.raises(ValueError, match=r"lpips cannot be measured here: .*(pip install|fetches it)"):
        choose_metrics(["psnr", "lpips"])
    with pytest.raises(ValueError, match=r"no metric fid; there are psnr, ssim"):
        choose_metrics(["fid"])


def test_clip_score_compares_each_frame_with_its_prompt(monkeypatch):
    scored = []

    def model(image, text):
        scored.append((image.dtype, tuple(image.shape), text))
        return torch.tensor(float(len(scored)))

    monkeypatch.setattr("torchmetrics.multimodal.clip_score.CLIPScore", lambda name: model)
    videos, call = torch.rand(2, 2, 3, 8, 8), {"prompt": ["a", "b"]}
    with metrics.scoring_models():
        scores = METRICS["clip_score"].measure(videos, videos, call)
    assert scores.tolist() == [1.5, 3.5]
    assert scored == [(torch.uint8, (3, 8, 8), text) for text in ("a", "a", "b", "b")]


def as_pil(array):
    return Image.fromarray(array)


class Output:
    def __init__(self, **made):
        self.__dict__.update(made)


def test_outputs_of_any_type_become_tensors():
    images = torch.rand(2, 3, 4, 5)
    array = (images.movedim(1, -1) * 255).round().byte().numpy()
    rounded = torch.from_numpy(array).movedim(-1, 1) / 255
    torch.testing.assert_close(images_of(Output(images=images)), images)
    torch.testing.assert_close(images_of(Output(images=images.movedim(1, -1).numpy())), images)
    torch.testing.assert_close(images_of(Output(images=[as_pil(a) for a in array])), rounded)
    video = images_of(Output(frames=[[as_pil(a) for a in array]]))
    torch.testing.assert_close(video, rounded[None])
    with pytest.raises(ValueError, match="holds neither images nor frames"):
        images_of(Output(sound=images))


def test_a_grey_image_has_one_channel():
    assert images_of(Output(images=[as_pil(np.zeros((4, 5), np.uint8))])).shape == (1, 1, 4, 5)


def test_videos_become_frames_and_a_single_image_without_a_batch_is_refused():
    assert as_frames(torch.zeros(2, 5, 3, 4, 4))[1] == 5
    with pytest.raises(ValueError, match=r"not \[3, 4, 4\]"):
        as_frames(torch.zeros(3, 4, 4))

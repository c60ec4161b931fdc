"""Compare ReciproCAM with the naive loops of `reference`."""

import numpy as np
import torch

from reference import naive_deep_logits, naive_logits
from vit_reciprocam import ReciproCAM


def assert_equals_reference(model, images, grid, path, **masking):
    expected, unmasked = naive_logits(model, images, grid, **masking)
    explainer = ReciproCAM(model, score="logit", path=path, **masking)
    scores = explainer.scores(images, "all")
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-10)
    assert expected.std(dim=(2, 3)).min() > 1e-4, "the masks make no difference: nothing was tested"
    probabilities = ReciproCAM(model, path=path, **masking).scores(images, "all")
    torch.testing.assert_close(probabilities, expected.softmax(dim=1), rtol=0, atol=1e-10)
    np.testing.assert_allclose(explainer(images).logits, unmasked.float(), rtol=0, atol=1e-6)


def assert_depth_equals_reference(model, images, grid, *, expect_range=1e-4, **settings):
    """Compare logits and evidence; settings are those of `naive_deep_logits`."""
    masking = {name: settings[name] for name in ("kernel", "class_token", "depth")}
    expected, null = naive_deep_logits(model, images, grid, **settings)
    explainer = ReciproCAM(model, score="logit", **masking)
    scores = explainer.scores(images, "all")
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-10, msg=f"{masking}")
    spread = (expected.amax((-2, -1)) - expected.amin((-2, -1))).max()
    assert spread > expect_range, "the masks make no difference: nothing was tested"
    evidence = ReciproCAM(model, normalize="evidence", **masking).scores(images, "all")
    none = null.log_softmax(dim=1)[..., None, None]
    torch.testing.assert_close(evidence, expected.log_softmax(dim=1) - none, rtol=0, atol=1e-10)

"""Compare ReciproCAM with the naive loops of `reference`."""

import numpy as np
import torch

from reference import naive_logits
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

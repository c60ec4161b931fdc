"""The trace equals automatic differentiation with the same quantities held constant."""

import pytest
import torch
from torch import nn

import vit_reciprocam as vr
from conftest import MODELS, tiny_images, tiny_model
from reference import naive_trace
from vit_reciprocam.errors import ModelError
from vit_reciprocam.methods import PRESETS
from vit_reciprocam.methods.baselines import trace, traced

GRID = (2, 3)
# the reference knows the attention and MLP of these
PLAIN = [name for name in MODELS if name != "scale_norms"]


@pytest.mark.parametrize("name", PLAIN)
def test_equals_automatic_differentiation(name):
    model = tiny_model(grid=GRID, **MODELS[name]).double()
    images, targets = tiny_images(GRID).double(), torch.tensor([[0, 3], [4, 4]])
    expected = naive_trace(model, images, targets)
    found = trace(model, images, targets)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found.flatten(2), expected, rtol=0, atol=1e-10)


def test_it_needs_no_gradients():
    model = tiny_model(grid=GRID)
    model.requires_grad_(False)
    free = trace(model, tiny_images(GRID), 1)
    with torch.inference_mode():
        inside = trace(model, tiny_images(GRID), 1)
    torch.testing.assert_close(free, inside)
    assert not free.requires_grad


def test_the_result_keeps_the_sign(tmp_path):
    import timm
    from safetensors.torch import save_model

    save_model(timm.create_model("test_vit").eval(), str(tmp_path / "w.safetensors"))
    classifier = vr.load("timm:test_vit", weights=tmp_path / "w.safetensors")
    picture = vr.classifier.load.ASSETS / "demo.png"
    e = vr.explain(picture, classifier, top=2, method="trace")
    assert e.evidence.min() < 0 < e.evidence.max()
    assert e.maps.min() == 0
    assert e.maps.max() == 1
    assert (e.ranking == e.evidence).all()


def test_a_step_without_a_rule_is_refused():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(12))

        def forward(self, x):
            return x @ self.weight

    model = tiny_model(grid=GRID)
    model.blocks[0].ls1 = Mixing()
    with pytest.raises(ModelError, match="Mixing"):
        trace(model, tiny_images(GRID))


def test_traced_is_evidence_plus_twice_the_trace():
    model, images = tiny_model(grid=GRID, depth=4).double(), tiny_images(GRID).double()
    evidence = vr.reciprocam.reciprocam(model, images, [[1, 2]], **PRESETS["deep"])
    path = trace(model, images, [[1, 2]])
    shares = []
    for part in (evidence, path):
        most = part.amax(dim=(2, 3), keepdim=True)
        size = part.abs().amax(dim=(2, 3), keepdim=True)
        shares.append(part / torch.where(most > 0, most, size))
    torch.testing.assert_close(traced(model, images, [[1, 2]]), shares[0] + 2 * shares[1])

"""Which path runs, what a batch shares, and chunks of masks."""

import numpy as np
import pytest
import torch

from comparison import assert_equals_reference
from conftest import tiny_images, tiny_model
from vit_reciprocam import ReciproCAM
from vit_reciprocam.core.batch import Batch
from vit_reciprocam.errors import ClosedFormError

PATHS = ["closed-form", "direct"]
LAYERS = ["norm1", "block"]


def test_auto_says_what_ran():
    assert ReciproCAM(tiny_model())(tiny_images()).path == "closed-form"
    assert ReciproCAM(tiny_model(), path="direct")(tiny_images()).path == "direct"
    pooled = tiny_model(global_pool="avg")
    assert ReciproCAM(pooled)(tiny_images()).path == "direct"


@pytest.mark.parametrize("pool", ["avg", "avgmax", "max", "map"])
def test_heads_that_read_all_tokens_take_the_direct_path(pool):
    grid = (2, 3)
    model = tiny_model(grid=grid, global_pool=pool).double()
    for layer in LAYERS:
        masking = {"kernel": "gaussian", "class_token": True, "layer": layer}
        assert_equals_reference(model, tiny_images(grid).double(), grid, "auto", **masking)


def test_closed_form_is_refused_with_the_reason():
    with pytest.raises(
        ClosedFormError, match=r"reads all tokens \(global_pool='avg'\).*path='auto'"
    ):
        ReciproCAM(tiny_model(global_pool="avg"), path="closed-form")


def test_hooks_on_the_last_block_take_the_direct_path_and_count():
    model, images = tiny_model().double(), tiny_images().double()
    model.blocks[-1].register_forward_hook(lambda _module, _args, output: output * 1.5)
    with pytest.raises(ClosedFormError, match="the last block has forward hooks"):
        ReciproCAM(model, path="closed-form")
    masking = {"kernel": "gaussian", "class_token": True, "layer": "norm1"}
    assert_equals_reference(model, images, (2, 3), "auto", **masking)


class Adapted(torch.nn.Module):
    """A linear layer with something added, as parameter-efficient fine-tuning does."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.added = torch.nn.Linear(base.in_features, base.out_features, bias=False)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + self.added(x)


def test_a_changed_projection_takes_the_direct_path_and_stays_exact():
    grid, model = (2, 3), tiny_model().double()
    model.blocks[-1].attn.qkv = Adapted(model.blocks[-1].attn.qkv).double()
    masking = {"kernel": "gaussian", "class_token": True, "layer": "norm1"}
    assert_equals_reference(model, tiny_images().double(), grid, "auto", **masking)
    assert ReciproCAM(model)(tiny_images().double()).path == "direct"
    with pytest.raises(ClosedFormError, match="qkv projection is a Adapted, not a plain Linear"):
        ReciproCAM(model, path="closed-form")
    hooked = tiny_model()
    hooked.blocks[-1].attn.qkv.register_forward_hook(lambda _m, _i, out: out * 0.5)
    e = ReciproCAM(hooked)(tiny_images())
    assert e.path == "direct"
    with torch.no_grad():
        np.testing.assert_allclose(e.logits, hooked(tiny_images()), atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_one_cut_serves_other_settings(path):
    model, images = tiny_model(), tiny_images()
    batch = Batch(images)
    ReciproCAM(model)(batch)
    (cut,) = batch.cuts.values()
    for changed in ({"kernel": "dirac"}, {"layer": "block"}, {"class_token": False}):
        explainer = ReciproCAM(model, path=path, **changed)
        whole, reused = explainer(images, "all"), explainer(batch, "all")
        np.testing.assert_array_equal(reused.scores, whole.scores)
        np.testing.assert_array_equal(reused.logits, whole.logits)
    assert list(batch.cuts.values()) == [cut], "G ran once"
    for count, another in enumerate((ReciproCAM(tiny_model(seed=1)), ReciproCAM(model, block=-2))):
        own, shared = another(images, "all"), another(batch, "all")
        np.testing.assert_array_equal(shared.scores, own.scores)
        assert len(batch.cuts) == count + 2, "cut elsewhere, it takes nothing from the others"


@pytest.mark.parametrize("path", PATHS)
def test_chunks_make_no_difference(path):
    model, images = tiny_model(grid=(4, 4)), tiny_images((4, 4))
    whole = ReciproCAM(model, path=path)(images, [[0, 3]])
    in_single_rows = ReciproCAM(model, path=path, memory_limit=1)(images, [[0, 3]])
    np.testing.assert_allclose(in_single_rows.scores, whole.scores, rtol=0, atol=1e-6)
    np.testing.assert_allclose(in_single_rows.logits, whole.logits, rtol=0, atol=1e-6)


def test_progress_counts_masks():
    seen = []
    explainer = ReciproCAM(
        tiny_model(), memory_limit=1, progress=lambda done, count: seen.append((done, count))
    )
    explainer(tiny_images())
    assert seen == [(done, 7) for done in range(1, 8)]

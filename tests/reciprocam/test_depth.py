"""Readout tokens masked in several blocks equal the naive loops; what cannot be is refused."""

import itertools

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comparison import assert_depth_equals_reference
from conftest import MODELS, tiny_images, tiny_model
from vit_reciprocam import ReciproCAM
from vit_reciprocam.core.masks import KERNELS
from vit_reciprocam.errors import ClosedFormError, InputError

GRID = (3, 4)


def readers_of(options):
    return 2 if options.get("distilled") else 1


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_naive_loops_at_every_depth(name, kernel, class_token):
    options = MODELS[name]
    model = tiny_model(grid=GRID, **options).double()
    for depth in range(1, len(model.blocks) + 1):
        assert_depth_equals_reference(
            model,
            tiny_images(GRID).double(),
            GRID,
            kernel=kernel,
            class_token=class_token,
            depth=depth,
            readers=readers_of(options),
        )


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    heads=st.integers(1, 3),
    options=st.fixed_dictionaries({
        "distilled": st.booleans(),
        "qk_norm": st.booleans(),
        "init_values": st.sampled_from([None, 0.2]),
    }),
    kernel=st.sampled_from(list(KERNELS)),
    depth=st.integers(1, 4),
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_equals_the_naive_loops_on_any_grid(grid, heads, options, kernel, depth, seed):
    model = tiny_model(
        grid=grid, embed_dim=4 * heads, num_heads=heads, depth=4, seed=seed, **options
    ).double()
    assert_depth_equals_reference(
        model,
        tiny_images(grid, count=1, seed=seed).double(),
        grid,
        kernel=kernel,
        class_token=True,
        depth=depth,
        readers=readers_of(options),
        expect_range=-1.0,  # on a grid of one patch, masks make no difference
    )


def test_the_all_ones_mask_is_the_prediction_at_any_depth():
    model = tiny_model(grid=(3, 3), depth=3).double()
    images = tiny_images((3, 3)).double()
    plain = model(images)
    for depth in (1, 2, 3):
        # the box of 5x5 around the middle patch keeps the whole 3x3 grid
        scores = ReciproCAM(model, kernel="box5", depth=depth, score="logit").scores(images, "all")
        torch.testing.assert_close(scores[:, :, 1, 1], plain, rtol=0, atol=1e-10)


def test_several_chunks_give_the_same_result():
    model = tiny_model(grid=GRID, depth=3).double()
    images = tiny_images(GRID).double()
    fuse = [{"kernel": "dirac", "depth": 2}, {"kernel": "box", "depth": 3}]
    for setting in ({"depth": 3}, {"fuse": fuse}):
        whole = ReciproCAM(model, normalize="evidence", **setting).scores(images, "all")
        for limit in (1, 20_000):
            parts = ReciproCAM(model, normalize="evidence", memory_limit=limit, **setting)
            torch.testing.assert_close(parts.scores(images, "all"), whole, rtol=0, atol=1e-10)


# --- evidence --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        {"path": "closed-form"},
        {"path": "direct"},
        {"path": "direct", "layer": "block"},
        {"path": "closed-form", "layer": "block", "class_token": False},
        {"path": "direct", "class_token": False, "kernel": "dirac"},
        {"depth": 2},
    ],
    ids=str,
)
def test_evidence_is_the_log_probability_over_that_of_no_patch(setting):
    model = tiny_model(grid=GRID).double()
    images = tiny_images(GRID).double()
    evidence = ReciproCAM(model, normalize="evidence", **setting)(images, "all")
    logged = ReciproCAM(model, score="log-probability", **setting).scores(images, "all")
    spread = evidence.evidence.max() - evidence.evidence.min()
    shift = logged.numpy() - evidence.evidence  # the same for all patches: the all-null mask's
    assert spread > 1e-3
    assert np.ptp(shift, axis=(2, 3)).max() < 1e-6
    null = np.exp(shift[..., 0, 0])
    np.testing.assert_allclose(null.sum(axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(evidence.scores, logged.exp(), rtol=1e-5)


def test_pooled_heads_have_an_all_null_mask_too():
    model = timm.create_model("test_vit", global_pool="avg", class_token=False).eval()
    images = torch.randn(1, 3, 160, 160)
    for path in ("closed-form", "direct"):
        found = ReciproCAM(model, layer="pool", path=path, normalize="evidence")(images, [[0, 5]])
        null = model.head(model.fc_norm(torch.zeros(1, model.embed_dim))).softmax(-1)
        expected = np.log(found.scores / null.detach().numpy()[0, [0, 5]][None, :, None, None])
        np.testing.assert_allclose(found.evidence, expected, atol=2e-5)


def test_maps_are_the_positive_part_of_evidence():
    e = ReciproCAM(tiny_model(grid=GRID), normalize="evidence")(tiny_images(GRID), "all")
    assert (e.evidence < 0).any()
    assert (e.ranking == e.evidence).all()
    positive = np.maximum(e.evidence, 0)
    most = positive.max(axis=(2, 3), keepdims=True)
    np.testing.assert_array_equal(e.maps, positive / np.where(most > 0, most, 1))
    np.testing.assert_array_equal(e.degenerate, most[..., 0, 0] == 0)


def test_fused_evidence_is_the_sum_of_shares():
    model = tiny_model(grid=GRID, depth=3).double()
    images = tiny_images(GRID).double()
    fuse = [
        {"kernel": "dirac", "depth": 2},
        {"kernel": "gaussian", "class_token": False},
        {"kernel": "box", "depth": 3},
    ]
    expected = 0
    for setting in fuse:
        single = ReciproCAM(model, normalize="evidence", **setting).scores(images, "all")
        most = single.amax(dim=(2, 3), keepdim=True)
        expected = expected + single / torch.where(
            most > 0, most, single.abs().amax(dim=(2, 3), keepdim=True)
        )
    fused = ReciproCAM(model, normalize="evidence", fuse=fuse)
    torch.testing.assert_close(fused.scores(images, "all"), expected, rtol=0, atol=1e-10)
    e = fused(images, 1)
    assert e.settings["fuse"][0] == {"kernel": "dirac", "class_token": True, "depth": 2}


def test_fusing_runs_the_model_once():
    model = tiny_model(grid=GRID, depth=4)
    calls = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    fuse = [{"depth": 2}, {"kernel": "box", "depth": 3}]
    ReciproCAM(model, normalize="evidence", fuse=fuse)(tiny_images(GRID))
    assert len(calls) == 1


# --- what cannot be --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"depth": 3}, "depth=3, but the model has 2 blocks"),
        ({"depth": 0}, "depth must be a whole number of blocks, 1 .* or more; got 0"),
        ({"depth": True}, "depth must be a whole number of blocks"),
        ({"depth": 2, "layer": "block"}, "goes with layer='norm1', not 'block'"),
        ({"depth": 2, "layer": "pool"}, "goes with layer='norm1', not 'pool'"),
        ({"depth": 2, "path": "direct"}, "leave out target, block and path='direct'"),
        ({"depth": 2, "block": -2}, "leave out target, block and path='direct'"),
        ({"kernel": "blur"}, "kernel must be one of 'gaussian', 'dirac', 'box', 'box5'"),
        ({"normalize": "max"}, "normalize must be one of 'minmax', 'evidence'; got 'max'"),
        ({"normalize": "evidence", "score": "logit"}, "leave out score='logit'"),
        ({"fuse": [{"depth": 2}]}, "pass normalize='evidence' with it"),
        ({"normalize": "evidence", "fuse": [{"layer": "block"}]}, "class_token, depth, kernel"),
        ({"normalize": "evidence", "fuse": [{}, {}]}, "fuse has a setting twice"),
        ({"normalize": "evidence", "fuse": [{}], "depth": 2}, "leave these out beside it"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(setting, message):
    with pytest.raises(InputError, match=message):
        ReciproCAM(tiny_model(), **setting)


def test_target_has_no_depth():
    model = tiny_model(grid=(2, 3))
    with pytest.raises(InputError, match="leave out target"):
        ReciproCAM(model, target=model.blocks[-1].norm1, grid=(2, 3), prefix_tokens=1, depth=2)


def test_a_head_that_reads_all_tokens_has_no_depth():
    model = tiny_model(global_pool="avg")
    with pytest.raises(ClosedFormError, match=r"head reads all tokens .*\. Use depth=1"):
        ReciproCAM(model, depth=2)


def test_blocks_of_another_kind_end_the_depth():
    class Own(type(tiny_model().blocks[0])):
        def forward(self, x, *args, **kwargs):
            return super().forward(x, *args, **kwargs)

    model = tiny_model(depth=4)
    model.blocks[1].__class__ = Own
    for depth in (3, 4):
        with pytest.raises(
            InputError, match=r"reaches block 3 from the end.* deepest that holds is depth=2"
        ):
            ReciproCAM(model, depth=depth)
    assert ReciproCAM(model, depth=2)(tiny_images()).path == "closed-form"


def test_hooks_in_a_block_before_the_last_end_the_depth():
    model = tiny_model(depth=3)
    model.blocks[1].attn.proj.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="deepest that holds is depth=1"):
        ReciproCAM(model, depth=2)


def test_the_model_is_left_as_it_was():
    model = tiny_model(depth=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ReciproCAM(model, depth=3, normalize="evidence")(tiny_images())
    hooks = [*itertools.chain(*((m._forward_hooks, m._forward_pre_hooks) for m in model.modules()))]
    assert not any(hooks)
    assert all((model.state_dict()[name] == tensor).all() for name, tensor in before.items())

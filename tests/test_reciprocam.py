import copy
import dataclasses
import warnings

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import MODELS, tiny_images, tiny_model
from reference import naive_logits, naive_mask
from vit_reciprocam import ReciproCAM
from vit_reciprocam.core.batch import Batch
from vit_reciprocam.errors import ClosedFormError, InputError, ModelError, UnknownClassError
from vit_reciprocam.libraries.cut_at import cut_at
from vit_reciprocam.libraries.open_clip.split import zero_shot as zero_shot_open_clip
from vit_reciprocam.libraries.timm.split import split as split_timm
from vit_reciprocam.libraries.transformers.split import zero_shot as zero_shot_transformers

PATHS = ["closed-form", "direct"]
KERNELS = ["gaussian", "dirac"]
LAYERS = ["norm1", "block"]


def assert_equals_reference(model, images, grid, path, **masking):
    expected, plain = naive_logits(model, images, grid, **masking)
    explainer = ReciproCAM(model, score="logit", path=path, **masking)
    scores = explainer.scores(images, "all")
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-10)
    assert expected.std(dim=(2, 3)).min() > 1e-4, "the masks make no difference: nothing was tested"
    probabilities = ReciproCAM(model, path=path, **masking).scores(images, "all")
    torch.testing.assert_close(probabilities, expected.softmax(dim=1), rtol=0, atol=1e-10)
    np.testing.assert_allclose(explainer(images).logits, plain.float(), rtol=0, atol=1e-6)


# --- exactness -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_naive_loops(name, kernel, class_token, layer, path):
    grid = (2, 3)
    model = tiny_model(grid=grid, **MODELS[name]).double()
    masking = {"kernel": kernel, "class_token": class_token, "layer": layer}
    assert_equals_reference(model, tiny_images(grid).double(), grid, path, **masking)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 1), (3, 3), (5, 4)])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("path", PATHS)
def test_any_grid(grid, kernel, path):
    model = tiny_model(grid=grid).double()
    expected, _ = naive_logits(
        model, tiny_images(grid).double(), grid, kernel=kernel, class_token=True, layer="norm1"
    )
    explainer = ReciproCAM(model, kernel=kernel, score="logit", path=path)
    scores = explainer.scores(tiny_images(grid).double(), "all")
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    heads=st.integers(1, 3),
    options=st.fixed_dictionaries({
        "distilled": st.booleans(),
        "qk_norm": st.booleans(),
        "qkv_bias": st.booleans(),
        "init_values": st.sampled_from([None, 0.2]),
        "depth": st.integers(1, 3),
    }),
    masking=st.fixed_dictionaries({
        "kernel": st.sampled_from(KERNELS),
        "class_token": st.booleans(),
        "layer": st.sampled_from(LAYERS),
    }),
    spread=st.sampled_from([0.05, 0.3, 1.0, 4.0]),  # the last makes attention all but one-hot
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_closed_form_equals_the_naive_loops_everywhere(grid, heads, options, masking, spread, seed):
    model = tiny_model(
        grid=grid, embed_dim=4 * heads, num_heads=heads, spread=spread, seed=seed, **options
    ).double()
    images = tiny_images(grid, count=1, seed=seed).double()
    expected, _ = naive_logits(model, images, grid, **masking)
    scores = ReciproCAM(model, score="logit", path="closed-form", **masking).scores(images, "all")
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(scores / scale, expected / scale, rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("reference", "kernel", "class_token"),
    [
        ("gaussian", "gaussian", True),
        ("gaussian_no_class_token", "gaussian", False),
        ("dirac", "dirac", True),
        ("dirac_no_class_token", "dirac", False),
    ],
)
def test_equals_an_independent_implementation_on_deit_tiny(
    reference, kernel, class_token, path, shared_data, deit_tiny_weights, reference_images
):
    model = timm.create_model("deit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(deit_tiny_weights))
    images, labels = reference_images
    with np.load(shared_data / "reference" / "openvino_xai_logits.npz") as data:
        expected = data[reference]
    explainer = ReciproCAM(model, kernel=kernel, class_token=class_token, score="logit", path=path)
    scores = explainer.scores(images, labels)[:, 0].numpy()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=5e-5)


def test_huge_attention_scores_do_not_overflow_in_float32():
    model = tiny_model(grid=(3, 3), spread=6.0)
    closed = ReciproCAM(model, path="closed-form").scores(tiny_images((3, 3)), "all")
    direct = ReciproCAM(model, path="direct").scores(tiny_images((3, 3)), "all")
    assert closed.isfinite().all()
    torch.testing.assert_close(closed, direct, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    model, images = tiny_model(), tiny_images()
    expected = ReciproCAM(model).scores(images, "all")
    half = ReciproCAM(copy.deepcopy(model).to(dtype)).scores(images.to(dtype), "all")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0, atol=0.05)


def test_autocast():
    model, images = tiny_model(), tiny_images()
    expected = ReciproCAM(model).scores(images, "all")
    with torch.autocast("cpu", torch.bfloat16):
        scores = ReciproCAM(model).scores(images, "all")
    torch.testing.assert_close(scores.float(), expected, rtol=0, atol=0.05)


# --- paths and chunks ------------------------------------------------------------------------


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


@pytest.mark.parametrize("path", PATHS)
def test_chunks_make_no_difference(path):
    model, images = tiny_model(grid=(4, 4)), tiny_images((4, 4))
    whole = ReciproCAM(model, path=path)(images, [[0, 3]])
    in_single_rows = ReciproCAM(model, path=path, memory_limit=1)(images, [[0, 3]])
    np.testing.assert_allclose(in_single_rows.scores, whole.scores, rtol=0, atol=1e-6)
    np.testing.assert_allclose(in_single_rows.logits, whole.logits, rtol=0, atol=1e-6)


# --- targets ---------------------------------------------------------------------------------


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


def test_prediction_is_the_models_own():
    model, images = tiny_model(), tiny_images()
    e = ReciproCAM(model)(images)
    with torch.no_grad():
        logits = model(images)
    np.testing.assert_allclose(e.logits, logits, rtol=0, atol=1e-6)
    np.testing.assert_allclose(e.probs, logits.softmax(dim=1), rtol=0, atol=1e-6)
    assert e.targets[:, 0].tolist() == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (3, [[3], [3]]),
        ([1, 4], [[1], [4]]),
        (torch.tensor([1, 4]), [[1], [4]]),
        ([[1, 2, 0]], [[1, 2, 0], [1, 2, 0]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ("all", [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        (lambda logits: logits.argsort(axis=1)[:, :1] * 0 + 2, [[2], [2]]),
    ],
)
def test_targets_pick_their_classes_from_all(targets, expected):
    model, images = tiny_model(), tiny_images()
    every = ReciproCAM(model)(images, "all")
    e = ReciproCAM(model)(images, targets)
    assert e.targets.tolist() == expected
    picked = np.take_along_axis(every.scores, np.array(expected)[:, :, None, None], axis=1)
    np.testing.assert_array_equal(e.scores, picked)
    assert e.maps.shape == e.scores.shape == (2, len(expected[0]), 2, 3)
    assert e.maps.dtype == e.scores.dtype == np.float32


def test_maps_are_scores_scaled_to_the_unit_interval():
    e = ReciproCAM(tiny_model())(tiny_images(), "all")
    np.testing.assert_array_equal(e.maps.min(axis=(2, 3)), 0)
    np.testing.assert_array_equal(e.maps.max(axis=(2, 3)), 1)
    one = e.scores[1, 3]
    np.testing.assert_allclose(e.maps[1, 3], (one - one.min()) / (one.max() - one.min()), atol=1e-6)
    assert not e.degenerate.any()


def test_a_single_patch_has_no_preference():
    e = ReciproCAM(tiny_model(grid=(1, 1)))(tiny_images((1, 1)))
    assert e.degenerate.all()
    assert (e.maps == 0).all()


# --- the user's model is left as it is ---------------------------------------------------------


def state_of(model):
    return {
        "mode": [m.training for m in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "parameters": [
            (name, p.dtype, p.device, p.requires_grad, p.grad, p.data_ptr())
            for name, p in model.named_parameters()
        ],
        "buffers": [(name, b.data_ptr()) for name, b in model.named_buffers()],
        "values": [p.detach().clone() for p in model.state_dict().values()],
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "grad": torch.is_grad_enabled(),
    }


def assert_same(before, after):
    values = zip(before.pop("values"), after.pop("values"), strict=True)
    assert before == after
    assert all(torch.equal(a, b) for a, b in values)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layer", LAYERS)
def test_model_is_left_as_it_was(path, layer):
    model = tiny_model(qk_norm=True, reg_tokens=1)
    next(model.parameters()).requires_grad_(False)
    model.blocks[0].register_forward_hook(lambda *_: None)
    before = state_of(model)
    ReciproCAM(model, path=path, layer=layer)(tiny_images().requires_grad_())
    assert_same(before, state_of(model))


@pytest.mark.parametrize("path", PATHS)
def test_model_is_left_as_it_was_after_a_failure(path):
    model = tiny_model()
    explainer = ReciproCAM(model, path=path)
    fail = model.head.register_forward_hook(lambda *_: 1 / 0)
    before = state_of(model)
    with pytest.raises(ZeroDivisionError):
        explainer(tiny_images())
    with pytest.raises(InputError):
        explainer(tiny_images() * float("nan"))
    assert_same(before, state_of(model))
    fail.remove()


def test_changed_weights_and_heads_are_seen_by_the_same_explainer():
    model, images = tiny_model(), tiny_images()
    explainer = ReciproCAM(model)
    before = explainer(images, 0).scores
    model.load_state_dict(tiny_model(seed=5).state_dict())
    np.testing.assert_array_equal(explainer(images, 0).scores, ReciproCAM(model)(images, 0).scores)
    assert np.abs(explainer(images, 0).scores - before).max() > 1e-3
    model.reset_classifier(2)
    assert explainer(images, "all").scores.shape[1] == 2


def test_inference_tensors():
    model = tiny_model()
    with torch.inference_mode():
        images = tiny_images()
        e = ReciproCAM(model)(images)
    np.testing.assert_allclose(e.scores, ReciproCAM(model)(tiny_images()).scores, atol=1e-6)
    assert ReciproCAM(model)(images).path == "closed-form"


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(3, 8, 12), r"\(B, 3, H, W\), got \(3, 8, 12\); add the batch dimension"),
        (torch.zeros(1, 3, 8, 8), "takes images of 8x12 pixels .*, got 8x8. Resize them"),
        (torch.zeros(1, 1, 8, 12), r"takes 3 channel\(s\), got images of 1"),
        (torch.zeros(0, 3, 8, 12), "empty batch"),
        (torch.zeros(1, 3, 8, 12).double(), "images are torch.float64 and the model torch.float32"),
        (torch.zeros(1, 3, 8, 12, device="meta"), "images are on the meta device"),
        (np.zeros((1, 3, 8, 12)), "must be a torch.Tensor .* got ndarray"),
    ],
)
def test_images_that_do_not_fit(images, words):
    with pytest.raises(InputError, match=words):
        ReciproCAM(tiny_model())(images)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_input_names_the_image(value):
    images = tiny_images(count=3)
    images[1, 0, 2, 2] = value
    with pytest.raises(InputError, match=r"NaN or infinity: image\(s\) 1 of the batch"):
        ReciproCAM(tiny_model())(images)


def test_nan_in_the_weights():
    model = tiny_model()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="logits hold NaN or infinity"):
        ReciproCAM(model)(tiny_images())


@pytest.mark.parametrize(
    ("targets", "error", "words"),
    [
        (5, UnknownClassError, "class 5 does not exist: the model has 5 classes, 0 to 4"),
        (-1, UnknownClassError, "class -1 does not exist"),
        ([0, 1, 2], InputError, r"shape \(3,\) do not fit 2 image\(s\).*pass \[\[0, 1, 2\]\]"),
        ([[0], [1], [2]], InputError, r"shape \(3, 1\) do not fit"),
        ([[]], InputError, "targets"),
        ([[0, 1], [2]], InputError, r"got \[\[0, 1\], \[2\]\]"),
        (1.5, InputError, "must be integers; got float64"),
        (True, InputError, "must be integers; got bool"),
        ("cat", InputError, "'all'.*got 'cat'"),
    ],
)
def test_targets_that_do_not_fit(targets, error, words):
    with pytest.raises(error, match=words):
        ReciproCAM(tiny_model())(tiny_images(), targets)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kernel": "box"}, "kernel must be one of"),
        ({"layer": "norm2"}, "layer must be one of"),
        ({"score": "softmax"}, "score must be one of 'probability', 'logit'; got 'softmax'"),
        ({"path": "fast"}, "path must be one of 'auto', 'closed-form', 'direct'; got 'fast'"),
        ({"memory_limit": 0}, "memory_limit must be a positive"),
    ],
)
def test_settings_that_do_not_exist(settings, words):
    with pytest.raises(InputError, match=words):
        ReciproCAM(tiny_model(), **settings)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            timm.create_model("test_resnet"),
            "ResNet is not supported: it has no attention",
        ),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear is not a supported model"),
        (timm.create_model("test_vit", features_only=True), "not a classifier but gives features"),
        (None, "must be a torch.nn.Module, got NoneType"),
        ("deit", "must be a torch.nn.Module, got str"),
        (tiny_model(num_classes=0), "no classification head.*reset_classifier"),
        (tiny_model(global_pool="", class_token=True), "no pooling"),
    ],
)
def test_models_that_cannot_be_explained(model, words):
    with pytest.raises(ModelError, match=words):
        ReciproCAM(model)


def test_blocks_without_a_norm_are_refused_by_name():
    model = tiny_model()
    model.blocks.append(torch.nn.Linear(12, 12))
    with pytest.raises(ModelError, match="last encoder block is a Linear"):
        ReciproCAM(model)


def test_code_and_hooks_that_running_the_parts_would_bypass_are_refused():
    class Mine(type(tiny_model())):
        def forward(self, x):
            return super().forward(x) * 2

    model = tiny_model()
    model.__class__ = Mine
    with pytest.raises(ModelError, match="Mine has a forward of its own"):
        ReciproCAM(model)
    model = tiny_model()
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="has forward hooks"):
        ReciproCAM(model)


def test_hooks_on_the_last_block_take_the_direct_path_and_count():
    model, images = tiny_model().double(), tiny_images().double()
    model.blocks[-1].register_forward_hook(lambda _module, _args, output: output * 1.5)
    with pytest.raises(ClosedFormError, match="the last block has forward hooks"):
        ReciproCAM(model, path="closed-form")
    masking = {"kernel": "gaussian", "class_token": True, "layer": "norm1"}
    assert_equals_reference(model, images, (2, 3), "auto", **masking)


def test_scripted_and_compiled_models_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, but traced models are about
        traced = torch.jit.trace(tiny_model(), tiny_images(), check_trace=False)
    with pytest.raises(ModelError, match=r"scripted.*pass the original"):
        ReciproCAM(traced)
    with pytest.raises(ModelError, match=r"compiled.*_orig_mod"):
        ReciproCAM(torch.compile(tiny_model()))


def test_progress_counts_masks():
    seen = []
    explainer = ReciproCAM(
        tiny_model(), memory_limit=1, progress=lambda done, count: seen.append((done, count))
    )
    explainer(tiny_images())
    assert seen == [(done, 7) for done in range(1, 8)]


# --- a user's own module ---------------------------------------------------------------------


class Own(torch.nn.Module):
    """Convolutions and one attention, of no library."""

    def __init__(self, grid_output):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 12, 4, stride=4)
        self.norm = torch.nn.LayerNorm(12)
        self.mix = torch.nn.Linear(12, 12)
        self.attention = torch.nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = torch.nn.Linear(12, 5)
        self.grid_output = grid_output

    def forward(self, images):
        x = self.embed(images).permute(0, 2, 3, 1)
        if not self.grid_output:
            x = x.flatten(1, 2)
        x = (x + self.mix(self.norm(x))).reshape(len(images), -1, 12)
        return self.head(self.attention(x, x, x, need_weights=False)[0].amax(dim=1))


@pytest.mark.parametrize(
    ("target", "grid_output", "shape"),
    [
        ("norm", True, (2, 3, 1)),  # (B, h, w, D)
        ("norm", False, (6, 1)),  # (B, T, D)
        ("embed", True, (2, 3)),  # (B, D, h, w)
    ],
)
def test_a_module_of_ones_own(target, grid_output, shape):
    torch.manual_seed(0)
    model, grid = Own(grid_output).double().eval(), (2, 3)
    module = getattr(model, target)
    images = tiny_images(grid).double()
    explainer = ReciproCAM(model, target=module, score="logit", grid=grid)
    scores = explainer.scores(images, "all")
    expected = torch.empty(2, 5, *grid, dtype=torch.float64)
    for row, column in np.ndindex(*grid):
        mask = naive_mask(grid, row, column, "gaussian", 0, True)
        mask = torch.tensor(mask, dtype=torch.float64).view(shape)
        hook = module.register_forward_hook(lambda _m, _i, out, mask=mask: out * mask)
        expected[:, :, row, column] = model(images).detach()
        hook.remove()
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    assert explainer(images).path == "direct"
    assert not any(module._forward_hooks for module in model.modules())


def test_target_equals_the_adapter_on_a_vit():
    model, images = tiny_model(grid=(2, 3), reg_tokens=2), tiny_images((2, 3))
    expected = ReciproCAM(model).scores(images, "all")
    by_hand = ReciproCAM(model, target=model.blocks[-1].norm1, grid=(2, 3), prefix_tokens=3)
    torch.testing.assert_close(by_hand.scores(images, "all"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"grid": (2, 2)},
            r"grid=\(2, 2\) is 4 patches, but the target LayerNorm gives \(2, 6, 12\): 6 tokens",
        ),
        ({}, r"gives \(2, 6, 12\): say how the patches lie with grid=\(h, w\)"),
        ({"target": "embed"}, r"Conv2d gives \(2, 12, 2, 3\): say how the patches lie with grid="),
        (
            {"target": "embed", "grid": (3, 2)},
            r"\(2, 12, 2, 3\), in which grid=\(3, 2\) is neither of \(B, h, w, D\) nor of",
        ),
        ({"target": "embed", "grid": (2, 3), "prefix_tokens": 1}, "has no prefix"),
        ({"grid": 6}, r"grid must be \(h, w\), two positive whole numbers of patches, got 6"),
        ({"grid": (6,)}, r"grid must be .* got \(6,\)"),
        ({"grid": (-2, -3)}, r"grid must be .* got \(-2, -3\)"),
        ({"grid": (1.5, 4)}, r"grid must be .* got \(1\.5, 4\)"),
        ({"grid": (2, 3), "prefix_tokens": -1}, "whole number and not negative, got -1"),
        ({"grid": (2, 3), "prefix_tokens": "1"}, "whole number and not negative, got '1'"),
        ({"grid": (2, 3), "layer": "block"}, "leave out layer and block"),
        ({"target": torch.nn.Linear(1, 1)}, "one of the model's own modules"),
        ({"target": "head", "grid": (1, 1)}, "must give tokens"),
        ({"target": None, "grid": (2, 3)}, "go with target"),
        ({"grid": (2, 3), "split": split_timm}, "leave out one"),
        (
            {"target": None, "split": split_timm, "layer": "pool"},
            "leave out layer='pool' and block",
        ),
        ({"target": None, "split": split_timm, "block": -2}, "leave out layer='pool' and block"),
        ({"target": None, "split": split_timm, "grid": (2, 3)}, "go with target"),
        ({"target": None, "split": "timm"}, "split must be a function, got str"),
        ({"target": None, "split": lambda model: model}, "Split, but gave VisionTransformer"),
    ],
)
def test_targets_that_make_no_sense(settings, words):
    model = Own(grid_output=False).eval()
    target = settings.get("target", model.norm)
    target = getattr(model, target) if isinstance(target, str) else target
    explained = tiny_model() if target is None else model
    with pytest.raises(InputError, match=words):
        ReciproCAM(explained, **(settings | {"target": target}))(tiny_images())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layout_that_may_be_two_is_refused():
    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Conv2d(3, 2, 4, stride=4)

        def forward(self, images):
            return self.embed(images).mean(dim=(2, 3))

    model = Square().eval()
    explainer = ReciproCAM(model, target=model.embed, grid=(2, 2))
    with pytest.raises(InputError, match=r"may be \(B, h, w, D\) or \(B, D, h, w\)"):
        explainer(tiny_images((2, 2)))


class TokensFirst(torch.nn.Module):
    """torch's encoder layer by its defaults, on (T, B, D)."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 12, 4, stride=4)
        self.encoder = torch.nn.TransformerEncoderLayer(12, 3, 24)
        self.head = torch.nn.Linear(12, 5)

    def forward(self, images):
        return self.head(self.encoder(self.embed(images).flatten(2).permute(2, 0, 1)).mean(dim=0))


class Windows(torch.nn.Module):
    """Two windows an image, in the batch dimension."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 12, 4, stride=4)
        self.encoder = torch.nn.LayerNorm(12)
        self.head = torch.nn.Linear(12, 5)

    def forward(self, images):
        windows = self.embed(images).flatten(2).mT.reshape(-1, 3, 12)
        return self.head(self.encoder(windows).view(len(images), 6, 12).amax(dim=1))


@pytest.mark.parametrize(
    ("build", "grid", "count", "words"),
    [
        (TokensFirst, (2, 3), 6, r"gives 6 rows for 7 image\(s\), \(6, 7, 12\): .* \(T, B, D\)"),
        (TokensFirst, (2, 3), 4, r"gives 6 rows for 4 image\(s\)"),
        (TokensFirst, (1, 1), 1, r"gives 6 rows for 1 image\(s\)"),
        (Windows, (1, 3), 2, r"gives 4 rows for 2 image\(s\), .* windows in its batch"),
    ],
)
def test_tokens_that_do_not_lie_one_row_an_image_are_refused(build, grid, count, words):
    model = build().eval()
    # one mask at a time: with six images and six tokens no shape would be wrong
    explainer = ReciproCAM(model, target=model.encoder, grid=grid, memory_limit=1)
    with pytest.raises(InputError, match=words):
        explainer(tiny_images(count=count))


def test_as_many_tokens_as_images_is_no_mistake():
    torch.manual_seed(0)
    model = Own(grid_output=False).double().eval()
    explainer = ReciproCAM(model, target=model.norm, grid=(2, 3))
    images = tiny_images(count=6).double()
    torch.testing.assert_close(
        explainer.scores(images, "all")[:2], explainer.scores(images[:2], "all")
    )


def test_a_model_that_joins_its_images_is_refused():
    model = Own(grid_output=False).eval()
    model.head.register_forward_hook(lambda _module, _args, output: output.mean(0, keepdim=True))
    explainer = ReciproCAM(model, target=model.norm, grid=(2, 3))
    with pytest.raises(ModelError, match="one row of logits an image, but gave 1 for 2 images"):
        explainer(tiny_images())


class DropsOnItsOwn(Own):
    def forward(self, images):
        return torch.nn.functional.dropout(super().forward(images), 0.5, self.training)


@pytest.mark.parametrize("how", ["target", "split"])
def test_ones_own_code_in_training_mode_is_refused(how):
    model = DropsOnItsOwn(grid_output=False).eval()
    cut = {"target": model.norm, "grid": (2, 3)}
    if how == "split":
        made = cut_at(model.norm, grid=(2, 3))(model)
        cut = {"split": lambda _model: made}
    explainer = ReciproCAM(model, **cut)
    assert explainer(tiny_images()).path == "direct"
    model.training = True  # of itself, but of no module inside
    with pytest.raises(ModelError, match=r"the model is in training mode, .*call model\.eval\(\)"):
        explainer(tiny_images())
    model.eval().mix.train()
    with pytest.raises(ModelError, match=r"its mix \(Linear\) is in training mode"):
        ReciproCAM(model, **cut)
    assert model.mix.training
    assert not model.training


@pytest.mark.parametrize("layer", LAYERS)
def test_a_split_of_ones_own(layer):
    model, images = tiny_model(reg_tokens=1), tiny_images()
    called = []

    def split(given):
        called.append(given)
        return split_timm(given)

    explainer = ReciproCAM(model, split=split, layer=layer)
    expected = ReciproCAM(model, layer=layer)(images, "all")
    e = explainer(images, "all")
    np.testing.assert_array_equal(e.scores, expected.scores)
    assert e.path == expected.path == "closed-form"
    model.load_state_dict(tiny_model(seed=5, reg_tokens=1).state_dict())
    np.testing.assert_array_equal(
        explainer(images, "all").scores, ReciproCAM(model, layer=layer)(images, "all").scores
    )
    assert all(one is model for one in called)


def test_a_split_that_promises_a_closed_form_without_a_readout():
    model = Own(grid_output=False).eval()
    made = cut_at(model.norm, grid=(2, 3))(model)
    made = dataclasses.replace(made, direct_because="")
    with pytest.raises(ModelError, match="no readout: say so in its direct_because"):
        ReciproCAM(model, split=lambda _model: made)(tiny_images())


# --- prompts as classes ------------------------------------------------------------------------


def codes(texts, length=8):
    """Texts as numbers, one a letter, between a start and an end."""
    rows = [[0, *(2 + ord(letter) % 40 for letter in text[: length - 2]), 49] for text in texts]
    return torch.tensor([row + [49] * (length - len(row)) for row in rows])


def clip_of_transformers():
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3}
    text = sizes | {"vocab_size": 50, "max_position_embeddings": 8}
    text |= {"bos_token_id": 0, "eos_token_id": 49}
    vision = sizes | {"intermediate_size": 24, "patch_size": 4, "image_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config).eval()

    def tokenizer(texts, **_options):
        return {"input_ids": codes(texts)}

    def embed(texts):
        return model.get_text_features(**tokenizer(texts)).pooler_output

    return zero_shot_transformers, model, tokenizer, embed


def clip_of_open_clip():
    vision = open_clip.CLIPVisionCfg(layers=1, width=12, head_width=4, patch_size=4, image_size=8)
    text = open_clip.CLIPTextCfg(width=8, heads=2, layers=1, context_length=8, vocab_size=50)
    model = open_clip.CLIP(8, vision_cfg=vision, text_cfg=text).eval()
    return zero_shot_open_clip, model, codes, lambda texts: model.encode_text(codes(texts))


CLIPS = [clip_of_transformers, clip_of_open_clip]


@torch.no_grad()
@pytest.mark.parametrize("build", CLIPS)
def test_only_a_templates_own_place_is_filled(build):
    torch.manual_seed(0)
    zero_shot, model, tokenizer, embed = build()
    made = zero_shot(model, tokenizer, ["ab", "{}"], ["{} {x}"])
    expected = torch.nn.functional.normalize(embed(["ab {x}", "{} {x}"]), dim=-1)
    torch.testing.assert_close(made.prompts, expected)
    assert (made.prompts[0] - made.prompts[1]).abs().max() > 1e-3


@pytest.mark.parametrize("build", CLIPS)
@pytest.mark.parametrize(
    ("prompts", "templates", "words"),
    [
        ("dog", ["{}"], "prompts must be a list of at least one text, got 'dog'"),
        ([], ["{}"], "prompts must be a list"),
        ([3], ["{}"], "prompts must be a list"),
        (3, ["{}"], "prompts must be a list of at least one text, got 3"),
        (["dog"], "{}", "templates must be a list"),
        (["dog"], ["a photo"], "template 'a photo' has no place {} for the prompt"),
        (["dog"], ["{}", "{0}"], r"template '\{0\}' has no place"),
    ],
)
def test_prompts_that_cannot_be_used(build, prompts, templates, words):
    zero_shot, model, tokenizer, _ = build()
    with pytest.raises(InputError, match=words):
        zero_shot(model, tokenizer, prompts, templates)


@pytest.mark.parametrize("build", CLIPS)
def test_prompts_are_not_embedded_in_training_mode(build):
    zero_shot, model, tokenizer, _ = build()
    with pytest.raises(ModelError, match=r"CLIP.* is in training mode: call model\.eval\(\) first"):
        zero_shot(model.train(), tokenizer, ["dog"])
    assert all(module.training for module in model.modules())


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


def test_very_large_finite_pixels_are_not_called_nan():
    e = ReciproCAM(tiny_model())(torch.full((1, 3, 8, 12), 3e36))
    assert np.isfinite(e.logits).all()


def test_a_distilled_model_in_distilled_training():
    model = tiny_model(distilled=True).train()
    model.set_distilled_training(True)
    with pytest.raises(ModelError, match=r"two outputs in distilled training: call model\.eval"):
        ReciproCAM(model)


def test_one_module_in_training_mode_is_enough():
    model = tiny_model(drop_path_rate=0.2)
    explainer = ReciproCAM(model)
    model.blocks[-1].train()
    with pytest.raises(ModelError, match="training mode"):
        explainer(tiny_images())


def test_training_mode_matters_only_where_it_changes_the_output():
    images = tiny_images()
    without_dropout = tiny_model().train()
    assert ReciproCAM(without_dropout)(images).path == "closed-form"
    model = tiny_model(drop_path_rate=0.2)
    explainer = ReciproCAM(model)
    model.train()
    with pytest.raises(
        ModelError, match=r"training mode and its blocks\.1\.drop_path1.*model\.eval\(\)"
    ):
        explainer(images)
    assert model.training

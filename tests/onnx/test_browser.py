"""The page of examples/browser in a real browser: it shows what Python computes, sends nothing."""

import base64
import functools
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import vit_reciprocam as vr
from onnx import TensorProto, helper, numpy_helper
from vit_reciprocam.classifier.load import ASSETS
from vit_reciprocam.core.masks import Masking
from vit_reciprocam.onnx.contract import Metadata
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.pictures.render import colorize, enlarge
from vit_reciprocam.pictures.scenes import draw_scene

expect.set_options(timeout=60_000)
EXAMPLE = Path(__file__).parents[2] / "examples" / "browser"
# What the page itself would load is loaded: `import` gives the modules that it runs.
RUN = """async (name) => {
  const [{ open, explain }, { decode, pixelsOf, tensor, view }, { minMax }] =
    await Promise.all(["model", "picture", "map"].map((each) => import(`./${each}.js`)));
  const onnx = await (await fetch("demo.onnx")).arrayBuffer();
  const model = await open(new Uint8Array(onnx), "demo.onnx");
  const picture = await decode(await (await fetch(name)).blob());
  const { preprocess } = model.metadata;
  const found = await explain(model, tensor(view(pixelsOf(picture), preprocess), preprocess));
  const scores = [...found.scores.values()];
  return JSON.stringify({
    probs: [...found.probabilities],
    scores: scores.map((each) => [...each]),
    maps: scores.map((each) => [...minMax(each).map]),
  });
}"""
VIEW = """async ([base64, width, height, preprocess]) => {
  const { region, view } = await import("./picture.js");
  const data = Uint8ClampedArray.from(atob(base64), (letter) => letter.charCodeAt(0));
  const seen = view({ data, width, height }, preprocess);
  const { x, y, width: across, height: down } = region({ width, height }, preprocess);
  return [[...seen.data], [x, y, x + across, y + down]];
}"""
DROPPED = """([name, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name));
  return transfer;
}"""
COUNT_RUNS = """async () => {
  const { InferenceSession } = await import("./ort.wasm.bundle.min.mjs");
  const run = InferenceSession.prototype.run;
  window.runs = 0;
  InferenceSession.prototype.run = function (...given) {
    window.runs += 1;
    return run.apply(this, given);
  };
}"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the page as it is served."""
    reason = None
    if not shutil.which("node"):
        reason = "needs Node.js"
    elif not (EXAMPLE / "node_modules" / "onnxruntime-web").is_dir():
        reason = "needs the page's one package: make browser"
    if reason and os.environ.get("VIT_RECIPROCAM_REQUIRE_DATA"):
        pytest.fail(f"VIT_RECIPROCAM_REQUIRE_DATA is set, but this {reason}")
    if reason:
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("page")
    subprocess.run(["node", EXAMPLE / "build.mjs", out], check=True, capture_output=True)
    return out


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(built):
    handler = functools.partial(Quiet, directory=built)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(built, chromium):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Open the page; at the end no other server was asked for anything, and nothing broke."""
    contexts, elsewhere, broken = [], [], []

    def guard(route):
        if route.request.url.startswith((address, "blob:" + address, "data:")):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    def opened(*, script=None, ready=True, **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        context.route("**/*", guard)
        if script:
            context.add_init_script(script)
        page = context.new_page()
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.on("request", lambda request: broken.append(request.url) if page.asked else None)
        page.asked = False
        page.goto(address)
        if ready:
            expect(page.locator("#status")).to_contain_text("demo.png: ")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not elsewhere
    assert not broken


@pytest.fixture(scope="module")
def demo():
    return vr.load("demo")


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def drop(page, name, content):
    transfer = page.evaluate_handle(DROPPED, [name, base64.b64encode(content).decode()])
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})


def drop_and_wait(page, name, content, *, model=""):
    drop(page, name, content)
    expect(page.locator("#status")).to_contain_text(f"{name}: ")


def refused(page, name, content):
    drop(page, name, content)
    expect(page.locator("#error")).to_be_visible(timeout=60_000)
    return page.inner_text("#error")


def rows(page):
    """Return name -> probability of the classes in the list, in its order."""
    return dict(
        page.eval_on_selector_all(
            ".class[data-probability]",
            "all => all.map(e => [e.querySelector('.name').innerText, +e.dataset.probability])",
        )
    )


def canvas(page, name):
    """Return the pixels of a canvas, (height, width, 3)."""
    url = page.evaluate("name => document.getElementById(name).toDataURL()", name)
    image = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    return np.asarray(image.convert("RGB"))


def expected_colours(e, index, size):
    return colorize(enlarge(e.maps[0, index], size)).astype(int)


# --- the same numbers as in Python ---------------------------------------------------------------


def seen(page, image, preprocess):
    """Return the pixels that the page would give the model, and where in the picture they lie."""
    data = base64.b64encode(image.convert("RGBA").tobytes()).decode()
    pixels, box = page.evaluate(VIEW, [data, *image.size, preprocess.to_dict()])
    return np.array(pixels, np.uint8).reshape(*preprocess.size, 4)[..., :3], tuple(box)


PICTURES = {
    "shrunk and cropped": ((173, 131), {"size": (56, 56), "crop_pct": 0.9}),
    "upright, odd margins": ((67, 80), {"size": (32, 32), "crop_pct": 0.81, "half": "down"}),
    "enlarged": ((20, 31), {"size": (48, 48)}),
    "not square": ((90, 75), {"size": (40, 64), "crop_pct": 0.875}),
    "squashed": ((64, 33), {"size": (32, 48), "resize": "squash", "interpolation": "bilinear"}),
    "lanczos": ((101, 77), {"size": (30, 30), "crop_pct": 1.0, "interpolation": "lanczos"}),
    "as it is": ((24, 24), {"size": (24, 24), "crop_pct": 1.0}),
}


def test_the_model_sees_the_same_pixels_to_the_last_bit(open_page):
    page = open_page()
    rng = np.random.default_rng(0)
    for name, ((width, height), options) in PICTURES.items():
        pixels = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        pixels[: height // 2] = np.where(pixels[: height // 2] > 127, 255, 0)  # filters overshoot
        preprocess = Preprocess(**options)
        image = Image.fromarray(pixels)
        got, box = seen(page, image, preprocess)
        np.testing.assert_array_equal(got, preprocess.view(image), err_msg=name)
        assert box == preprocess.box(image), name


def test_tall_pictures_differ_by_a_rounding_of_bytes(open_page):
    page = open_page()  # since version 13 Pillow resamples some of them down first, then across
    image = draw_scene(4, size=200).image.crop((60, 0, 127, 200))
    preprocess = Preprocess((32, 32))
    got, _ = seen(page, image, preprocess)
    assert np.abs(got - np.asarray(preprocess.view(image)).astype(int)).max() <= 2


def test_probabilities_scores_and_maps_are_those_of_python(open_page, built, demo):
    scene = draw_scene(700_003, size=173, objects=2).image.crop((0, 9, 173, 140))
    scene.save(built / "scene.png")
    page = open_page()
    for file in (ASSETS / "demo.png", built / "scene.png"):
        found = json.loads(page.evaluate(RUN, file.name))
        e = vr.explain(file, demo, targets="all")
        np.testing.assert_allclose(found["probs"], e.probs[0], rtol=0, atol=1e-4)
        shape = e.scores[0].shape
        np.testing.assert_allclose(np.reshape(found["scores"], shape), e.scores[0], atol=1e-4)
        sure = (
            np.ptp(e.scores[0], axis=(1, 2)) > 1e-3
        )  # in flatter maps only rounding would be compared
        assert sure.sum() >= 2
        maps = np.reshape(found["maps"], shape)
        np.testing.assert_allclose(maps[sure], e.maps[0][sure], rtol=0, atol=1e-3)


def test_what_the_page_shows_is_what_python_draws(open_page, demo):
    page = open_page()
    e = vr.explain(ASSETS / "demo.png", demo, targets="all")
    names = [demo.class_names[index] for index in np.argsort(-e.probs[0])]
    shown = rows(page)
    assert list(shown)[:3] == names[:3]
    assert set(shown) == set(names)
    for name, probability in shown.items():
        assert probability == pytest.approx(e.probs[0][demo.class_names.index(name)], abs=1e-4)
    np.testing.assert_array_equal(canvas(page, "picture"), np.asarray(e.pictures[0]))
    for row, name in enumerate(names[:3]):
        page.hover(f".class >> nth={row}")
        expected = expected_colours(e, demo.class_names.index(name), (560, 560))
        assert np.abs(canvas(page, "map") - expected).max() <= 3
        expect(page.locator("#caption strong")).to_have_text(name)


def explained_file(
    targets,
    preprocess,
    *,
    class_names=("ant", "bee", "cat", "dog"),
    probabilities=False,
    normalize="minmax",
):
    """Return the bytes of a cheap model: each 4 by 4 window's mean colour scores the classes."""
    count = len(class_names or range(4))
    rng = np.random.default_rng(5)
    weight = numpy_helper.from_array(rng.normal(size=(count, 3, 1, 1)).astype(np.float32), "weight")
    first = numpy_helper.from_array(np.array(0), "first")
    nodes = [
        helper.make_node("AveragePool", ["pixels"], ["p"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Conv", ["p", "weight"], ["rows"]),
        helper.make_node("GlobalAveragePool", ["rows"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
        helper.make_node("Softmax" if probabilities else "Identity", ["logits"], ["output"]),
    ]
    height, width = (side // 4 for side in preprocess.size)
    k = count if targets == "all" else "k" if targets == "input" else 2
    images = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 3, *preprocess.size])
    inputs = [images]
    outputs = [
        helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, count]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, k, height, width]),
    ]
    initializers = [weight, first]
    if targets == "all":
        if normalize == "evidence":  # of both signs
            nodes.append(helper.make_node("Identity", ["rows"], ["scores"]))
        else:
            nodes.append(helper.make_node("Softmax", ["rows"], ["scores"], axis=1))
    else:
        if targets == "input":
            inputs.append(helper.make_tensor_value_info("targets", TensorProto.INT64, [1, "k"]))
            nodes.append(helper.make_node("Identity", ["targets"], ["classes"]))
        else:
            initializers.append(numpy_helper.from_array(np.array([2]), "two"))
            nodes.append(helper.make_node("TopK", ["output", "two"], ["_", "classes"]))
        outputs.append(helper.make_tensor_value_info("classes", TensorProto.INT64, [1, k]))
        nodes += [
            helper.make_node("Softmax", ["rows"], ["every"], axis=1),
            helper.make_node("Gather", ["classes", "first"], ["chosen"], axis=0),
            helper.make_node("Gather", ["every", "chosen"], ["scores"], axis=1),
        ]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    metadata = Metadata(
        name="tiny",
        masking=Masking(),
        path="closed-form",
        normalize=normalize,
        targets=targets,
        images="pixels",
        logits="output",
        probabilities=probabilities,
        class_names=class_names,
        preprocess=preprocess,
    )
    helper.set_model_props(model, metadata.to_properties())
    return model.SerializeToString()


def test_a_file_with_evidence_shows_its_positive_part_and_its_range(open_page):
    preprocess = Preprocess((48, 64))
    page = open_page()
    picture = draw_scene(3, size=200).image
    drop_and_wait(page, "three.png", png(picture))
    content = explained_file("all", preprocess, normalize="evidence")
    drop(page, "tiny.onnx", content)
    expect(page.locator("#about")).to_contain_text("tiny.onnx")
    session = onnxruntime.InferenceSession(content)
    logits, scores = session.run(["output", "scores"], {"pixels": preprocess(picture)[None]})
    evidence = scores[0, logits[0].argmax()]
    assert evidence.min() < 0 < evidence.max()
    page.hover(".class >> nth=0")
    expect(page.locator("#caption")).to_contain_text(
        f"the evidence of one window goes from −{-evidence.min():#.3g} to "
        f"+{evidence.max():#.3g} nats"
    )
    got = canvas(page, "map")
    map_ = evidence.clip(0) / evidence.max()
    assert np.abs(got - colorize(enlarge(map_, got.shape[:2])).astype(int)).max() <= 3


@pytest.mark.parametrize(
    ("targets", "probabilities"),
    [("all", False), ("top2", False), ("input", False), ("all", True)],
)
def test_a_file_of_ones_own_explains_by_its_metadata(open_page, targets, probabilities):
    preprocess = Preprocess((48, 64), crop_pct=0.9, mean=(0.4, 0.5, 0.6), interpolation="bilinear")
    page = open_page()
    picture = draw_scene(3, size=200).image
    drop_and_wait(page, "three.png", png(picture))
    content = explained_file(targets, preprocess, probabilities=probabilities)
    drop(page, "tiny.onnx", content)
    expect(page.locator("#about")).to_contain_text("tiny.onnx")
    assert page.locator("#error").is_hidden()
    feeds = {"pixels": preprocess(picture)[None]}
    if targets == "input":
        feeds["targets"] = np.arange(4)[None]
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    logits, scores = session.run(["output", "scores"], feeds)
    order = np.argsort(-logits[0])
    probs = logits[0] if probabilities else np.exp(logits[0]) / np.exp(logits[0]).sum()
    names = ["ant", "bee", "cat", "dog"]
    shown = rows(page)
    wanted = order[:2] if targets == "top2" else order
    assert list(shown) == [names[index] for index in wanted]
    np.testing.assert_allclose(list(shown.values()), probs[wanted], atol=1e-5)
    page.hover(".class >> nth=1")
    map_ = scores[0, 1 if targets == "top2" else wanted[1]]
    map_ = (map_ - map_.min()) / np.ptp(map_)
    got = canvas(page, "map")
    left, top, right, bottom = preprocess.box(picture)
    assert abs(got.shape[1] / got.shape[0] - (right - left) / (bottom - top)) < 0.01
    assert np.abs(got - colorize(enlarge(map_, got.shape[:2])).astype(int)).max() <= 3


# --- pointing, keys, and a phone -----------------------------------------------------------------


def test_pointing_at_a_class_shows_its_map_without_another_run(open_page):
    page = open_page()
    page.evaluate(COUNT_RUNS)
    stage = page.locator(".stage")
    before, first = stage.screenshot(), page.inner_text("#caption")
    assert np.asarray(Image.open(io.BytesIO(before)).convert("RGB")).std() > 20
    page.hover(".class >> nth=1")
    assert stage.screenshot() != before
    page.hover("h1")
    assert stage.screenshot() == before, "the chosen class again"
    page.click(".class >> nth=2")
    page.hover("h1")
    assert stage.screenshot() != before
    assert page.inner_text("#caption") != first
    page.click("text=the picture alone")
    assert page.locator("#map").is_hidden()
    assert page.evaluate("runs") == 0
    drop_and_wait(page, "scene.png", png(draw_scene(1).image))
    assert page.evaluate("runs") == 1, "the counter counts"


def test_keys_alone_are_enough(open_page):
    page = open_page()
    names = list(rows(page))
    for stop in ("choose-picture", "choose-model"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == stop
    page.keyboard.press("Tab")
    caption = page.locator("#caption strong")
    expect(caption).to_have_text(names[0])
    page.keyboard.press("ArrowDown")
    expect(caption).to_have_text(names[1])
    assert page.locator("#map").get_attribute("data-class") == page.evaluate(
        "document.activeElement.value"
    )
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#caption")).to_have_text("The picture alone.")
    group = page.get_by_role("radiogroup", name="Classes")
    assert group.get_by_role("radio").count() == len(names) + 1
    assert page.get_by_role("img", name="The picture demo.png").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_sticks_out_and_a_tap_shows_a_map(open_page, scheme):
    phone = {"width": 390, "height": 844}
    page = open_page(viewport=phone, has_touch=True, is_mobile=True, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == phone["width"]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(251, 251, 249)" if scheme == "light" else "rgb(21, 23, 26)"
    )
    name = list(rows(page))[8]
    page.tap(".class >> nth=8")
    expect(page.locator("#caption strong")).to_have_text(name)
    picture = page.locator(".stage").bounding_box()
    assert 0 <= picture["y"] < picture["y"] + picture["height"] < phone["height"], "still in sight"


def test_of_many_classes_twelve_are_listed_and_the_rest_found_by_name(open_page):
    names = [f"thing {index:02}" for index in range(40)]
    page = open_page()
    assert page.locator("#search").is_hidden()
    drop(page, "tiny.onnx", explained_file("all", Preprocess((16, 16)), class_names=names))
    expect(page.locator("#about")).to_contain_text("tiny.onnx")
    first = list(rows(page))
    assert len(first) == 12
    expect(page.locator("#more")).to_have_text("and 28 less probable")
    last = min(set(names) - set(first))
    page.fill("#search", last.upper())
    assert list(rows(page)) == [last]
    page.hover(".class >> nth=0")
    expect(page.locator("#caption strong")).to_have_text(last)
    page.fill("#search", "nothing")
    expect(page.locator("#more")).to_have_text("No class of that name.")


# --- nothing leaves, and what cannot be used says so ---------------------------------------------


def test_it_works_with_the_network_gone(open_page, demo):
    page = open_page()
    page.context.set_offline(True)
    page.asked = True  # from here on any request is an error
    scene = draw_scene(700_001, size=150).image
    drop_and_wait(page, "scene.png", png(scene))
    e = vr.explain(scene, demo)
    assert next(iter(rows(page))) == demo.class_names[e.targets[0, 0]]
    with page.expect_file_chooser() as chooser:
        page.click("text=Choose a picture")
    file = {"name": "second.png", "mimeType": "image/png", "buffer": png(draw_scene(9).image)}
    chooser.value.set_files(file)
    expect(page.locator("#status")).to_contain_text("second.png: ")
    drop(page, "demo.onnx", (ASSETS / "demo.onnx").read_bytes())
    expect(page.locator("#about")).to_contain_text("demo.onnx, explained by")


def test_the_browser_itself_refuses_to_send_anything(open_page):
    page = open_page()
    away = "fetch('https://example.org/', {method: 'POST', body: 'x'}).then(() => 'sent', String)"
    assert "Failed to fetch" in page.evaluate(
        away
    )  # refused so early that the fixture saw no request


def test_files_that_cannot_be_used_are_refused_in_a_sentence(open_page):
    page = open_page()
    before = rows(page), page.inner_text("#caption")
    whole = (ASSETS / "demo.onnx").read_bytes()
    tiny = Preprocess((16, 16))
    nearest = Preprocess((16, 16), interpolation="nearest")
    truncated = png(draw_scene(2).image)[:200]
    for name, content, sentence in (
        ("words.txt", b"no picture", "words.txt is not a picture that this browser can read"),
        ("half.png", truncated, "half.png is not a picture that this browser can read"),
        ("long.png", png(Image.new("L", (20_000, 4))), "long.png is too large: 20000×4 pixels"),
        ("empty.png", b"", "empty.png is not a picture that this browser can read"),
        ("words.onnx", b"no model", "words.onnx is not an ONNX file, or not a whole one"),
        ("empty.onnx", b"", "empty.onnx is not an ONNX file, or not a whole one"),
        ("half.onnx", whole[: len(whole) // 2], "half.onnx is not an ONNX file, or not a whole"),
        (
            "plain.onnx",
            (ASSETS / "demo-plain.onnx").read_bytes(),
            "plain.onnx holds no explanation. "
            '"vit-reciprocam insert plain.onnx explained.onnx" adds one',
        ),
        (
            "later.onnx",
            explained_file("all", tiny).replace(b'"schema": 4', b'"schema": 9'),
            "later.onnx was written by vit-reciprocam of another version, in a layout that this",
        ),
        (
            "near.onnx",
            explained_file("all", nearest),
            'The model wants pictures resized by "nearest", which this page cannot do',
        ),
        (
            "unnamed.onnx",
            explained_file("input", tiny, class_names=None),
            "unnamed.onnx does not name its classes",
        ),
        (
            "odd.onnx",
            explained_file("all", tiny).replace(b"AveragePool", b"AveragePuul"),
            "odd.onnx cannot be opened here",
        ),
        (
            "other.onnx",
            explained_file("all", tiny).replace(b'"size": [16, 16]', b'"size": [24, 24]'),
            "The model cannot explain this picture here",
        ),
    ):
        assert sentence in refused(page, name, content)
        assert (rows(page), page.inner_text("#caption")) == before, "what was there stays"
    drop_and_wait(page, "scene.png", png(draw_scene(1).image))
    assert page.locator("#error").is_hidden()


def test_a_browser_without_webassembly_is_told_so(open_page):
    page = open_page(script="delete window.WebAssembly", ready=False)
    expect(page.locator("#error")).to_contain_text("This browser has no WebAssembly")
    drop(page, "scene.png", png(draw_scene(1).image))
    expect(page.locator("#status")).to_have_text("Now choose a model.")


def test_the_readme_states_what_is_downloaded(built):
    stated = re.search(r"\*\*([\d,]+) bytes\*\*", (EXAMPLE / "README.md").read_text())[1]
    actual = sum(file.stat().st_size for file in built.iterdir() if file.name != "scene.png")
    assert int(stated.replace(",", "")) == pytest.approx(actual, rel=0.01)


def test_the_lock_file_names_versions_and_no_server():
    lock = (EXAMPLE / "package-lock.json").read_text()
    assert "http" not in lock
    assert re.search(r'"onnxruntime-web": "\d+\.\d+\.\d+"', (EXAMPLE / "package.json").read_text())

"""Measure how long the built page takes in Chromium: `python examples/browser/measure.py`."""

from __future__ import annotations

import functools
import http.server
import platform
import shutil
import threading
from pathlib import Path
from statistics import median

import typer
from playwright.sync_api import sync_playwright

PAGE = Path(__file__).parent / "dist"
PLAIN = Path(__file__).parents[2] / "src" / "vit_reciprocam" / "assets" / "demo-plain.onnx"
ROUNDS = 40
MEASURE = """async (rounds) => {
  const [{ open, explain }, { decode, pixelsOf, tensor, view }, { minMax, paint }, ort] =
    await Promise.all(["./model.js", "./picture.js", "./map.js", "./ort.wasm.bundle.min.mjs"]
      .map((name) => import(name)));
  const bytes = async (name) => new Uint8Array(await (await fetch(name)).arrayBuffer());
  const model = await open(await bytes("demo.onnx"), "demo.onnx");
  const plain = await ort.InferenceSession.create(await bytes("demo-plain.onnx"));
  const picture = await decode(await (await fetch("demo.png")).blob());
  const { preprocess } = model.metadata;
  let [input, found] = [];
  const steps = {
    "preparing the picture": () => {
      input = tensor(view(pixelsOf(picture), preprocess), preprocess);
    },
    "prediction and 12 maps": async () => {
      found = await explain(model, input.slice());  // a copy, since the worker takes it away
    },
    "prediction alone": () => {
      const images = new ort.Tensor("float32", input.slice(), [1, 3, ...preprocess.size]);
      return plain.run({ images });
    },
    "drawing one map": () => paint(minMax(found.scores.get(0)).map, found.grid, 560, 560),
  };
  const times = {};
  for (let round = 0; round < rounds; round++) {
    for (const [name, step] of Object.entries(steps)) {
      const began = performance.now();
      await step();
      (times[name] ??= []).push(performance.now() - began);
    }
  }
  return times;
}"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Print the median, fastest and slowest time of each step in milliseconds."""
    handler = functools.partial(_Quiet, directory=PAGE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.route("**/demo-plain.onnx", lambda route: route.fulfill(path=PLAIN))
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector("main:visible")
        times = page.evaluate(MEASURE, ROUNDS)
        typer.echo(f"Chromium {browser.version}, {_processor()}, medians of {ROUNDS} rounds")
        browser.close()
    server.shutdown()
    for name, each in times.items():
        typer.echo(f"{name:24}{median(each):7.1f} ms   ({min(each):.1f} to {max(each):.1f})")
    both, alone = (times[name] for name in ("prediction and 12 maps", "prediction alone"))
    ratio = median(a / b for a, b in zip(both, alone, strict=True))
    typer.echo(f"with maps / without     {ratio:7.2f}")


if __name__ == "__main__":
    main()

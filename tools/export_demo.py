"""Make the bundled assets from trained weights: `python tools/export_demo.py`.

It writes three files into the package: `demo.onnx` with the prediction and all maps, for costs to
be compared `demo-plain.onnx` with the prediction alone, and the picture `demo.png`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.export import Dim

from train_demo import ARCHITECTURE, SIZE
from vit_reciprocam.classifier.load import ASSETS
from vit_reciprocam.onnx.export.edit import save, strip_notes
from vit_reciprocam.onnx.export.export import OPSET, export
from vit_reciprocam.onnx.export.trace import trace
from vit_reciprocam.pictures.preprocess import Preprocess
from vit_reciprocam.pictures.scenes import CLASSES, draw_scene

PICTURE_SEED, PICTURE_SIZE = 213, 560
PREPROCESS = Preprocess((SIZE, SIZE), crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)


class Prediction(nn.Module):
    """A model whose input is named like that of an explained file."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap a model."""
        super().__init__()
        self.training = model.training
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's logits."""
        logits: Tensor = self.model(images)
        return logits


def export_prediction(model: nn.Module, path: Path, *, size: tuple[int, int]) -> None:
    """Write a model without maps, by the same exporter, so that costs can be compared."""
    inputs, dynamic = {"images": torch.zeros(2, 3, *size)}, {"images": {0: Dim("batch")}}
    graph = trace(Prediction(model), inputs, outputs=["logits"], dynamic=dynamic, opset=OPSET)
    strip_notes(graph)
    save(graph, path, external_data=False)


def main() -> None:
    """Read the weights and write the assets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path(__file__).with_name("demo.safetensors"),
        help="File that `train_demo.py` wrote.",
    )
    parser.add_argument("--out", type=Path, default=ASSETS, help="Folder to write the assets to.")
    args = parser.parse_args()
    model = VisionTransformer(**ARCHITECTURE).eval()
    model.load_state_dict(load_file(args.weights))
    export(
        model, args.out / "demo.onnx", class_names=list(CLASSES), preprocess=PREPROCESS, name="demo"
    )
    export_prediction(model, args.out / "demo-plain.onnx", size=PREPROCESS.size)
    draw_scene(PICTURE_SEED, size=PICTURE_SIZE, objects=3).image.save(args.out / "demo.png")


if __name__ == "__main__":
    main()

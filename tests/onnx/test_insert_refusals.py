"""Files and settings that insertion refuses: before it writes anything, and saying why."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import exporters
import onnx
from insertion import export_model, refuses
from vit_reciprocam.errors import InputError, ModelError
from vit_reciprocam.onnx.insert.insert import insert


def test_no_onnx_file(tmp_path):
    refuses(tmp_path / "none.onnx", tmp_path, "no such model file")
    (tmp_path / "text.onnx").write_text("hello, I am a text")
    refuses(tmp_path / "text.onnx", tmp_path, "not an ONNX file")
    (tmp_path / "empty.onnx").write_bytes(b"")
    refuses(tmp_path / "empty.onnx", tmp_path, "not an ONNX file")


def test_truncated_file(source_of, tmp_path):
    content = source_of("vit", "dynamo 18").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: len(content) // 2])
    refuses(tmp_path / "cut.onnx", tmp_path, "was cut short")


@pytest.mark.parametrize(
    ("place", "match"),
    [("../w.bin", "outside its folder"), ("/etc/passwd", "outside its folder"), ("no", "missing")],
)
def test_weights_elsewhere(place, match, source_of, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(1 << 20))
    source = tmp_path / "m" / "model.onnx"
    model = onnx.load(source_of("vit", "dynamo 18"))
    onnx.save(model, source, save_as_external_data=True, location="w", size_threshold=1024)
    model = onnx.load(source, load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = place
    source.write_bytes(model.SerializeToString())
    refuses(source, tmp_path, match)


def test_a_link_out_of_the_folder(source_of, tmp_path):
    (tmp_path / "m").mkdir()
    source = tmp_path / "m" / "model.onnx"
    model = onnx.load(source_of("vit", "dynamo 18"))
    onnx.save(model, source, save_as_external_data=True, location="w", size_threshold=1024)
    (tmp_path / "m" / "w").rename(tmp_path / "w")
    (tmp_path / "m" / "w").symlink_to(tmp_path / "w")
    refuses(source, tmp_path, "outside its folder")


def test_a_cnn(tmp_path):
    import torchvision

    model = torchvision.models.resnet18(num_classes=7).eval()
    exporters.export_torchscript(model, exporters.pictures("vit"), tmp_path / "cnn.onnx", opset=17)
    refuses(tmp_path / "cnn.onnx", tmp_path, "no self-attention was found.*looks like a CNN")


def test_a_text_model(tmp_path):
    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(10, 8)
            self.head = torch.nn.Linear(8, 3)

        def forward(self, ids):
            return self.head(self.embedding(ids).mean(dim=1))

    ids = torch.ones(2, 5, dtype=torch.long)
    exporters.export_torchscript(Text(), ids, tmp_path / "text.onnx", opset=17)
    refuses(tmp_path / "text.onnx", tmp_path, r"no single input of images .* inputs are: images")


def test_an_encoder_without_a_head(tmp_path):
    model = exporters.build("vit")
    model.reset_classifier(0)
    model.forward = model.forward_features
    exporters.export_torchscript(
        model, exporters.pictures("vit"), tmp_path / "features.onnx", opset=17
    )
    refuses(tmp_path / "features.onnx", tmp_path, "no classifier")


def test_features_without_a_head(tmp_path):
    model = VisionTransformer(**{**exporters.TIMM, "num_classes": 0})
    refuses(export_model(model, tmp_path), tmp_path, "features, not classes")


def test_opset(source_of, tmp_path):
    model = onnx.load(source_of("vit", "torchscript 14"))
    model.opset_import[0].version = 9
    onnx.save(model, tmp_path / "old.onnx")
    refuses(tmp_path / "old.onnx", tmp_path, "written in opset 9; 11 to")


def test_open_size(source_of, tmp_path):
    model = onnx.load(source_of("rectangle", "dynamo 23"))
    for dim, name in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], "hw", strict=True):
        dim.dim_param = name
    onnx.save(model, tmp_path / "open.onnx")
    refuses(tmp_path / "open.onnx", tmp_path, "leaves the pictures' size open: size=")
    assert insert(tmp_path / "open.onnx", tmp_path / "x.onnx", size=(32, 48)).grid == (4, 6)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"size": (64, 64)}, ModelError, r"takes pictures of 32x32, not of \(64, 64\)"),
        ({"grid": (5, 5)}, ModelError, "more patches than there are tokens"),
        ({"grid": (2, 8)}, ModelError, "do not lie as"),
        ({"target_node": "nothing"}, ModelError, "no node or value 'nothing'"),
        ({"class_names": ["a"]}, InputError, "1 class names given for a model of 7"),
        ({"targets": "top9"}, InputError, "the model has 7 classes"),
        ({"targets": "best"}, InputError, "targets of a file must be"),
        ({"kernel": "disk"}, InputError, "kernel must be one of"),
        ({"preprocess": "imagenet:size=48"}, InputError, r"of \(48, 48\), the maps hold for"),
        ({"preprocess": "photos"}, InputError, "preprocess must be one of"),
    ],
)
def test_settings_that_do_not_fit(options, error, match, source_of, tmp_path):
    refuses(source_of("vit", "torchscript 14"), tmp_path, match, error, **options)


def test_values_of_that_name(source_of, tmp_path):
    model = onnx.load(source_of("vit", "dynamo 18"))
    name = model.graph.output[0].name
    model.graph.node.append(onnx.helper.make_node("Identity", [name], ["saliency"]))
    model.graph.output.append(onnx.ValueInfoProto(name="saliency"))
    onnx.save(model, tmp_path / "taken.onnx")
    refuses(tmp_path / "taken.onnx", tmp_path, "values of its own named saliency")


@pytest.mark.parametrize(
    ("place", "match"),
    [
        ("none/x.onnx", "there is no folder"),
        ("folder.onnx", "is a folder"),
        ("x.txt", "must end in .onnx"),
        ("model.onnx", "belongs to the file to read"),
        ("w.onnx", "belongs to the file to read"),
    ],
)
def test_places_that_cannot_be_written(place, match, source_of, tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    model = onnx.load(source_of("vit", "dynamo 18"))
    source = tmp_path / "model.onnx"
    onnx.save(model, source, save_as_external_data=True, location="w.onnx", size_threshold=1024)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InputError, match=match):
        insert(source, tmp_path / place)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

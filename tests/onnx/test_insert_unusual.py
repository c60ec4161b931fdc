"""Unusual models: each would give wrong maps if it were taken for an ordinary one."""

import re

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer

import exporters
import onnx
from insertion import correlate, expected, export_model, refuses, run, score_naively
from reference import naive_logits
from vit_reciprocam.onnx.insert.insert import insert


class Reordered(torch.nn.Module):
    """Tokens after a module, in another order."""

    def __init__(self, module, order, prefix):
        super().__init__()
        self.module, self.order = module, list(range(prefix)) + [prefix + n for n in order]

    def forward(self, tokens):
        return self.module(tokens)[:, self.order]


class Ending(torch.nn.Module):
    """A tiny ViT with another end: `end` makes the output of it, its tokens and its logits."""

    def __init__(self, end):
        super().__init__()
        self.model, self.end = exporters.build("vit"), end

    def forward(self, images):
        tokens = self.model.forward_features(images)
        return self.end(self.model, tokens, self.model.forward_head(tokens))


BY_COLUMNS = np.arange(16).reshape(4, 4).T.ravel().tolist()


def test_tokens_column_by_column(tmp_path):
    model = exporters.build("vit")
    model.patch_embed = Reordered(model.patch_embed, BY_COLUMNS, prefix=0)
    refuses(export_model(model, tmp_path), tmp_path, "do not lie as 1 prefix tokens and a grid")


def test_tokens_that_change_places(tmp_path):
    model = exporters.build("vit")
    model.blocks[0] = Reordered(model.blocks[0], BY_COLUMNS, prefix=1)
    refuses(export_model(model, tmp_path), tmp_path, "the tokens change places")


def test_two_attentions_side_by_side(tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(**exporters.TIMM, block_fn=ParallelThingsBlock)
    refuses(export_model(model, tmp_path), tmp_path, "through Softmax node .*attns.0/attn/Softmax")


def test_probabilities_as_the_output(tmp_path):
    model = Ending(lambda _model, _tokens, logits: logits.softmax(dim=-1).double().float())
    done = insert(export_model(model, tmp_path), tmp_path / "x.onnx")
    assert done.path == "closed-form"
    scores = run(tmp_path / "x.onnx", exporters.pictures("vit").numpy())["scores"]
    np.testing.assert_allclose(scores, expected("vit", 3), rtol=0, atol=1e-6)


def test_independent_probabilities(tmp_path):
    model = Ending(lambda _model, _tokens, logits: logits.sigmoid())
    refuses(export_model(model, tmp_path), tmp_path, "is a sigmoid's")


def test_weights_that_are_not_numbers(tmp_path):
    model = exporters.build("vit")
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    refuses(export_model(model, tmp_path), tmp_path, "holds NaN or infinity")


ENDS = {
    "seldom": (  # reads patches only where they are large
        lambda _model, tokens, logits: (
            logits + torch.relu(tokens[:, 1:].mean(dim=(1, 2)) - 1)[:, None] * torch.arange(7.0)
        ),
        "reads all tokens|cannot run",
    ),
    "view": (
        lambda model, tokens, _logits: model.head(
            tokens[:, 0].view(tokens.shape[0], 2, 12).reshape(tokens.shape[0], 24)
        ),
        "cannot run",
    ),
    "sum": (
        lambda model, tokens, _logits: model.head((tokens * torch.eye(17)[:1].T).sum(dim=1)),
        "cannot run|one token",
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_ends_that_take_the_direct_path(end, tmp_path):
    model = Ending(ENDS[end][0])
    done = insert(export_model(model, tmp_path), tmp_path / "x.onnx")
    assert done.path == "direct"
    assert re.search(ENDS[end][1], done.direct_because)
    scores = run(tmp_path / "x.onnx", exporters.pictures("vit").numpy())["scores"]
    wanted = score_naively(model, "model.blocks.1.norm1").softmax(dim=1).numpy()
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-6)


def test_a_relu_left_to_the_quantiser(tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(**exporters.TIMM, act_layer=torch.nn.ReLU).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    source = export_model(model, tmp_path)
    exporters.quantize(source, tmp_path / "int8.onnx", [exporters.pictures("vit").numpy()])
    kinds = {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert "Relu" not in kinds
    assert insert(tmp_path / "int8.onnx", tmp_path / "x.onnx").path == "closed-form"
    scores = run(tmp_path / "x.onnx", exporters.pictures("vit").numpy())["scores"]
    assert correlate(scores, score_naively(model, "blocks.1.norm1").softmax(dim=1).numpy()) > 0.95


def test_target_node_names_another_cut(source_of, tmp_path):
    """The LayerNorm before the MLP: no attention below it, so the direct path."""
    source = source_of("vit", "dynamo 18")
    norms = [n for n in onnx.load(source).graph.node if n.op_type == "LayerNormalization"]
    done = insert(source, tmp_path / "x.onnx", target_node=norms[-2].name)
    assert done.path == "direct"
    model = exporters.build("vit")

    def cut(model):
        return model.blocks[1], [model.blocks[1].norm2], "output"

    settings = {"kernel": "gaussian", "class_token": True, "layer": "norm1"}
    masked, _ = naive_logits(model, exporters.pictures("vit"), (4, 4), **settings, find_cut=cut)
    scores = run(tmp_path / "x.onnx", exporters.pictures("vit").numpy())["scores"]
    np.testing.assert_allclose(scores, masked.softmax(dim=1).numpy(), rtol=0, atol=1e-6)

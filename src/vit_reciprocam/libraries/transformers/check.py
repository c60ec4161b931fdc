"""Refuse those classes of transformers that are not supported."""

from __future__ import annotations

import re

from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries.transformers.families import FAMILIES, base_name
from vit_reciprocam.libraries.transformers.towers import ImageTower

__all__ = ["check_class"]

_GIVES_FEATURES = re.compile("(CLIP|MetaClip2|Siglip)(Vision)?Model(WithProjection)?")
_INSTEAD = {
    "TimmWrapperForImageClassification": "it wraps a timm model: pass model.timm_model",
    "Siglip2ForImageClassification": "it takes patches of images of any shape, not images. The "
    "SigLIP 2 models of one image size are of class SiglipForImageClassification",
}


def check_class(kind: type) -> None:
    """Refuse a class of models that `split` does not support, and say what to pass instead."""
    name = base_name(kind)
    if name in FAMILIES:
        return
    task = re.search("For([A-Z].*)", name)  # what follows "For", but not in "Former"
    if name in _INSTEAD:
        why = f"is not supported: {_INSTEAD[name]}"
    elif issubclass(kind, ImageTower) or _GIVES_FEATURES.fullmatch(name):
        why = (
            "gives image features, no class scores: make a classifier of text prompts with "
            "vit_reciprocam.libraries.transformers.split.zero_shot(model, processor, prompts)"
        )
    elif task and task[1].startswith("ImageClassification"):
        why = (
            "is not supported: it is not a Vision Transformer whose parts are known. Supported are "
            + ", ".join(sorted(FAMILIES))
        )
    else:
        purpose = re.sub("(?<=[a-z])(?=[A-Z])", " ", task[1]).lower() if task else ""
        lacks = (
            f"is made for {purpose}, not to classify whole images"
            if purpose
            else "has no classification head"
        )
        why = (
            f"{lacks}, so it has no class scores to explain: load it with "
            "AutoModelForImageClassification"
        )
    raise ModelError(f"transformers' {name} {why}")

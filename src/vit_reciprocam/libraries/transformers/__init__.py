"""transformers' models."""

from vit_reciprocam.libraries.library import Library, import_on_call

__all__ = ["LIBRARY"]

LIBRARY = Library(
    spec="hf:ID",
    module="transformers",
    package="transformers",
    extra="transformers",
    split=import_on_call(f"{__name__}.split:split"),
    split_tower=import_on_call(f"{__name__}.split:split_tower"),
    load=import_on_call(f"{__name__}.load:load_transformers"),
    listing=import_on_call(f"{__name__}.load:architectures"),
    encoder=import_on_call(f"{__name__}.blocks:encoder"),
    encodes="ViT, DeiT and DINOv2",
    own_hooks="transformers.utils.output_capturing",  # after output_hidden_states=True
    takes_prompts=True,
)

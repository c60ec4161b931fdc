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
    takes_prompts=True,
)

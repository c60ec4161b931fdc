"""open_clip's models: their image towers, with prompts as classes."""

from vit_reciprocam.libraries.library import Library, import_on_call

__all__ = ["LIBRARY"]

LIBRARY = Library(
    spec="open_clip:NAME/TAG",
    module="open_clip",
    package="open_clip_torch",
    extra="open-clip",
    split=import_on_call(f"{__name__}.split:split"),
    split_tower=import_on_call(f"{__name__}.split:split_tower"),
    load=import_on_call(f"{__name__}.load:load_open_clip"),
    listing=import_on_call(f"{__name__}.load:architectures"),
    takes_prompts=True,
)

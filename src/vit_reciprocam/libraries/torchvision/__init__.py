"""torchvision's models."""

from vit_reciprocam.libraries.library import Library, import_on_call

__all__ = ["LIBRARY"]

LIBRARY = Library(
    spec="torchvision:NAME",
    module="torchvision",
    package="torchvision",
    extra="torch",
    split=import_on_call(f"{__name__}.split:split"),
    load=import_on_call(f"{__name__}.load:load_torchvision"),
    listing=import_on_call(f"{__name__}.load:architectures"),
    encoder=import_on_call(f"{__name__}.split:encoder"),
    encodes="VisionTransformer",
)

"""Find what a user has changed in a model: hooks, patched methods, subclasses.

The method runs a model by its parts: it repeats what the library's class does, with other tokens.
That would silently leave a user's change out. So a changed model is refused, or takes the direct
path, which calls the changed module itself.

A function named `why_…` returns a clause for an error text, or "" if nothing was changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries import LIBRARIES

__all__ = [
    "find_override",
    "has_hooks",
    "kind_of",
    "refuse_bypassed",
    "runs_as",
    "why_not_linear",
    "why_unknown",
]

_LIBRARIES_OWN = {library.own_hooks for library in LIBRARIES.values()} - {""}


def has_hooks(module: nn.Module) -> bool:
    """Return whether a user put forward hooks on the module."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", None) not in _LIBRARIES_OWN for hook in hooks)


def runs_as(module: Any, *classes: Any) -> bool:
    """Return whether the module's forward is that of one of these classes, and is not patched."""
    if not isinstance(module, nn.Module) or "forward" in vars(module):
        return False
    return any(type(module).forward is cls.forward for cls in classes)


def find_override(module: nn.Module, library: str, *methods: str) -> str:
    """Return which of forward and these methods is a user's own, "" if none is.

    A method of the library, of PyTorch or of this package is not, unless the module was patched.
    """
    for method in ("forward", *methods):
        found: Any = next((cls for cls in type(module).__mro__ if method in vars(cls)), None)
        owner = found.__module__.partition(".")[0] if found else library
        if method in vars(module) or owner not in (library, "torch", "vit_reciprocam"):
            return method
    return ""


def kind_of(module: Any) -> str:
    """Return the name of an object's class, for an error text.

    It includes the Python module if a base class or a class of PyTorch has the same name, as when a
    user's Attention is derived from the library's Attention.
    """
    cls = type(module)
    others = [*cls.__mro__, getattr(nn, cls.__name__, cls)]
    unique = all(one is cls or one.__name__ != cls.__name__ for one in others)
    return cls.__name__ if unique else f"{cls.__module__}.{cls.__qualname__}"


def why_not_linear(layer: nn.Module, what: str) -> str:
    """Return why calling a layer, named `what`, does more than apply its weight and bias, or ""."""
    if not runs_as(layer, nn.Linear):
        patched = "forward" in vars(layer)
        own = "has a forward of its own" if patched else f"is a {kind_of(layer)}"
        return f"{what} {own}, not a plain Linear"
    return f"{what} has forward hooks" if has_hooks(layer) else ""


def why_unknown(module: nn.Module, library: str, what: str, *called_whole: nn.Module) -> str:
    """Return why running a module, named `what`, by its parts may differ from calling it, or "".

    The parts run on fewer tokens than the module and leave dropout out. So everything inside must
    be the library's or PyTorch's own, without hooks, and what is named dropout must be one. Only
    the modules `called_whole` may be anything, since they are called as they are, on all tokens.
    """
    allowed = {id(part) for one in called_whole for part in one.modules()}
    for path, part in module.named_modules():
        if id(part) in allowed:
            continue
        where = f"{what}'s {path}" if path else what
        if has_hooks(part):
            return f"{where} has forward hooks"
        if "forward" in vars(part):
            return f"{where} has a forward of its own"
        # dropout is left out, so a module that is merely named like one would be lost
        named_dropout = "drop" in path.rpartition(".")[2]
        is_dropout = "Drop" in type(part).__name__ or isinstance(part, nn.Identity)
        if find_override(part, library) or (named_dropout and not is_dropout):
            return f"{where} is a {kind_of(part)}, whose parts are not known"
    return ""


def refuse_bypassed(
    model: nn.Module,
    block: nn.Module,
    library: str,
    *around: nn.Module,
    methods: Sequence[str] = (),
) -> None:
    """Refuse a model with a user's code or hooks that running it by its parts would bypass.

    The modules that contain the block at which it is cut are not called as a whole, nor are those
    `around`, nor these methods besides forward. So they must be the library's own.
    """
    for module in (model, *_modules_above(block, model), *around):
        method, hooked = find_override(module, library, *methods), has_hooks(module)
        if not method and not hooked:
            continue
        path = next(path for path, one in model.named_modules() if one is module)
        at = f" (at {path})" if path else ""
        if method:
            raise ModelError(
                f"{kind_of(module)} has a {method} of its own{at}, which running its parts would "
                f"bypass. Explain a plain model of {library} with the same weights"
            )
        raise ModelError(
            f"the {kind_of(module)} has forward hooks{at}, which running its parts would "
            "bypass: remove them first, or put them on the modules inside"
        )


def _modules_above(block: nn.Module, module: nn.Module) -> list[nn.Module]:
    """Return the modules inside a module that contain a block, the outermost first."""
    found = []
    for part in module._modules.values():  # faster than paths, and every explainer's call runs this
        if part is not None and part._modules:
            inside = _modules_above(block, part)
            if inside or block in part._modules.values():
                found += [part, *inside]
    return found

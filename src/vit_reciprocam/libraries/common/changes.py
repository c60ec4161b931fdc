"""Ask whether a model is all that its class says.

The method runs a model by its parts: it repeats what the class does, with other tokens. If a user
has changed the model, by hooks, a patched method or a subclass, repeating the class would silently
leave the change out. The questions here find such changes. What cannot be repeated is refused, or
takes the direct path, which calls the changed module itself.

A function that is named `why_…` returns a clause for an error text, or "" if all is well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vit_reciprocam.errors import ModelError

__all__ = [
    "has_hooks",
    "is_own",
    "kind_of",
    "refuse_bypassed",
    "runs_as",
    "why_not_linear",
    "why_unknown",
]


def has_hooks(module: nn.Module) -> bool:
    """Return whether somebody put forward hooks on the module.

    The hooks that transformers itself leaves on a model after a call with output_hidden_states=True
    only look on, so they do not count.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    theirs = "transformers.utils.output_capturing"
    return any(getattr(hook, "__module__", None) != theirs for hook in hooks)


def runs_as(module: Any, *classes: Any) -> bool:
    """Return whether calling the module runs the forward of one of these classes.

    A subclass with another forward does not, nor does a module whose own forward was patched.
    """
    if not isinstance(module, nn.Module) or "forward" in vars(module):
        return False
    return any(type(module).forward is cls.forward for cls in classes)


def is_own(module: nn.Module, library: str, *methods: str) -> bool:
    """Return whether forward and these methods are the library's, PyTorch's or this package's.

    A method that the module does not have counts as the library's; one that was patched on the
    module does not.
    """
    return not _find_override(module, library, *methods)


def _find_override(module: nn.Module, library: str, *methods: str) -> str:
    """Return the first of its methods that is not the library's own, "" if all are."""
    for method in ("forward", *methods):
        found: Any = next((cls for cls in type(module).__mro__ if method in vars(cls)), None)
        if method in vars(module) or (found and not _belongs_to(found, library)):
            return method
    return ""


def _belongs_to(cls: type, library: str) -> bool:
    return cls.__module__.partition(".")[0] in (library, "torch", "vit_reciprocam")


def kind_of(module: Any) -> str:
    """Return the name of an object's class, for an error text.

    The name includes that of the Python module if a base class or a class of PyTorch is called the
    same, as where a user's Attention derives from the library's Attention.
    """
    cls = type(module)
    others = [*cls.__mro__, getattr(nn, cls.__name__, cls)]
    clear = all(one is cls or one.__name__ != cls.__name__ for one in others)
    return cls.__name__ if clear else f"{cls.__module__}.{cls.__qualname__}"


def why_not_linear(layer: nn.Module, what: str) -> str:
    """Return why calling a layer is more than applying its weight and bias, "" if it is not."""
    if not runs_as(layer, nn.Linear):
        patched = "forward" in vars(layer)
        own = "has a forward of its own" if patched else f"is a {kind_of(layer)}"
        return f"{what} {own}, not a plain Linear"
    return f"{what} has forward hooks" if has_hooks(layer) else ""


def why_unknown(module: nn.Module, library: str, what: str, *whole: nn.Module) -> str:
    """Return why running a module by its parts may differ from calling it, "" if not.

    The parts run on fewer tokens than the module and leave dropout out. So everything inside must
    be the library's or PyTorch's own, without hooks, and what is named dropout must be one.
    """
    spared = {id(part) for one in whole for part in one.modules()}
    for path, part in module.named_modules():
        if id(part) in spared:
            continue
        where = f"{what}'s {path}" if path else what
        if has_hooks(part):
            return f"{where} has forward hooks"
        if "forward" in vars(part):
            return f"{where} has a forward of its own"
        # a dropout is left out, so what only has the name of one, such as attn_drop, would be lost
        named_dropout = "drop" in path.rpartition(".")[2]
        is_dropout = "Drop" in type(part).__name__ or isinstance(part, nn.Identity)
        if not is_own(part, library) or (named_dropout and not is_dropout):
            return f"{where} is a {kind_of(part)}, whose parts are not known"
    return ""


def refuse_bypassed(
    model: nn.Module,
    block: nn.Module,
    library: str,
    *around: nn.Module,
    methods: Sequence[str] = (),
) -> None:
    """Refuse a model with code or hooks of its own that running it by its parts would bypass.

    Args:
        model: The model.
        block: The block at which it is cut. The modules that hold it are not called as a whole, so
            they must be the library's own.
        library: The name of the library that defines the model.
        around: Other modules that are not called.
        methods: Other methods than forward that are not called.

    Raises:
        ModelError: If there is such code or such a hook; names the module.
    """
    for module in (model, *_modules_above(block, model), *around):
        method, hooked = _find_override(module, library, *methods), has_hooks(module)
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
    """Return the modules that hold a block, from inside a module inwards.

    Every call of an explainer asks this, so it looks into `_modules`, which is faster than paths.
    """
    found = []
    for part in module._modules.values():
        if part is not None and part._modules:
            inside = _modules_above(block, part)
            if inside or block in part._modules.values():
                found += [part, *inside]
    return found

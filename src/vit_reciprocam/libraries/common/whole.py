"""Whether a model is all that its class says: what running its parts would bypass is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vit_reciprocam.errors import ModelError

__all__ = [
    "has_hooks",
    "is_own",
    "kind_of",
    "not_plain",
    "refuse_bypassed",
    "runs_as",
    "unknown_inside",
]


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody put forward hooks on the module.

    transformers' own, which stay on after a call with output_hidden_states=True, do nothing else.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    theirs = "transformers.utils.output_capturing"
    return any(getattr(hook, "__module__", None) != theirs for hook in hooks)


def runs_as(module: Any, *classes: Any) -> bool:
    """Whether what runs is the forward of one of these classes, not patched on the instance."""
    if not isinstance(module, nn.Module) or "forward" in vars(module):
        return False
    return any(type(module).forward is cls.forward for cls in classes)


def is_own(module: nn.Module, library: str, *methods: str) -> bool:
    """Whether a module's forward, and these methods if it has them, are the library's or PyTorch's.

    False also where one was patched on the instance.
    """
    return not _changed(module, library, *methods)


def _changed(module: nn.Module, library: str, *methods: str) -> str:
    """The first of its methods that is not the library's own; empty where all are."""
    for method in ("forward", *methods):
        found: Any = next((cls for cls in type(module).__mro__ if method in vars(cls)), None)
        if method in vars(module) or (found and not _of(found, library)):
            return method
    return ""


def _of(cls: type, library: str) -> bool:
    return cls.__module__.partition(".")[0] in (library, "torch", "vit_reciprocam")


def kind_of(module: Any) -> str:
    """The name of its class, with its module's where a base or PyTorch has the same name."""
    cls = type(module)
    others = [*cls.__mro__, getattr(nn, cls.__name__, cls)]
    clear = all(one is cls or one.__name__ != cls.__name__ for one in others)
    return cls.__name__ if clear else f"{cls.__module__}.{cls.__qualname__}"


def not_plain(linear: nn.Module, what: str) -> str:
    """Why running a layer is not its weight and bias applied; empty if it is."""
    if not runs_as(linear, nn.Linear):
        patched = "forward" in vars(linear)
        own = "has a forward of its own" if patched else f"is a {kind_of(linear)}"
        return f"{what} {own}, not a plain Linear"
    return f"{what} has forward hooks" if has_hooks(linear) else ""


def unknown_inside(module: nn.Module, library: str, what: str, *whole: nn.Module) -> str:
    """Why running a module by its parts might not be running it; empty if it would.

    The parts run on fewer tokens than the module, and leave out dropout, so everything inside must
    be the library's or PyTorch's own, without hooks.

    Args:
        module: The module.
        library: The library's name.
        what: The module's name in the sentence.
        whole: Modules inside that are run as they are, on all tokens.
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
        drops = "drop" not in path.rpartition(".")[2] or "Drop" in type(part).__name__
        if not is_own(part, library) or not (drops or isinstance(part, nn.Identity)):
            return f"{where} is a {kind_of(part)}, whose parts are not known"
    return ""


def refuse_bypassed(
    model: nn.Module,
    block: nn.Module,
    library: str,
    *around: nn.Module,
    methods: Sequence[str] = (),
) -> None:
    """Refuse a model whose own code or hooks running its parts would bypass.

    Args:
        model: The model.
        block: Its block. What is on the way to it is not run whole: it must be the library's own.
        library: The library's name.
        around: Other modules that are not called.
        methods: Other methods than forward that are not called.

    Raises:
        ModelError: If so; names the module.
    """
    for module in (model, *_leading(model, block), *around):
        method, hooked = _changed(module, library, *methods), has_hooks(module)
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


def _leading(module: nn.Module, block: nn.Module) -> list[nn.Module]:
    """The modules inside another that hold a block; it runs in every call, where time counts."""
    found = []
    for part in module._modules.values():
        if part is not None and part._modules:
            inside = _leading(part, block)
            if inside or block in part._modules.values():
                found += [part, *inside]
    return found

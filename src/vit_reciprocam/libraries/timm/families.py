"""timm's hierarchical and other transformers: the last attention of each, and what follows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_reciprocam.core.split import Tap
from vit_reciprocam.errors import ModelError
from vit_reciprocam.libraries.common.running import same

__all__ = ["FAMILIES", "REFUSED", "Last", "unsupported"]

Grid = tuple[int, int]
_After = Callable[[Any, Grid], Any]


@dataclass(frozen=True)
class _MethodInput(Tap):
    """F is what this method of the block takes, because its attention takes windows of F."""

    method: str = ""

    @contextlib.contextmanager
    def changed(self, change: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
        """As of `Tap`; the method is what it was again afterwards."""
        block = self.modules[0]
        attend, users = getattr(block, self.method), vars(block).get(self.method)
        setattr(block, self.method, lambda tokens: attend(change(tokens, 0)))
        try:
            yield
        finally:
            delattr(block, self.method)
            if users is not None:
                setattr(block, self.method, users)


@dataclass(frozen=True)
class _Arranged(Tap):
    """F stands there in another order; `inward` brings it into the image's, `outward` back."""

    inward: Callable[[Tensor], Tensor] = same
    outward: Callable[[Tensor], Tensor] = same

    @contextlib.contextmanager
    def changed(self, change: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
        """As of `Tap`, in the order of the image."""
        with super().changed(lambda x, number: self.outward(change(self.inward(x), number))):
            yield


@dataclass(frozen=True)
class Last:
    """The last block of a model in which tokens attend to each other, and what follows it.

    Attributes:
        block: What is called with X, and perhaps more.
        tap: Where in it F stands.
        after: What the block gives, and the grid -> what `model.forward_head` takes.
        attention: How its tokens attend; refused if its class is no attention.
        layout: Of what the block takes: "tokens" (B, T, D), "rows" (B, h, w, D) or "channels"
            (B, D, h, w).
        inward: What the block takes -> X, in the layout and order of F.
        outward: Its inverse, from X and the grid.
        prefix: How many tokens stand before the patches.
        grid: (h, w) where the model fixes it.
        batched: Whether the block takes more tensors, one an image.
        one_window: Its side, where the block must not cut the grid in windows.
        run: X -> what the block gives, where X is not what the block takes but what its norm does.
        because: Why the closed form does not hold.
    """

    block: Any
    tap: Tap
    after: _After
    attention: Any
    layout: str = "tokens"
    inward: Callable[[Tensor], Tensor] = same
    outward: Callable[[Tensor, Grid], Tensor] = lambda x, _: x
    prefix: int = 0
    grid: Grid | None = None
    batched: bool = False
    one_window: int | None = None
    run: Callable[[Tensor], Tensor] | None = None
    because: str = "the head averages all tokens"


def unsupported(model: nn.Module, reason: str) -> ModelError:
    """The error that names the model and the reason."""
    return ModelError(f"timm's {type(model).__name__} is not supported: {reason}")


def _laid(x: Tensor, grid: Grid) -> Tensor:
    """(B, T, D) -> (B, D, h, w)."""
    laid: Tensor = x.transpose(1, 2).unflatten(2, grid)
    return laid


_TOKEN: dict[str, Any] = {"prefix": 1, "because": "the parts of its last attention are not known"}
_FLAT_ROWS: dict[str, Any] = {
    "layout": "rows",
    "inward": lambda x: x.flatten(1, 2),
    "outward": lambda x, grid: x.unflatten(1, grid),
}
_FLAT_CHANNELS: dict[str, Any] = {
    "layout": "channels",
    "inward": lambda x: x.flatten(2).transpose(1, 2),
    "outward": _laid,
}


def _last(block: Any, after: _After, layout: str = "tokens", **more: Any) -> Last:
    """The common case: norm1, then attn."""
    attention = more.pop("attention", None) or getattr(block, "attn", None)
    tap = more.pop("tap", None) or Tap((getattr(block, "norm1", None) or block,))
    return Last(block, tap, after, attention, layout, **more)


def _block(m: Any) -> Any:
    return m.stages[-1].blocks[-1]


def _arranged(block: Any, after: _After, inward: Any, outward: Any, **more: Any) -> Last:
    """The tokens of the block, and F, are no (B, T, D) in the order of the image."""
    tap = _Arranged((block.norm1,), inward=inward, outward=outward)
    return _last(block, after, tap=tap, inward=inward, outward=lambda x, _: outward(x), **more)


def _at_input(m: Any, attention: Any, after: _After, layout: str = "channels") -> Last:
    """No norm stands before the attention."""
    return Last(_block(m), Tap((attention or m,), "input"), after, attention, layout)


def _as_is(y: Any, _grid: Grid) -> Any:
    return y


def _normed(m: Any) -> _After:
    return lambda y, _: m.norm(y)


def _from_rows(before: Callable[[Tensor], Tensor] = same, after: Any = same) -> _After:
    """(B, h, w, D) -> (B, D, h, w), perhaps with a norm before or after."""
    return lambda y, _: after(before(y).permute(0, 3, 1, 2))


def _class_token(m: Any, blocks: Any) -> Last:
    if not blocks:
        raise unsupported(m, "it has no class attention")
    return _last(blocks[-1], _normed(m), **_TOKEN)


def _coat(m: Any) -> Last:
    if m.parallel_blocks is not None:
        raise unsupported(m, "its last blocks join three token grids, and its head reads all")
    block = m.serial_blocks4[-1]
    return _last(block, lambda y, _: m.norm4(y), attention=block.factoratt_crpe, **_TOKEN)


def _davit(m: Any) -> Last:
    blocks = [block for pair in m.stages[-1].blocks for block in pair]
    spatial = [at for at, block in enumerate(blocks) if type(block).__name__ == "SpatialBlock"]
    if not spatial:
        raise unsupported(m, "its last stage attends between channels, not between tokens")
    later = nn.Sequential(*blocks[spatial[-1] + 1 :], m.norm_pre)
    return _last(blocks[spatial[-1]], lambda y, _: later(y), **_FLAT_CHANNELS)


def _encoder(m: Any) -> Last:
    """DeepSeek's and Qwen's: an encoder, what may merge its patches, and a head."""
    encoder, norm = m.encoder, getattr(m.encoder, "norm", same)
    merge = getattr(encoder, "aligner", None) or getattr(encoder, "merger", None) or same
    return _last(encoder.blocks[-1], lambda y, grid: merge(norm(y).unflatten(1, grid)))


def _hiera(m: Any) -> Last:
    """Its tokens stand in the order of mask units."""
    block, number = m.blocks[-1], len(m.blocks) - 1
    number -= block.do_expand  # which pools within, after the cut
    grid = m.reroll.schedule[number][1]
    order = m.reroll(torch.arange(grid[0] * grid[1]).view(1, -1, 1), number).flatten()
    back = order.argsort()
    return _arranged(block, _as_is, lambda x: x[:, order], lambda x: x[:, back], grid=tuple(grid))


def _maxxvit(m: Any) -> Last:
    block = _block(m)
    if type(block).__name__ == "TransformerBlock2d":
        norm = getattr(block.norm1, "norm", block.norm1)  # may be pooled after it
        return _last(block, _normed(m), "channels", tap=Tap((norm,)))
    part = getattr(block, "attn_grid", None) or getattr(block, "attn", block)
    if getattr(block, "nchw_attn", False):
        return _last(part, _normed(m), "channels", attention=part)
    return _last(part, _from_rows(after=m.norm), "rows", attention=part)


def _metaformer(m: Any) -> Last:
    block = _block(m)
    if m.stages[-1].use_nchw:
        return _last(block, _as_is, "channels", attention=block.token_mixer)
    return _last(block, _laid, attention=block.token_mixer)


def _mvit(m: Any) -> Last:
    more = (_TOKEN if m.global_pool == "token" else {}) | {"prefix": int(m.cls_token is not None)}
    return _last(_block(m), lambda y, _: m.norm(y[0]), **more)


def _nest(m: Any) -> Last:
    """Its last level is one block: (B, 1, T, D)."""
    block = m.levels[-1].transformer_encoder[-1]
    return _arranged(block, _from_rows(m.norm), lambda x: x[:, 0], lambda x: x[:, None])


def _pit(m: Any) -> Last:
    prefix = m.cls_token.shape[1]
    more = _TOKEN | {"prefix": prefix}
    return _last(m.transformers[-1].blocks[-1], lambda y, _: m.norm(y[:, :prefix]), **more)


def _swin_v2(block: Any, method: str, after: _After) -> Last:
    """Its norms follow attention and MLP: what the attention reads is the stream itself."""
    return _last(block, after, "rows", tap=_MethodInput((block,), method=method))


def _tiny_vit(m: Any) -> Last:
    """Its norm stands within the attention, after the windows are cut."""
    block = _block(m)
    tap = Tap((block.attn.norm,))
    return _last(block, _from_rows(), one_window=block.window_size, tap=tap, **_FLAT_ROWS)


def _tnt(m: Any) -> Last:
    """X enters after the inner pixels were added to the patches."""
    block = m.blocks[-1]
    norm, attention = block.norm_out, block.attn_out

    def run(x: Tensor) -> Tensor:
        x = x + block.drop_path(attention(norm(x)))
        y: Tensor = x + block.drop_path(block.mlp(block.norm_mlp(x)))
        return y

    return _last(block, _normed(m), tap=Tap((norm,)), attention=attention, run=run, **_TOKEN)


def _twins(m: Any) -> Last:
    blocks, position = m.blocks[-1], m.pos_block[-1]
    if len(blocks) > 1:  # else it follows the last block too
        return _last(blocks[-1], _normed(m))
    return _last(blocks[-1], lambda y, grid: m.norm(position(y, grid)))


FAMILIES: dict[str, Callable[[Any], Last]] = {
    "CSATv2": lambda m: _last(m.stages[-1][-1], _as_is, **_FLAT_CHANNELS),
    "CoaT": _coat,
    "ConVit": lambda m: _class_token(m, m.blocks),
    "DaVit": _davit,
    "DeepseekVitClassifier": _encoder,
    "EfficientFormer": lambda m: _last(_block(m), _normed(m), attention=_block(m).token_mixer),
    "EfficientFormerV2": lambda m: _at_input(m, _block(m).token_mixer, _normed(m)),
    "EfficientVit": lambda m: _at_input(m, _block(m).context_module.main, _as_is),
    "EfficientVitLarge": lambda m: _at_input(m, _block(m).context_module.main, _as_is),
    "EfficientVitMsra": lambda m: _at_input(m, _block(m).mixer.m, _as_is),
    "FastVit": lambda m: _last(
        _block(m),
        lambda y, _: m.final_conv(y),
        "channels",
        tap=Tap((getattr(_block(m), "norm", m),)),
        attention=_block(m).token_mixer,
    ),
    "GlobalContextVit": lambda m: _last(
        _block(m), _from_rows(m.stages[-1].norm), "rows", batched=True
    ),
    "Hiera": _hiera,
    "HieraDet": lambda m: _last(m.blocks[-1], _as_is, "rows"),
    "Levit": lambda m: _at_input(m, _block(m).attn, _as_is, "channels" if m.use_conv else "tokens"),
    "MaxxVit": _maxxvit,
    "MetaFormer": _metaformer,
    "MultiScaleVit": _mvit,
    "Nest": _nest,
    "NextViT": lambda m: _last(
        _block(m), _normed(m), "channels", attention=getattr(_block(m), "e_mhsa", None)
    ),
    "PoolingVisionTransformer": _pit,
    "PyramidVisionTransformerV2": lambda m: _last(
        _block(m), lambda y, grid: _laid(m.stages[-1].norm(y), grid)
    ),
    "Qwen3VitClassifier": _encoder,
    "SwinTransformer": lambda m: _last(m.layers[-1].blocks[-1], _normed(m), "rows"),
    "SwinTransformerV2": lambda m: _swin_v2(m.layers[-1].blocks[-1], "_attn", _normed(m)),
    "SwinTransformerV2Cr": lambda m: _swin_v2(_block(m), "_shifted_window_attn", _from_rows()),
    "TNT": _tnt,
    "TinyVit": _tiny_vit,
    "Twins": _twins,
    "VOLO": lambda m: _class_token(m, m.post_network),
    "VisionTransformerSAM": lambda m: _last(m.blocks[-1], _from_rows(after=m.neck), "rows"),
    "Visformer": lambda m: _last(m.stage3[-1], _normed(m), "channels"),
    "Xcit": lambda m: _class_token(m, m.cls_attn_blocks),
}

REFUSED = {
    "ByobNet": "its blocks have convolutions, or attend over four interleaved grids (MobileViT)",
    "CrossVit": "it has two token grids, of small and of large patches, and its head reads both",
    "EdgeNeXt": "its attention is between channels, not between tokens",
    "Gemma4VitClassifier": "its pooler reads where patches lie, which is not passed on here",
    "SHViT": "its attention follows a norm over all tokens together and reads part of their width",
    "SwiftFormer": "its attention weighs tokens by one sum and compares no two of them",
} | dict.fromkeys(
    ("ConvNeXt", "EfficientNet", "FocalNet", "MambaOut", "MlpMixer", "ResNet", "Sequencer2d"),
    "it has no attention, so its last block is no cut of this method's kind",
)

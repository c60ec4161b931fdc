"""Tiny hierarchical models of timm in float64, one per family, and where each is masked."""

import timm
import torch
from timm import models
from torch import nn

TINY = {"num_classes": 5, "embed_dim": 8, "num_heads": (2, 2), "depths": (1, 2), "patch_size": 4}


def shake(model, spread=0.3):
    """Return the model in float64, with weights for which masks matter.

    Every BatchNorm is as if it had seen some data.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.0 if parameter.ndim < 2 else 3 * parameter[0].numel() ** -0.5
            parameter += spread * scale * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model.double().eval()


def create(name, **options):
    return lambda: timm.create_model(name, num_classes=5, **options)


def mask_output(find):
    return lambda model, change: find(model).register_forward_hook(
        lambda _module, _args, tokens: change(tokens)
    )


def mask_input(find):
    return lambda model, change: find(model).register_forward_pre_hook(
        lambda _module, args: (change(args[0]), *args[1:])
    )


class MaskMethodInput:
    """Changes the argument of a block's method, for attention that is called window by window."""

    def __init__(self, find, name):
        self.find, self.name = find, name

    def __call__(self, model, change):
        self.block = self.find(model)
        attend = getattr(self.block, self.name)
        setattr(self.block, self.name, lambda tokens: attend(change(tokens)))
        return self

    def remove(self):
        delattr(self.block, self.name)


def stage_block(model):
    return model.stages[-1].blocks[-1]


def norm1_of_stage(model):
    return stage_block(model).norm1


def norm1_of_layer(model):
    return model.layers[-1].blocks[-1].norm1


def swin(cls, **options):
    return lambda: cls(img_size=(24, 40), window_size=4, **(TINY | options))


def v2cr():
    settings = TINY | {"img_size": (24, 48), "window_size": 3, "extra_norm_period": 1}
    return models.swin_transformer_v2_cr.SwinTransformerV2Cr(**settings)


def maxxvit(kind):
    config = models.maxxvit.MaxxVitCfg(
        embed_dim=(8, 8),
        depths=(1, 2),
        block_type=("C", kind),
        stem_width=8,
        transformer_cfg=models.maxxvit.MaxxVitTransformerCfg(
            dim_head=4, window_size=(4, 4), grid_size=(4, 4)
        ),
    )
    return lambda: models.maxxvit.MaxxVit(config, img_size=32, num_classes=5)


def mask_hiera(grid, pools):
    """Mask tokens in the order of mask units, found by unrolling the numbers of the grid."""

    def where(model, change):
        count, scale = grid[0] * grid[1], 2**pools
        numbers = torch.arange(count).view(grid).double()
        fine = numbers.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        order = model.unroll(fine.reshape(1, -1, 1))
        for _ in range(pools):
            pooled = order.view(1, 4, -1, 1)
            assert (pooled == pooled[:, :1]).all()
            order = pooled[:, 0]

        def masked(_module, _args, tokens):
            return tokens * change(torch.ones(1, count, 1).double())[:, order.flatten().long()]

        return model.blocks[-1].norm1.register_forward_hook(masked)

    return where


def mask_nest(model, change):
    """Mask tokens (B, 1, T, D)."""
    norm = model.levels[-1].transformer_encoder[-1].norm1
    return norm.register_forward_hook(lambda _module, _args, x: change(x[:, 0])[:, None])


# A row is (builder, image size, grid, number of prefix tokens, what is masked in the forward pass).
CASES = {
    "SwinTransformer": (
        swin(models.swin_transformer.SwinTransformer),
        (24, 40),
        (3, 5),
        0,
        mask_output(norm1_of_layer),
    ),
    "SwinTransformerV2": (
        swin(models.swin_transformer_v2.SwinTransformerV2),
        (24, 40),
        (3, 5),
        0,
        MaskMethodInput(lambda model: model.layers[-1].blocks[-1], "_attn"),
    ),
    "SwinTransformerV2Cr": (
        v2cr,
        (24, 48),
        (3, 6),
        0,
        MaskMethodInput(stage_block, "_shifted_window_attn"),
    ),
    "PyramidVisionTransformerV2": (
        lambda: models.pvt_v2.PyramidVisionTransformerV2(
            depths=(1, 1, 1, 2), embed_dims=(8, 8, 8, 8), num_heads=(1, 2, 2, 2), num_classes=5
        ),
        (64, 96),
        (2, 3),
        0,
        mask_output(norm1_of_stage),
    ),
    "Twins": (
        lambda: models.twins.Twins(
            img_size=64,
            num_classes=5,
            embed_dims=(8, 8, 8, 8),
            num_heads=(1, 2, 2, 2),
            depths=(1, 1, 1, 2),
            wss=[2, 2, 2, 2],
        ),
        (64, 96),
        (2, 3),
        0,
        mask_output(lambda model: model.blocks[-1][-1].norm1),
    ),
    "Twins, one block": (
        lambda: models.twins.Twins(
            img_size=64,
            num_classes=5,
            embed_dims=(8, 8, 8, 8),
            num_heads=(1, 2, 2, 2),
            depths=(1, 1, 1, 1),
        ),
        (64, 96),
        (2, 3),
        0,
        mask_output(lambda model: model.blocks[-1][-1].norm1),
    ),
    "MultiScaleVit": (
        lambda: models.mvitv2.MultiScaleVit(
            models.mvitv2.MultiScaleVitCfg(depths=(1, 1, 1, 2), embed_dim=8),
            img_size=64,
            num_classes=5,
        ),
        (64, 64),
        (2, 2),
        0,
        mask_output(norm1_of_stage),
    ),
    "MultiScaleVit, class token": (
        lambda: models.mvitv2.MultiScaleVit(
            models.mvitv2.MultiScaleVitCfg(
                depths=(1, 1, 1, 2),
                embed_dim=8,
                use_cls_token=True,
            ),
            img_size=64,
            num_classes=5,
            global_pool="token",
        ),
        (64, 64),
        (2, 2),
        1,
        mask_output(norm1_of_stage),
    ),
    "HieraDet": (
        lambda: models.hieradet_sam2.HieraDet(
            num_classes=5,
            embed_dim=8,
            stages=(1, 1, 1, 2),
            window_spec=(2, 2, 2, 2),
            global_att_blocks=(),
        ),
        (64, 96),
        (2, 3),
        0,
        mask_output(lambda model: model.blocks[-1].norm1),
    ),
    "GlobalContextVit": (
        lambda: models.gcvit.GlobalContextVit(
            img_size=64,
            num_classes=5,
            embed_dim=8,
            depths=(1, 1, 1, 2),
            num_heads=(1, 1, 2, 2),
            window_size=(2, 2, 2, 2),
        ),
        (64, 64),
        (2, 2),
        0,
        mask_output(norm1_of_stage),
    ),
    "DaVit": (
        lambda: models.davit.DaVit(
            depths=(1, 2),
            embed_dims=(8, 8),
            num_heads=(2, 2),
            window_size=4,
            num_classes=5,
        ),
        (24, 40),
        (3, 5),
        0,
        mask_output(lambda model: stage_block(model)[0].norm1),
    ),
    "PoolingVisionTransformer": (
        lambda: models.pit.PoolingVisionTransformer(
            img_size=(32, 48),
            patch_size=8,
            stride=8,
            base_dims=(4, 4, 4),
            depth=(1, 1, 2),
            heads=(1, 2, 2),
            num_classes=5,
            distilled=True,
        ),
        (32, 48),
        (1, 2),
        2,
        mask_output(lambda model: model.transformers[-1].blocks[-1].norm1),
    ),
    "Xcit": (
        lambda: models.xcit.Xcit(
            img_size=(32, 48), num_classes=5, embed_dim=32, depth=1, num_heads=2, cls_attn_layers=2
        ),
        (32, 48),
        (2, 3),
        1,
        mask_output(lambda model: model.cls_attn_blocks[-1].norm1),
    ),
    "MaxxVit of CoAtNet's blocks": (maxxvit("T"), (32, 32), (4, 4), 0, mask_output(norm1_of_stage)),
    "MaxxVit of MaxViT's blocks": (
        maxxvit("M"),
        (32, 32),
        (4, 4),
        0,
        mask_output(lambda model: stage_block(model).attn_grid.norm1),
    ),
    "MaxxVit of parallel blocks": (
        maxxvit("PM"),
        (32, 32),
        (4, 4),
        0,
        mask_output(lambda model: stage_block(model).attn.norm1),
    ),
    "CoaT": (
        create(
            "coat_lite_tiny",
            img_size=64,
            embed_dims=(8, 8, 8, 8),
            serial_depths=(1, 1, 1, 2),
        ),
        (64, 64),
        (2, 2),
        1,
        mask_output(lambda model: model.serial_blocks4[-1].norm1),
    ),
    "ConVit": (
        lambda: models.convit.ConVit(
            img_size=32,
            patch_size=8,
            num_classes=5,
            embed_dim=4,
            num_heads=2,
            depth=3,
            local_up_to_layer=2,
        ),
        (32, 32),
        (4, 4),
        1,
        mask_output(lambda model: model.blocks[-1].norm1),
    ),
    "Levit": (
        create("levit_128s", img_size=64, embed_dim=(16, 16, 16), key_dim=8, depth=(1, 1, 2)),
        (64, 64),
        (1, 1),
        0,
        mask_input(lambda model: stage_block(model).attn),
    ),
    "EfficientFormer": (
        create("efficientformer_l1", embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 2)),
        (224, 224),
        (7, 7),
        0,
        mask_output(norm1_of_stage),
    ),
    "EfficientFormerV2": (
        create(
            "efficientformerv2_s0",
            img_size=96,
            embed_dims=(8, 8, 8, 8),
            depths=(1, 1, 1, 2),
            num_vit=1,
        ),
        (96, 96),
        (3, 3),
        0,
        mask_input(lambda model: stage_block(model).token_mixer),
    ),
    "Nest": (
        lambda: models.nest.Nest(
            img_size=32,
            num_classes=5,
            embed_dims=(8, 8, 8),
            num_heads=(2, 2, 2),
            depths=(1, 1, 2),
        ),
        (32, 32),
        (2, 2),
        0,
        mask_nest,
    ),
    "VOLO": (
        lambda: models.volo.VOLO(
            layers=(1, 1, 1, 1),
            img_size=(32, 48),
            num_classes=5,
            embed_dims=(8, 8, 8, 8),
            num_heads=(2, 2, 2, 2),
        ),
        (32, 48),
        (2, 3),
        1,
        mask_output(lambda model: model.post_network[-1].norm1),
    ),
    "TNT": (
        create(
            "tnt_s_legacy_patch16_224",
            img_size=(32, 48),
            embed_dim=12,
            inner_dim=4,
            depth=2,
            num_heads_outer=2,
            num_heads_inner=2,
        ),
        (32, 48),
        (2, 3),
        1,
        mask_output(lambda model: model.blocks[-1].norm_out),
    ),
    "Visformer": (
        create("visformer_tiny", img_size=(64, 96), embed_dim=24, depth=(1, 1, 2), num_heads=2),
        (64, 96),
        (2, 3),
        0,
        mask_output(lambda model: model.stage3[-1].norm1),
    ),
    "EfficientVit": (
        create("efficientvit_b0"),
        (64, 96),
        (2, 3),
        0,
        mask_input(lambda model: stage_block(model).context_module.main),
    ),
    "EfficientVitMsra": (
        create("efficientvit_m0", img_size=128),
        (128, 128),
        (2, 2),
        0,
        mask_input(lambda model: stage_block(model).mixer.m),
    ),
    "FastVit": (
        create("fastvit_sa12", embed_dims=(8, 8, 8, 32), layers=(1, 1, 1, 2)),
        (64, 96),
        (2, 3),
        0,
        mask_output(lambda model: stage_block(model).norm),
    ),
    "TinyVit": (
        create(
            "tiny_vit_5m_224",
            embed_dims=(8, 8, 8, 8),
            num_heads=(1, 2, 2, 2),
            depths=(1, 1, 1, 2),
            window_sizes=(2, 2, 2, 3),
        ),
        (96, 96),
        (3, 3),
        0,
        mask_output(lambda model: stage_block(model).attn.norm),
    ),
    "MetaFormer": (
        lambda: models.metaformer.MetaFormer(
            depths=(1, 1, 1, 2),
            dims=(8, 12, 16, 32),
            token_mixers=[models.metaformer.SepConv] * 3 + [models.metaformer.Attention],
            norm_layers=[models.metaformer.LayerNorm2dNoBias] * 3
            + [models.metaformer.LayerNormNoBias],
            num_classes=5,
        ),
        (64, 96),
        (2, 3),
        0,
        mask_output(norm1_of_stage),
    ),
    "Hiera": (
        lambda: models.hiera.Hiera(
            img_size=(64, 96), num_classes=5, embed_dim=8, stages=(1, 1, 1, 2), q_pool=3
        ),
        (64, 96),
        (2, 3),
        0,
        mask_hiera((2, 3), 3),
    ),
    "Hiera, two poolings": (
        lambda: models.hiera.Hiera(
            img_size=(64, 96), num_classes=5, embed_dim=8, stages=(1, 1, 2), q_pool=2
        ),
        (64, 96),
        (4, 6),
        0,
        mask_hiera((4, 6), 2),
    ),
    "Hiera, pooling in the last block": (
        lambda: models.hiera.Hiera(
            img_size=(64, 96), num_classes=5, embed_dim=8, stages=(1, 1, 1), q_pool=2
        ),
        (64, 96),
        (8, 12),
        0,
        mask_hiera((8, 12), 1),
    ),
    "DeepseekVitClassifier": (
        create("deepseek_vit_412m", embed_dim=16, depth=2, num_heads=2),
        (28, 42),
        (2, 3),
        0,
        mask_output(lambda model: model.encoder.blocks[-1].norm1),
    ),
    "Qwen3VitClassifier": (
        create("qwen3_vit_88m", embed_dim=16, depth=2, num_heads=2),
        (64, 96),
        (4, 6),
        0,
        mask_output(lambda model: model.encoder.blocks[-1].norm1),
    ),
    "Qwen3VitClassifier, merging": (
        create("qwen3_vit_88m_merge", embed_dim=16, depth=2, num_heads=2),
        (64, 96),
        (4, 6),
        0,
        mask_output(lambda model: model.encoder.blocks[-1].norm1),
    ),
    "NextViT": (
        create("nextvit_small"),
        (64, 96),
        (2, 3),
        0,
        mask_output(norm1_of_stage),
    ),
    "CSATv2": (
        create("csatv2"),
        (128, 192),
        (2, 3),
        0,
        mask_output(lambda model: model.stages[-1][-1].norm1),
    ),
    "VisionTransformerSAM": (
        create(
            "samvit_base_patch16",
            img_size=64,
            embed_dim=8,
            depth=2,
            num_heads=2,
            neck_chans=8,
            global_attn_indexes=(1,),
        ),
        (64, 64),
        (4, 4),
        0,
        mask_output(lambda model: model.blocks[-1].norm1),
    ),
}

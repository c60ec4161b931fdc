"""The paper as naive loops in float64: slow, short, and sharing no code with the package.

For each patch one whole forward pass of the user's model, with a hook that multiplies the tokens
by that patch's mask. Nothing here knows of splits, levels or closed forms.
"""

import copy

import torch

GAUSSIAN = [[1 / 16, 2 / 16, 1 / 16], [2 / 16, 4 / 16, 2 / 16], [1 / 16, 2 / 16, 1 / 16]]
DIRAC = [[1.0]]


def naive_mask(grid, row, column, kernel, prefix, class_token):
    """The mask of one patch: a list of T weights."""
    weights = GAUSSIAN if kernel == "gaussian" else DIRAC
    reach = len(weights) // 2
    patches = []
    for y in range(grid[0]):
        for x in range(grid[1]):
            near = abs(y - row) <= reach and abs(x - column) <= reach
            patches.append(weights[y - row + reach][x - column + reach] if near else 0.0)
    return [1.0 if class_token else 0.0] * prefix + patches


def cut_of(model):
    """Where F stands in most of timm's models: the block, the modules and which side of them."""
    block = model.blocks[-1]
    return block, [block.norm1], "output"


@torch.no_grad()
def naive_logits(model, images, grid, *, kernel, class_token, layer, find_cut=cut_of, prefix=None):
    """Logits (B, C, h, w) under each mask, and (B, C) unmasked.

    `find_cut` gives of a model the block, the modules in it whose output is F, or whose input.
    `prefix` is how many tokens stand before the patches; timm's models tell.
    """
    model = copy.deepcopy(model).double().eval()
    images = images.double()
    prefix = model.num_prefix_tokens if prefix is None else prefix
    block, modules, side = find_cut(model)
    plain = logits_of(model(images))
    result = torch.empty(*plain.shape, *grid, dtype=torch.float64)
    for row in range(grid[0]):
        for column in range(grid[1]):
            mask = naive_mask(grid, row, column, kernel, prefix, class_token)
            mask = torch.tensor(mask, dtype=torch.float64)

            def masked(tokens, mask=mask):
                shape = (-1, 1) if tokens.ndim == 3 else (*grid, 1)  # or (B, h, w, D)
                return tokens * mask.view(shape)

            def after(_module, _args, output, masked=masked):
                return masked(output)

            def before(_module, args, masked=masked):
                return (masked(args[0]), *args[1:])

            if layer == "block":
                hooks = [block.register_forward_pre_hook(before)]
            elif side == "output":
                hooks = [module.register_forward_hook(after) for module in modules]
            else:
                hooks = [module.register_forward_pre_hook(before) for module in modules]
            result[:, :, row, column] = logits_of(model(images))
            for hook in hooks:
                hook.remove()
    return result, plain


def logits_of(output):
    """transformers' models give them inside an object."""
    return getattr(output, "logits", output)

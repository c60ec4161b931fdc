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


@torch.no_grad()
def naive_logits(model, images, grid, *, kernel, class_token, layer):
    """Logits (B, C, h, w) under each mask, and (B, C) unmasked, of a timm VisionTransformer."""
    model = copy.deepcopy(model).double().eval()
    images = images.double()
    block = model.blocks[-1]
    plain = model(images)
    result = torch.empty(*plain.shape, *grid, dtype=torch.float64)
    for row in range(grid[0]):
        for column in range(grid[1]):
            mask = naive_mask(grid, row, column, kernel, model.num_prefix_tokens, class_token)
            mask = torch.tensor(mask, dtype=torch.float64)[None, :, None]
            if layer == "norm1":
                hook = block.norm1.register_forward_hook(lambda _m, _i, out, mask=mask: out * mask)
            else:
                hook = block.register_forward_pre_hook(
                    lambda _m, args, mask=mask: (args[0] * mask,)
                )
            result[:, :, row, column] = model(images)
            hook.remove()
    return result, plain

"""The paper as naive loops in float64: slow, short, and sharing no code with the package.

For each patch the user's model runs one whole forward pass, with a hook that multiplies the tokens
by that patch's mask. Nothing here knows of splits, levels or closed forms.
"""

import copy

import torch

WINDOWS = {
    "gaussian": [[1 / 16, 2 / 16, 1 / 16], [2 / 16, 4 / 16, 2 / 16], [1 / 16, 2 / 16, 1 / 16]],
    "dirac": [[1.0]],
    "box": [[1.0] * 3] * 3,
    "box5": [[1.0] * 5] * 5,
}


def naive_mask(grid, row, column, kernel, prefix, class_token):
    """Return the mask of one patch as a list of T weights."""
    weights = WINDOWS[kernel]
    reach = len(weights) // 2
    patches = []
    for y in range(grid[0]):
        for x in range(grid[1]):
            near = abs(y - row) <= reach and abs(x - column) <= reach
            patches.append(weights[y - row + reach][x - column + reach] if near else 0.0)
    return [1.0 if class_token else 0.0] * prefix + patches


def cut_of(model):
    """Return the place of F in most timm models: the block, the modules, and their side."""
    block = model.blocks[-1]
    return block, [block.norm1], "output"


@torch.no_grad()
def naive_logits(model, images, grid, *, kernel, class_token, layer, find_cut=cut_of, prefix=None):
    """Return the logits (B, C, h, w) under each mask, and (B, C) of the unmasked images.

    `find_cut` returns the block of a model, the modules in it that F leaves or enters, and "output"
    or "input" accordingly. `prefix` is the number of tokens before the patches; timm's models know
    it themselves.
    """
    model = copy.deepcopy(model).double().eval()
    images = images.double()
    prefix = model.num_prefix_tokens if prefix is None else prefix
    block, modules, side = find_cut(model)
    unmasked = logits_of(model(images))
    result = torch.empty(*unmasked.shape, *grid, dtype=torch.float64)
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
    return result, unmasked


def cuts_of(model):
    """Return the place of F in every block of most timm models, from the first on."""
    return [(block, [block.norm1], "output") for block in model.blocks]


@torch.no_grad()
def naive_deep_logits(
    model,
    images,
    grid,
    *,
    kernel,
    class_token,
    depth,
    readers=1,
    find_cuts=cuts_of,
    prefix=None,
):
    """Return the logits (B, C, h, w) under each mask, and (B, C) under the all-null mask.

    For each mask the whole model runs once. In each of its last `depth` blocks a hook multiplies F
    by the mask, and before each of them another puts all tokens but the readout tokens back to what
    they are for the unmasked images. So only the readout tokens carry what the masks have changed
    from block to block. Models that take patches and readout tokens apart have nothing to put back.
    """
    model = copy.deepcopy(model).double().eval()
    images = images.double()
    prefix = model.num_prefix_tokens if prefix is None else prefix
    cuts = find_cuts(model)[-depth:]
    streams = {}

    def record(block, args):
        streams[block] = args[0]

    recorders = [block.register_forward_pre_hook(record) for block, _, _ in cuts]
    unmasked = logits_of(model(images))
    for hook in recorders:
        hook.remove()
    apart = streams[cuts[0][0]].shape[1] == grid[0] * grid[1] and prefix > 0

    def put_back(block, args):
        if apart:
            return None
        return torch.cat([args[0][:, :readers], streams[block][:, readers:]], dim=1), *args[1:]

    def under(mask):
        mask = torch.tensor(mask, dtype=torch.float64)[:, None]
        hooks = []
        for block, modules, side in cuts:
            hooks.append(block.register_forward_pre_hook(put_back))
            for module in modules:
                if side == "output":
                    hook = module.register_forward_hook(lambda _m, _args, output: output * mask)
                else:
                    hook = module.register_forward_pre_hook(
                        lambda _m, args: (args[0] * mask, *args[1:])
                    )
                hooks.append(hook)
        logits = logits_of(model(images))
        for hook in hooks:
            hook.remove()
        return logits

    result = torch.empty(*unmasked.shape, *grid, dtype=torch.float64)
    for row in range(grid[0]):
        for column in range(grid[1]):
            mask = naive_mask(grid, row, column, kernel, prefix, class_token)
            result[:, :, row, column] = under(mask)
    null = under([1.0 if class_token else 0.0] * prefix + [0.0] * (grid[0] * grid[1]))
    return result, null


def naive_trace(model, images, targets):
    """Return the trace (B, K, N) of a timm VisionTransformer by automatic differentiation.

    Attention weights, the norms' deviations and the activations' gates are detached, so that they
    count as constants. The trace is the sum over blocks of stream · gradient of log p_c.
    """
    model = copy.deepcopy(model).double().eval()
    streams = []

    def norm(layer, x):
        deviation = (x.var(dim=-1, correction=0, keepdim=True) + layer.eps).sqrt().detach()
        return (x - x.mean(dim=-1, keepdim=True)) / deviation * layer.weight + layer.bias

    def block_of(block, x):
        attention, f = block.attn, norm(block.norm1, x)
        q, k, v = attention.qkv(f).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
        q, k = attention.q_norm(q).transpose(1, 2), attention.k_norm(k).transpose(1, 2)
        weights = (q @ k.transpose(2, 3) * attention.scale).softmax(-1).detach()
        heads = (weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
        x = x + block.ls1(attention.proj(heads))
        u = block.mlp.fc1(norm(block.norm2, x))
        gate = (block.mlp.act(u) / u).detach()
        return x + block.ls2(block.mlp.fc2(u * gate))

    with torch.no_grad():
        hook = model.blocks[0].register_forward_pre_hook(lambda _m, args: streams.append(args[0]))
        model(images.double())
        hook.remove()
    streams = [streams[0].detach().requires_grad_()]
    for block in model.blocks:
        streams.append(block_of(block, streams[-1]))
    y = norm(model.norm, streams[-1])
    logits = model.head(y[:, 0])
    if hasattr(model, "head_dist"):
        logits = (logits + model.head_dist(y[:, 1])) / 2
    chosen = logits.log_softmax(-1).gather(1, targets)
    found = []
    for k in range(targets.shape[1]):
        gradients = torch.autograd.grad(chosen[:, k].sum(), streams[:-1], retain_graph=True)
        parts = [(x * g).sum(-1) for x, g in zip(streams[:-1], gradients, strict=True)]
        found.append(torch.stack(parts).sum(0)[:, model.num_prefix_tokens :])
    return torch.stack(found, dim=1).detach()


def logits_of(output):
    """Return the logits, which transformers' models give inside an object."""
    return getattr(output, "logits", output)

"""Rollout and relevance as their authors define them, image by image, in float64.

Relevance is the generic formula R_x = x ⊙ vjp(R / Z) with PyTorch's own vector-Jacobian product of
each layer, one attention head after the other. It knows no blocks but timm's standard ones, and
shares nothing with the package.
"""

import copy

import torch
from torch.nn.functional import linear


def attention_of(model, images):
    """Return what timm's unfused attention computes: (B, heads, T, T) for each layer."""
    model, found = copy.deepcopy(model).double(), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _m, _i, output: found.append(output))
    with torch.no_grad():
        model(images.double())
    return found


def naive_rollout(weights, *, fuse="mean", start=0, readouts=1):
    """Return rows (B, T) of the whole product of the layers' weights (B, heads, T, T)."""
    rows = []
    for image in range(len(weights[0])):
        product = None
        for layer in weights[start:]:
            heads = layer[image]
            fused = {"mean": heads.mean(0), "max": heads.max(0)[0], "min": heads.min(0)[0]}[fuse]
            fused = fused + torch.eye(len(fused), dtype=torch.float64)
            for row in fused:
                row /= row.sum()
            product = fused if product is None else fused @ product
        rows.append(product[:readouts].mean(dim=0))
    return torch.stack(rows)


def divide(r, z):
    return torch.where(z == 0, 0.0, r / (z + 1e-9))


def share(layer, inputs, r):
    """Return R_x = x ⊙ vjp(R / Z) for each input of a layer."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    z = layer(*inputs)
    gradients = torch.autograd.grad(z, inputs, divide(r, z.detach()))
    return [(x * g).detach() for x, g in zip(inputs, gradients, strict=True)]


def share_linear(weight, x, r):
    """Return the share of x by the αβ rule with α = 1: weights of the same sign as the input."""

    def positive(over, under):
        return linear(over, weight.clamp(min=0)) + linear(under, weight.clamp(max=0))

    return sum(share(positive, [x.clamp(min=0), x.clamp(max=0)], r))


def share_sum(a, b, r):
    of_a, of_b = share(torch.add, [a, b], r)
    size = of_a.sum().abs() + of_b.sum().abs()
    scaled = []
    for part in (of_a, of_b):
        wanted = divide(part.sum().abs(), size) * r.sum()
        scaled.append(part * divide(wanted, part.sum()))
    return scaled


def share_copies(x, *shares):
    return sum(x * divide(r, x) for r in shares)


def naive_relevance(model, image, target, *, start=0):
    """Return the readout tokens' mean row (T,) for one image (ch, H, W) and class."""
    model = copy.deepcopy(model).double().requires_grad_(False)
    entered = []
    model.blocks[0].register_forward_pre_hook(lambda _m, args: entered.append(args[0]))
    model(image[None].double())
    x = entered[0].requires_grad_()

    kept = []
    for block in model.blocks:
        attn, normed = block.attn, block.norm1(x)
        qkv = attn.qkv(normed)[0].view(x.shape[1], 3, attn.num_heads, -1)
        q, k, v = qkv.permute(1, 2, 0, 3)
        q, k = attn.q_norm(q), attn.k_norm(k)
        weights = [(qh @ kh.T * attn.scale).softmax(-1) for qh, kh in zip(q, k, strict=True)]
        joined = torch.cat([a @ vh for a, vh in zip(weights, v, strict=True)], dim=1)[None]
        normed_heads = attn.norm(joined)
        attended = block.ls1(attn.proj(normed_heads))
        y = x + attended
        normed2 = block.norm2(y)
        hidden = block.mlp.norm(block.mlp.act(block.mlp.fc1(normed2)))
        added = block.ls2(block.mlp.fc2(hidden))
        kept.append(
            (x, normed, q, k, v, weights, normed_heads, attended, y, normed2, hidden, added)
        )
        x = y + added
    normed = model.norm(x)
    heads = [model.head, model.head_dist] if hasattr(model, "head_dist") else [model.head]
    scores = [head(normed[:, at]) / len(heads) for at, head in enumerate(heads)]
    every = [a for layer in kept for a in layer[5]]
    gradients = iter(torch.autograd.grad(sum(scores)[0, target], every))

    with torch.no_grad():
        r = torch.zeros_like(scores[0])
        r[0, target] = 1
    each = [r] if len(heads) == 1 else share_sum(*scores, r)
    r = torch.zeros_like(normed)
    for at, (head, one) in enumerate(zip(heads, each, strict=True)):
        read = normed[:, at].detach()
        r[:, at] = share_copies(read, share_linear(head.weight, read, one))

    gradients = [[next(gradients) for _ in layer[5]] for layer in kept]
    product = torch.eye(x.shape[1], dtype=torch.float64)
    every = list(zip(model.blocks, kept, gradients, strict=True))
    for block, layer, slopes in reversed(every[start:]):
        x, normed, q, k, v, weights, joined, attended, y, normed2, hidden, added = layer
        r_y, r_mlp = share_sum(y, added, r)
        r_mlp = share_linear(block.mlp.fc2.weight, hidden, r_mlp)
        r_mlp = share_linear(block.mlp.fc1.weight, normed2, r_mlp)
        r = share_copies(y.detach(), r_y, r_mlp)
        r_x, r_attended = share_sum(x, attended, r)
        r_joined = share_linear(block.attn.proj.weight, joined, r_attended)
        r_heads = r_joined[0].chunk(len(weights), dim=1)
        queries, keys, values, weighted = [], [], [], []
        for a, slope, qh, kh, vh, rh in zip(weights, slopes, q, k, v, r_heads, strict=True):
            r_a, r_v = (part / 2 for part in share(torch.matmul, [a, vh], rh))
            r_q, r_k = (part / 2 for part in share(torch.matmul, [qh, kh.T], r_a))
            weighted.append((slope * r_a).clamp(min=0))
            queries.append(r_q)
            keys.append(r_k.T)
            values.append(r_v)
        r_qkv = torch.cat([*queries, *keys, *values], dim=1)[None]
        r_normed = share_linear(block.attn.qkv.weight, normed, r_qkv)
        r = share_copies(x.detach(), r_x, r_normed)
        product = product @ (torch.stack(weighted).mean(dim=0) + torch.eye(len(product)))
    return product[: len(heads)].mean(dim=0)

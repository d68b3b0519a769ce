"""What the heads of a Vision Transformer look at, in numbers: the shares, their distance and entropy,
rollout, and the deletion test that says whether a map is true.

Left out: gradients, maps for single classes, and other models than `ViTModel`.

Follows Dosovitskiy et al. (2021) for the distance and Abnar and Zuidema (2020, "Quantifying Attention
Flow in Transformers") for rollout.

Explained and proven in appendix_vit_bert/03_vit.ipynb; written from there by `make promote`.
"""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from shared.checks import require
from shared.model.attention import MultiHeadAttention, scaled_dot_product_attention
from shared.model.vit import ViTModel


@torch.no_grad()
def image_attention(model: ViTModel, images: Tensor) -> Tensor:
    """Return what each head gives to each token of each image: (n_layers, batch, n_heads, tokens, tokens).

    Entry [l, b, h, i, j] is the share that token i takes from token j in head h of block l; token 0 is the class token.

    Args:
        model: In evaluation mode; adapters may be attached.
        images: What the model takes.

    Raises:
        ValueError: The model is in training mode, or refuses the images.
    """
    require("model.training", model.training, not model.training, "False: call model.eval() first")
    maps: list[Tensor] = []

    def keep(attention: MultiHeadAttention, inputs: tuple[Tensor, ...]) -> None:
        query, key, value = attention._project(inputs[0], None, None, None)
        maps.append(scaled_dot_product_attention(query, key, value)[1])

    with ExitStack() as hooks:
        for block in model.blocks:
            hooks.enter_context(block.attention.register_forward_pre_hook(keep))
        model(images)
    return torch.stack(maps)


def attention_distance(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return how far each head looks: the mean distance of patches, in patches, weighted by attention.

    Rows and columns of the class token are left out, and the weights among patches made to sum to 1 again.

    Args:
        maps: (..., tokens, tokens), the class token first.
        grid: Patches down and across.

    Returns:
        (...,), the mean over the patches that look.

    Raises:
        ValueError: The number of tokens is not that of the grid and a class token.
    """
    n = grid[0] * grid[1]
    require("tokens", maps.shape[-1], maps.shape[-1] == 1 + n, f"{1 + n} for a grid of {tuple(grid)}")
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32) for side in grid)).to(maps.device)
    weights = maps[..., 1:, 1:]
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return (weights * torch.cdist(places, places)).sum(dim=-1).mean(dim=-1)


def row_entropy(maps: Tensor) -> Tensor:
    """Return the entropy of each row of weights in nats: 0 if one token gets all, ln(tokens) if all get the same."""
    return -torch.special.xlogy(maps, maps).sum(dim=-1)


def attention_rollout(maps: Tensor) -> Tensor:
    """Return how much of each patch arrives at the class token through all blocks (Abnar and Zuidema, 2020).

    The heads are averaged, the shortcut counts as much as attention, and the blocks' matrices are multiplied.

    Args:
        maps: (n_layers, batch, n_heads, tokens, tokens), of `image_attention`.

    Returns:
        (batch, tokens - 1), each row sums to 1.
    """
    require("maps", tuple(maps.shape), maps.dim() == 5, "(layers, batch, heads, tokens, tokens)")
    unit = torch.eye(maps.shape[-1], device=maps.device)
    total = unit
    for layer in maps.mean(dim=2):
        total = (0.5 * layer + 0.5 * unit) @ total
    arriving = total[:, 0, 1:]
    return arriving / arriving.sum(dim=-1, keepdim=True)


@torch.no_grad()
def deletion_effects(
    model: nn.Module, images: Tensor, labels: Tensor, patch_size: int, fill: Tensor
) -> Tensor:
    """Return by how much the logit of the label falls when a patch is replaced, for each patch alone.

    Args:
        model: Called as model(images), it returns logits.
        images: (batch, channels, height, width).
        labels: int64 (batch,).
        patch_size: Side of a patch in pixels.
        fill: An image (channels, height, width) whose patches are put in, such as the mean of all images.

    Returns:
        (batch, patches); positive where the patch spoke for the label.
    """
    across = images.shape[3] // patch_size
    n_patches = across * (images.shape[2] // patch_size)
    rows = torch.arange(len(images))
    before, found = model(images)[rows, labels], []
    for place in range(n_patches):
        top, left = (patch_size * k for k in divmod(place, across))
        window = (..., slice(top, top + patch_size), slice(left, left + patch_size))
        changed = images.clone()
        changed[window] = fill[window]
        found.append(before - model(changed)[rows, labels])
    return torch.stack(found, dim=1)

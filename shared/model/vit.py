"""The Vision Transformer: images cut into patches, an encoder that sees all of them, and a classifier.

`ViTModel` gives a vector for the class token and one for each patch, after the final norm. The blocks are
`TransformerBlock` with the norms at the head of the branches. `interpolate_positions` stretches the
position vectors to another grid; height and width may differ.

Left out: a pooler, patches hidden for pretraining, distillation tokens, windows and shifted windows, and
convolutions before the patches.

Follows Dosovitskiy et al. (2021, "An Image is Worth 16x16 Words: Transformers for Image Recognition at
Scale") and the weights released with it.

Explained and proven in appendix_vit_bert/03_vit.ipynb; written from there by `make promote`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import check_choice, check_dropout, check_sizes, choose, require, whole_number
from shared.model.attention import MultiHeadAttention
from shared.model.bert import initialize_normal
from shared.model.layers import ACTIVATIONS, FeedForward, LayerNorm, TransformerBlock


def image_patches(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into square patches, from left to right and from top to bottom, and lay each out as a vector.

    A vector has the first channel's pixels row by row, then those of the next channel: the order of a convolution's
    weight.

    Args:
        images: (batch, channels, height, width).
        patch_size: Side of a patch in pixels; it divides height and width.

    Returns:
        (batch, patches, channels * patch_size²).

    Raises:
        ValueError: The images have not four dimensions, or their sides are no multiples of the patch size.
    """
    size = whole_number("patch_size", patch_size)
    if images.dim() != 4:
        raise ValueError(f"images must be (batch, channels, height, width), got {tuple(images.shape)}")
    sides = tuple(images.shape[2:])
    require("height and width", sides, not any(side % size for side in sides), f"multiples of {size}")
    x = images.unflatten(3, (-1, size)).unflatten(
        2, (-1, size)
    )  # (batch, channels, down, size, across, size)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class PatchEmbedding(nn.Module):
    """Images to one vector for each patch: all patches go through the same linear map.

    Args:
        patch_size: Side of a patch in pixels.
        n_channels: Of the images.
        emb_dim: Width of the vectors.

    Raises:
        ValueError: A size is below 1; in `forward`, what `image_patches` refuses.
    """

    def __init__(self, patch_size: int, n_channels: int, emb_dim: int) -> None:
        super().__init__()
        check_sizes(patch_size=patch_size, n_channels=n_channels, emb_dim=emb_dim)
        self.patch_size = patch_size
        self.projection = nn.Linear(n_channels * patch_size**2, emb_dim)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, patches, emb_dim)."""
        return self.projection(image_patches(images, self.patch_size))


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a Vision Transformer; the defaults are those of the base size as released.

    Attributes:
        image_size: Height and width in pixels; one number means a square. It is kept as a pair.
        patch_size: Side of a square patch in pixels; it divides both sides of the image.
        n_channels: 1 for gray, 3 for red, green and blue.
        emb_dim, n_heads, n_layers: Width of the hidden vectors, heads of a block, number of blocks.
        feed_forward_dim: Width inside a block's feed-forward network; None: 4 * emb_dim.
        activation: A name in `ACTIVATIONS`.
        qkv_bias: Whether queries, keys and values have a bias.
        dropout: Probability after the embeddings, on attention weights, at the end of each branch.
        norm_eps: What the norms add to the variance.
        init_std: Standard deviation of the initial weights.

    Raises:
        ValueError: A value is out of range, patches do not divide the image, or heads the width.
        TypeError: A value has the wrong type.
    """

    image_size: int | Sequence[int] = 224
    patch_size: int = 16
    n_channels: int = 3
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    feed_forward_dim: int | None = None
    activation: str = "gelu"
    qkv_bias: bool = True
    dropout: float = 0.0
    norm_eps: float = 1e-12
    init_std: float = 0.02

    def __post_init__(self) -> None:
        sides = self.image_size if isinstance(self.image_size, Sequence) else (self.image_size,) * 2
        require("image_size", self.image_size, len(sides) == 2, "one number, or height and width")
        object.__setattr__(self, "image_size", tuple(whole_number("image_size", side) for side in sides))
        names = ("patch_size", "n_channels", "emb_dim", "n_heads", "n_layers")
        check_sizes(**{name: getattr(self, name) for name in names})
        if self.feed_forward_dim is not None:
            check_sizes(feed_forward_dim=self.feed_forward_dim)
        divides = not any(side % self.patch_size for side in self.image_size)
        require("image_size", self.image_size, divides, f"multiples of patch_size={self.patch_size}")
        fits = self.emb_dim % self.n_heads == 0
        require("emb_dim", self.emb_dim, fits, f"a multiple of n_heads={self.n_heads}")
        check_choice("activation", self.activation, ACTIVATIONS)
        check_dropout(self.dropout)
        require("norm_eps", self.norm_eps, 0 < self.norm_eps < 1, "between 0 and 1")
        require("init_std", self.init_std, 0 < self.init_std < 1, "between 0 and 1")

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches down and across."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def n_patches(self) -> int:
        """Number of patches of an image."""
        return self.grid[0] * self.grid[1]

    @classmethod
    def preset(cls, name: str, **overrides: object) -> "ViTConfig":
        """Return the `VIT_PRESETS` entry `name` with some fields changed; ValueError if there is none."""
        return cls(**{**choose("name", name, VIT_PRESETS), **overrides})


# The sizes of Dosovitskiy et al. (2021; the default is the base), and the one that we train on digits.
VIT_PRESETS: dict[str, dict[str, object]] = {
    "vit-base": {},
    "vit-large": {"emb_dim": 1024, "n_heads": 16, "n_layers": 24},
    "digits": {
        "image_size": 8,
        "patch_size": 2,
        "n_channels": 1,
        "emb_dim": 64,
        "n_heads": 4,
        "n_layers": 4,
        "feed_forward_dim": 128,
        "init_std": 0.1,
    },
}


def build_vision_block(config: ViTConfig) -> TransformerBlock:
    """Return one block: attention among all patches, the norms at the head of the branches."""
    options = {"dropout": config.dropout, "qkv_bias": config.qkv_bias}
    attention = MultiHeadAttention(config.emb_dim, config.n_heads, **options)
    feed_forward = FeedForward(config.emb_dim, config.feed_forward_dim, activation=config.activation)
    norms = [LayerNorm(config.emb_dim, config.norm_eps) for _ in range(2)]
    return TransformerBlock(attention, feed_forward, *norms, dropout=config.dropout)


def interpolate_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Stretch position vectors of a grid of patches to another grid, as a picture with emb_dim channels.

    Between the old places the values run along a smooth curve (bicubic), as in transformers. For the same grid they
    come back as they are.

    Args:
        positions: (1 + down * across, emb_dim): that of the class token first, then those of the patches.
        old, new: Patches down and across.

    Returns:
        (1 + down * across of the new grid, emb_dim).

    Raises:
        ValueError: The number of positions is not that of the old grid, or a side of the new one is below 1.
    """
    require("positions", len(positions), len(positions) == 1 + old[0] * old[1], f"those of a grid of {old}")
    check_sizes(down=new[0], across=new[1])
    if tuple(old) == tuple(new):
        return positions
    picture = positions[1:].T.unflatten(1, old)[None]  # (1, emb_dim, down, across)
    stretched = F.interpolate(picture, size=tuple(new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], stretched[0].flatten(1).T])


class ViTModel(nn.Module):
    """The encoder: images in, for the class token and for each patch a vector that knows the whole image.

    Its parts are `patch_embedding`, `class_token` (emb_dim,), `positions` (1 + patches, emb_dim), `blocks` and
    `final_norm`.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = PatchEmbedding(config.patch_size, config.n_channels, config.emb_dim)
        self.class_token = nn.Parameter(torch.zeros(config.emb_dim))
        self.positions = nn.Parameter(torch.zeros(1 + config.n_patches, config.emb_dim))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(build_vision_block(config) for _ in range(config.n_layers))
        self.final_norm = LayerNorm(config.emb_dim, config.norm_eps)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all weights anew: matrices, positions and class token normal with `init_std`, norms 1, biases 0."""
        initialize_normal(self, self.config.init_std)
        nn.init.normal_(self.class_token, std=self.config.init_std)

    def forward(self, images: Tensor, *, interpolate: bool = False) -> Tensor:
        """Return the hidden vectors after the final norm, (batch, 1 + patches, emb_dim): the class token's first.

        Args:
            images: Float (batch, channels, height, width), prepared as in training.
            interpolate: Let images have another size: the positions are stretched to their grid.

        Raises:
            ValueError: The number of channels or the size does not fit, or there is no image.
            TypeError: The images are not float.
        """
        x = self.embed(images, interpolate=interpolate)
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)

    def embed(self, images: Tensor, *, interpolate: bool = False) -> Tensor:
        """Return what enters the first block, (batch, 1 + patches, emb_dim); arguments and errors as in `forward`."""
        grid = self._check(images, interpolate)
        x = self.patch_embedding(images)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        return self.dropout(x + interpolate_positions(self.positions, self.config.grid, grid))

    def _check(self, images: Tensor, interpolate: bool) -> tuple[int, int]:
        """Refuse what does not fit, before anything is computed; return the grid of patches."""
        config, size = self.config, self.config.patch_size
        wanted = f"(batch, {config.n_channels}, height, width), at least one image"
        if images.dim() != 4 or not len(images) or images.shape[1] != config.n_channels:
            raise ValueError(f"images must be {wanted}, got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must be float, prepared as in training, got {images.dtype}")
        sides = tuple(images.shape[2:])
        if not interpolate:
            require("height and width", sides, sides == config.image_size, f"{config.image_size}")
        fits = all(side >= size and side % size == 0 for side in sides)
        require("height and width", sides, fits, f"multiples of patch_size={size}")
        return sides[0] // size, sides[1] // size

    @property
    def n_parameters(self) -> int:
        """Number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())


VIT_POOLINGS = ("class", "mean")


class ViTClassifier(nn.Module):
    """A Vision Transformer with a classification head.

    Args:
        body: The encoder.
        n_labels: Number of labels.
        pooling: How an image becomes one vector: "class", that of the class token, or "mean", over all patches.

    Raises:
        ValueError: `n_labels` is below 2, or the pooling unknown.
    """

    def __init__(self, body: ViTModel, n_labels: int, pooling: str = "class") -> None:
        super().__init__()
        require("n_labels", n_labels, whole_number("n_labels", n_labels) > 1, "at least 2")
        check_choice("pooling", pooling, VIT_POOLINGS)
        self.body, self.pooling = body, pooling
        self.head = nn.Linear(body.config.emb_dim, n_labels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor, **options: bool) -> Tensor:
        """Return one vector for each image, (batch, emb_dim)."""
        hidden = self.body(images, **options)
        return hidden[:, 0] if self.pooling == "class" else hidden[:, 1:].mean(dim=1)

    def forward(self, images: Tensor, **options: bool) -> Tensor:
        """Return logits (batch, n_labels); images and options are those of `ViTModel`."""
        return self.head(self.features(images, **options))

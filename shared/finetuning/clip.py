"""CLIP: an image encoder and a text encoder whose vectors can be compared.

The image encoder is a `ViTModel` with one more norm, the text encoder a `GPTModel` without its head, read
at the end token.

Left out: files of published models by name, their tokenizer, and image encoders that are convolutions.

Follows Radford et al. (2021, "Learning Transferable Visual Models From Natural Language Supervision").

Explained and proven in appendix_vit_bert/04_images_and_words.ipynb; written from there by `make promote`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.checks import check_choice, check_sizes
from shared.finetuning.contrastive import LogitScale, pair_logits
from shared.model.gpt import GPTConfig, GPTModel
from shared.model.layers import ACTIVATIONS, LayerNorm
from shared.model.vit import ViTConfig, ViTModel


def quick_gelu(x: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x), the approximation of GELU in the first CLIP models."""
    return x * torch.sigmoid(1.702 * x)


CLIP_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {**ACTIVATIONS, "quick_gelu": quick_gelu}


@dataclass(frozen=True)
class CLIPConfig:
    """The shape of a pair of encoders.

    Attributes:
        image: Of the image encoder.
        text: Of the text encoder: a GPT with learned positions whose output head is not used.
        shared_dim: Width of the vectors that images and texts have in common.
        end_id: The token whose vector stands for the text; it comes once, after the last word.
        activation: A name in `CLIP_ACTIVATIONS`, for both encoders.

    Raises:
        ValueError: A value is out of range.
    """

    image: ViTConfig
    text: GPTConfig
    shared_dim: int = 512
    end_id: int = 49407
    activation: str = "quick_gelu"

    def __post_init__(self) -> None:
        check_sizes(shared_dim=self.shared_dim)
        check_choice("activation", self.activation, CLIP_ACTIVATIONS)


class CLIPImageEncoder(ViTModel):
    """A `ViTModel` as CLIP has it: no bias on patches, and one more norm before the first block."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.patch_embedding.projection.bias = None
        self.input_norm = LayerNorm(config.emb_dim, config.norm_eps)

    def embed(self, images: Tensor, *, interpolate: bool = False) -> Tensor:
        """Return what enters the first block, (batch, 1 + patches, emb_dim)."""
        return self.input_norm(super().embed(images, interpolate=interpolate))


class CLIPModel(nn.Module):
    """Two encoders whose vectors can be compared: a picture and its caption point in the same direction.

    Radford et al. (2021, "Learning Transferable Visual Models From Natural Language Supervision").
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = CLIPImageEncoder(config.image)
        self.text_encoder = GPTModel(config.text)
        for block in [*self.image_encoder.blocks, *self.text_encoder.blocks]:
            block.feed_forward.activation = CLIP_ACTIVATIONS[config.activation]
        self.image_projection = nn.Linear(config.image.emb_dim, config.shared_dim, bias=False)
        self.text_projection = nn.Linear(config.text.emb_dim, config.shared_dim, bias=False)
        self.scale = LogitScale()

    def image_features(self, images: Tensor) -> Tensor:
        """Return a vector for each image, (batch, shared_dim), of any length; `ViTModel` says what it refuses."""
        return self.image_projection(self.image_encoder(images)[:, 0])

    def text_features(self, tokens: Tensor) -> Tensor:
        """Return a vector for each text, (batch, shared_dim), read at its end token.

        What stands behind the end token is padding; under the causal mask the end token does not see it.

        Args:
            tokens: int64 ids (batch, tokens).

        Raises:
            ValueError: A row has no end token; or what `GPTModel` refuses.
        """
        ends = tokens == self.config.end_id
        if not tokens.numel() or not bool(ends.any(dim=1).all()):
            raise ValueError(
                f"tokens must have end_id={self.config.end_id} in each row, got {tokens.tolist()}"
            )
        hidden = self.text_encoder.hidden_states(tokens)
        return self.text_projection(hidden[torch.arange(len(tokens)), ends.int().argmax(dim=1)])

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits of each image with each text, (images, texts)."""
        return pair_logits(self.image_features(images), self.text_features(tokens), self.scale())

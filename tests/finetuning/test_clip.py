"""The pair of encoders against transformers' CLIPModel, with copied weights; bad input."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from shared.finetuning.clip import CLIPConfig, CLIPModel
from shared.finetuning.contrastive import contrastive_loss
from shared.model.gpt import GPTConfig
from shared.model.vit import ViTConfig

IMAGE = ViTConfig(8, 4, 3, 24, 3, 2, 50, norm_eps=1e-5)
TEXT = GPTConfig(40, 10, 32, 4, 2, feed_forward_dim=64, qkv_bias=True)
TOKENS = torch.tensor([[38, 5, 6, 39, 0], [38, 7, 39, 0, 0], [38, 1, 2, 3, 39]])


def small_clip(activation: str) -> CLIPModel:
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(IMAGE, TEXT, 16, 39, activation)).eval()
    for parameter in model.parameters():
        if parameter.dim():
            nn.init.normal_(parameter, std=0.3)
    return model


def their_state(model: CLIPModel) -> dict[str, Tensor]:
    image, text = model.image_encoder, model.text_encoder
    state = {
        "logit_scale": model.scale.log_scale,
        "vision_model.embeddings.class_embedding": image.class_token,
        "vision_model.embeddings.patch_embedding.weight": image.patch_embedding.projection.weight.view(
            24, 3, 4, 4
        ),
        "vision_model.embeddings.position_embedding.weight": image.positions,
        "text_model.embeddings.token_embedding.weight": text.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": text.position_embedding.weight,
        "visual_projection.weight": model.image_projection.weight,
        "text_projection.weight": model.text_projection.weight,
    }
    layers = {"vision_model.pre_layrnorm": image.input_norm, "vision_model.post_layernorm": image.final_norm}
    layers["text_model.final_layer_norm"] = text.final_norm
    for side, encoder in (("vision_model", image), ("text_model", text)):
        for k, block in enumerate(encoder.blocks):
            place = f"{side}.encoder.layers.{k}"
            for kind in ("weight", "bias"):
                parts = getattr(block.attention.qkv, kind).chunk(3)
                state |= {f"{place}.self_attn.{n}_proj.{kind}": p for n, p in zip("qkv", parts, strict=True)}
            layers[f"{place}.self_attn.out_proj"] = block.attention.output
            layers[f"{place}.layer_norm1"], layers[f"{place}.layer_norm2"] = (
                block.attention_norm,
                block.feed_forward_norm,
            )
            layers[f"{place}.mlp.fc1"], layers[f"{place}.mlp.fc2"] = (
                block.feed_forward.up,
                block.feed_forward.down,
            )
    state |= {
        f"{name}.{kind}": getattr(layer, kind)
        for name, layer in layers.items()
        for kind in ("weight", "bias")
    }
    return {name: tensor.detach() for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("ours", "theirs"), [("quick_gelu", "quick_gelu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_new")]
)
def test_equal_to_transformers_with_copied_weights(ours: str, theirs: str) -> None:
    model = small_clip(ours)
    common = {"num_hidden_layers": 2, "hidden_act": theirs}
    text = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 10,
    }
    text |= {"vocab_size": 40, "eos_token_id": 39, "bos_token_id": 38, "pad_token_id": 0}
    vision = {
        "hidden_size": 24,
        "num_attention_heads": 3,
        "intermediate_size": 50,
        "image_size": 8,
        "patch_size": 4,
    }
    config = transformers.CLIPConfig(
        text_config=common | text, vision_config=common | vision, projection_dim=16
    )
    reference = transformers.CLIPModel(config).eval()
    reference.load_state_dict(their_state(model))
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        expected = reference(input_ids=TOKENS, pixel_values=images, return_loss=True)
        logits = model(images, TOKENS)
        found = (
            F.normalize(model.image_features(images), dim=-1),
            F.normalize(model.text_features(TOKENS), dim=-1),
        )
    torch.testing.assert_close(found[0], expected.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], expected.text_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits, expected.logits_per_image, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(contrastive_loss(logits), expected.loss, atol=1e-4, rtol=1e-4)


def test_padding_behind_the_end_is_not_seen() -> None:
    model, other = small_clip("gelu"), TOKENS.clone()
    other[0, 4], other[1, 3:] = 9, 11
    torch.testing.assert_close(model.text_features(TOKENS), model.text_features(other))


def test_bad_input() -> None:
    model = small_clip("gelu")
    with pytest.raises(ValueError, match="tokens must have end_id=39 in each row"):
        model.text_features(torch.tensor([[38, 39], [38, 5]]))
    with pytest.raises(ValueError, match="tokens must have end_id"):
        model.text_features(torch.zeros(0, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="height and width must be"):
        model.image_features(torch.zeros(1, 3, 8, 12))
    with pytest.raises(ValueError, match="activation must be one of"):
        CLIPConfig(IMAGE, TEXT, activation="tanh")
    with pytest.raises(ValueError, match="shared_dim must be at least 1"):
        CLIPConfig(IMAGE, TEXT, 0)

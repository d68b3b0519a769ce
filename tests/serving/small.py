"""A small model that can chat, as a GGUF file; what it says means nothing."""

from pathlib import Path

import torch

from shared.text.chat_format import ChatFormat
from shared.text.tokenizer import BPETokenizer
from shared.weights.gguf_writer import write_gguf
from tests.configurations import LLAMA
from tests.weights.models import build

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = ChatFormat("You are brief.")


def write_small_chat(path: Path, n_layers: int = 2) -> Path:
    """Write the model; it never ends a reply by itself, so `--max-tokens` does."""
    words = "the lamp and the crow, the hill and the old mill and the sea " * 9
    tokenizer = BPETokenizer.train(words, 300, SPECIAL)
    size = tokenizer.n_vocab
    options = {"vocab_size": size, "context_length": 4096, "emb_dim": 64, "n_layers": n_layers}
    model = build(**LLAMA | options)
    with torch.no_grad():
        model.token_embedding.weight[list(tokenizer.special_ids.values())] = (
            0.0  # a logit of 0 is never the largest
        )
    write_gguf(model, path, tokenizer, kind="F32", chat_format=CHAT, name="small")
    return path

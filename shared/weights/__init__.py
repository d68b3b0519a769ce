"""Trained weights, ours and other people's. In reading order:

- `pretrained`: names between libraries, and models from a name or a folder.
- `huggingface`: our models and tokenizers as folders that transformers loads.
"""

from shared.weights.huggingface import export_to_hugging_face, save_checkpoint_folder
from shared.weights.pretrained import load_pretrained, shipped_checkpoints

__all__ = ["export_to_hugging_face", "load_pretrained", "save_checkpoint_folder", "shipped_checkpoints"]

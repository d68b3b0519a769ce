"""Trained weights, ours and other people's. In reading order:

- `names`: our parameters under the names of other libraries.
- `files`: safetensors read row by row, and checkpoint folders written whole or not at all.
- `configs`: configurations in the words of Hugging Face, there and back.
- `pretrained`: trained models from a name or a folder.
- `huggingface`: our models and tokenizers as folders that transformers loads.
"""

from shared.weights.files import save_checkpoint_folder
from shared.weights.huggingface import export_to_hugging_face
from shared.weights.pretrained import load_pretrained, shipped_checkpoints

__all__ = ["export_to_hugging_face", "load_pretrained", "save_checkpoint_folder", "shipped_checkpoints"]

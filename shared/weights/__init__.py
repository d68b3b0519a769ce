"""Trained weights, ours and other people's. In reading order:

- `names`: our parameters under the names of other libraries.
- `files`: safetensors read row by row, and checkpoint folders written whole or not at all.
- `configs`: configurations in the words of Hugging Face, there and back.
- `gguf`: GGUF files, read by hand.
- `gguf_model`: from a GGUF file to a model and its tokenizer.
- `pretrained`: trained models and their tokenizers from a name, a folder or a file.
- `huggingface`: our models and tokenizers as folders that transformers loads.
- `bert`: encoders of transformers read by name, ours written for it.
- `gguf_writer`: our models as GGUF files.
- `onnx`: our models as ONNX graphs.
"""

from shared.weights.files import save_checkpoint_folder
from shared.weights.huggingface import export_to_hugging_face
from shared.weights.pretrained import load_pretrained, load_tokenizer, shipped_checkpoints

__all__ = [
    "export_to_hugging_face",
    "load_pretrained",
    "load_tokenizer",
    "save_checkpoint_folder",
    "shipped_checkpoints",
]

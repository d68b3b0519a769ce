"""A model from an ONNX file, computed by ONNX Runtime: numpy in, numpy out, and no torch.

What a file needs for text stands in its metadata (`shared.weights.onnx`): the configuration, and the tokenizer where
one was exported with it. Importing torch takes about 200 MB; a program that only runs such a file can do without.

Left out: everything but the most probable token (the processors of `shared.generation` are torch's), and contexts that
slide.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from shared.checks import whole_number


class OnnxModel:
    """A decoder from a file of `export_to_onnx`.

    Args:
        path: The file.
        threads: How many threads compute; None leaves it to ONNX Runtime.

    Attributes:
        config: The model's configuration, as a dictionary.
        tokenizer: The tokenizer in the file; None if it has none.
        stop_tokens: Ids that end a text.

    Raises:
        ValueError: It is no ONNX file, or none that this course has written.
        FileNotFoundError: There is no such file.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist or is no file")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads = whole_number("threads", threads)
        try:
            self.session = onnxruntime.InferenceSession(
                os.fspath(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its classes cannot be imported by a public name
            raise ValueError(f"{path} is damaged or no ONNX file: {error}") from None
        stored = self.session.get_modelmeta().custom_metadata_map
        if "config" not in stored:
            raise ValueError(f"{path} has no 'config' in its metadata: it was not written by `llm export`")
        self.config: dict[str, Any] = json.loads(stored["config"])
        self.tokenizer = Tokenizer.from_str(stored["tokenizer"]) if "tokenizer" in stored else None
        self.stop_tokens: list[int] = json.loads(stored.get("stop_tokens", "[]"))
        inputs = self.session.get_inputs()[3:]
        self.past_names = [entry.name for entry in inputs]
        self.past_shapes = [(entry.shape[1], entry.shape[3]) for entry in inputs]  # heads, head_dim

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_tokens: Sequence[int] = ()
    ) -> list[list[int]]:
        """Return the most probable continuation of each prompt, without the stop token that ends it."""
        new: list[list[int]] = [[] for _ in prompts]
        going = [True] * len(prompts)
        for tokens in self.steps(prompts, max_new_tokens):
            for row, token in enumerate(tokens):
                going[row] &= token not in stop_tokens
                if going[row]:
                    new[row].append(token)
            if not any(going):
                break
        return new

    def steps(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[list[int]]:
        """Yield, for each step, the next token of each prompt.

        Raises ValueError if a prompt is empty, holds no id of the model, or the context does not suffice.
        """
        whole_number("max_new_tokens", max_new_tokens)
        longest, limit, size = (
            max(map(len, prompts)),
            self.config["context_length"],
            self.config["vocab_size"],
        )
        for number, prompt in enumerate(prompts):
            if not prompt or not all(0 <= token < size for token in prompt):
                raise ValueError(f"prompts[{number}] must hold at least one id, all from 0 to {size - 1}")
        if longest + max_new_tokens > limit + 1:
            raise ValueError(
                f"a prompt of {longest} ids and max_new_tokens={max_new_tokens} exceed context_length={limit}"
            )
        # Shorter prompts are padded at their left; the mask says so, and each counts its own positions.
        ids = np.zeros((len(prompts), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        past = [np.zeros((len(prompts), heads, 0, width), np.float32) for heads, width in self.past_shapes]
        # Each step reads the new tokens, and gets back what it must remember.
        for _ in range(max_new_tokens):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            logits, *past = self.session.run(None, inputs | dict(zip(self.past_names, past, strict=True)))
            tokens = logits[:, -1].argmax(axis=-1)
            yield tokens.tolist()
            ids, positions = tokens[:, None], positions[:, -1:] + 1
            mask = np.concatenate((mask, np.ones_like(ids)), axis=1)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, in which special tokens stay text; ValueError if the file has no tokenizer."""
        if self.tokenizer is None:
            raise ValueError("the file has no tokenizer: export the model together with it")
        self.tokenizer.encode_special_tokens = True
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def stream_text(self, prompt: str, max_new_tokens: int) -> Iterator[str]:
        """Yield the continuation of a text in pieces, until a stop token; an empty text is begun by one."""
        ids = self.encode(prompt) or self.stop_tokens[:1]
        tokenizer, decoder = self.tokenizer, DecodeStream(skip_special_tokens=True)
        assert tokenizer is not None  # else it could not have encoded
        for (token,) in self.steps([ids], max_new_tokens):
            if token in self.stop_tokens:
                return
            if piece := decoder.step(tokenizer, token):
                yield piece

    def text_writer(self, max_tokens: int | None) -> Callable[[str], Iterator[str]]:
        """Return a function as that of `shared.serving.texts`, with its limit of tokens."""

        def pieces_of(prompt: str) -> Iterator[str]:
            room = self.config["context_length"] + 1 - max(1, len(self.encode(prompt)))
            return self.stream_text(prompt, max_tokens or max(1, min(128, room)))

        return pieces_of

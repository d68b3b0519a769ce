"""Texts to vectors whose direction is their meaning: a BERT, the mean over its tokens, length 1.

`load_embedder()` is all-MiniLM-L6-v2; the vectors are those of its model card's recipe. Texts above the
largest length are cut with a warning, or read in pieces; the cost grows with a text's length, not with
its square.

Left out: training an embedder (the notebook shows the loss), several devices, other poolings than the
mean, and prefixes that some models want in front of questions.

Follows Reimers and Gurevych (2019, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks").

Explained and proven in appendix_vit_bert/02_sentence_embeddings.ipynb; written from there by `make promote`.
"""

import os
import warnings
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.checks import check_choice, check_several, check_text, require, whole_number
from shared.finetuning.features import batches_by_length, pad_inputs, pool_states, weights_hash
from shared.generation.engine import evaluating
from shared.model.bert import BERTModel
from shared.text.wordpiece import WordPieceTokenizer
from shared.weights.bert import load_bert, load_bert_tokenizer


def cosine_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine between each row of `first` and each of `second`: (n, width), (m, width) -> (n, m).

    Raises:
        ValueError: They are no matrices of one width, or a row is all zeros: it has no direction.
    """
    for name, rows in (("first", first), ("second", second)):
        require(
            name, tuple(rows.shape), rows.dim() == 2 and rows.shape[1] == first.shape[-1], "rows of one width"
        )
        require(name, "a row of zeros", bool((rows != 0).any(dim=1).all()), "rows that have a direction")
    return F.normalize(first, dim=1) @ F.normalize(second, dim=1).T


LONG = ("cut", "pieces")


def cut_pieces(ids: Sequence[int], size: int) -> list[list[int]]:
    """Return a row of ids in as few pieces as possible, none longer than `size`, and nearly equally long."""
    n = -(-len(ids) // size)
    ends = [len(ids) * i // n for i in range(n + 1)]
    return [list(ids[start:end]) for start, end in pairwise(ends)]


class TextEmbedder:
    """Texts in, vectors of length 1 out: a BERT, and the mean over its tokens.

    Args:
        model: The encoder.
        tokenizer: Its tokenizer.
        max_length: Most tokens that are read at once, [CLS] and [SEP] included: as many as the model was made for.
        name: Of the model, as `load_embedder` knows it.

    Raises:
        ValueError: `max_length` is below 3 or above the model's context, or the tokenizer is not of the model's size.
    """

    def __init__(
        self, model: BERTModel, tokenizer: WordPieceTokenizer, *, max_length: int = 256, name: str = ""
    ) -> None:
        limit, size = model.config.context_length, model.config.vocab_size
        max_length = whole_number("max_length", max_length)
        require("max_length", max_length, 3 <= max_length <= limit, f"from 3 to {limit}")
        require(
            "tokenizer", tokenizer.vocab_size, tokenizer.vocab_size == size, f"of the model's size, {size}"
        )
        self.model, self.tokenizer, self.max_length, self.name = model, tokenizer, max_length, name

    @property
    def width(self) -> int:
        """Number of components of a vector."""
        return self.model.config.emb_dim

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without [CLS] and [SEP], and uncut.

        Raises:
            ValueError: A text is empty, or holds only what the tokenizer throws away; the message has its place.
            TypeError: `texts` is one text, or holds something else.
        """
        check_several("texts", texts)
        rows = []
        for place, text in enumerate(texts):
            check_text(f"texts[{place}]", text)
            ids = self.tokenizer.encode_ordinary(text)
            require(f"texts[{place}]", text[:40], bool(ids), "a text that is not empty")
            rows.append(ids)
        return rows

    def embed(self, texts: Sequence[str], *, batch_size: int = 32, long: str = "cut") -> Tensor:
        """Return a vector of length 1 for each text, (texts, width), float32 on the CPU; none for no text.

        A text has the same vector alone and in any batch, but for the last digits.

        Args:
            texts: A warning counts those without a word that the vocabulary knows: they all have the same vector.
            batch_size: How many are read at a time.
            long: What becomes of texts above `max_length`: "cut" reads their beginning, with a warning that counts
                them; "pieces" reads them piece by piece, and takes the mean over the tokens of all pieces.

        Raises:
            ValueError: A text is empty, or an argument is not what is allowed.
            TypeError: `texts` is one text, or holds something else.
        """
        check_choice("long", long, LONG)
        whole_number("batch_size", batch_size)
        rows = self.encode(texts)
        self._warn(rows, long)
        # What is read: the beginning of each text, or all in pieces; and whose it is.
        pieces, owners, room = [], [], self.max_length - 2
        for owner, ids in enumerate(rows):
            for piece in [ids[:room]] if long == "cut" else cut_pieces(ids, room):
                pieces.append(self.tokenizer.build_input(piece)[0])
                owners.append(owner)
        # The sum over the tokens of each text: its direction is that of the mean.
        sums = torch.zeros(len(rows), self.width)
        device = next(self.model.parameters()).device
        with evaluating(self.model), torch.no_grad():
            for places in batches_by_length(pieces, batch_size):
                tokens, mask = (t.to(device) for t in pad_inputs([pieces[i] for i in places]))
                means = pool_states(self.model(tokens, mask=mask).float(), mask, "mean")
                sums.index_add_(
                    0,
                    torch.tensor([owners[i] for i in places]),
                    (means * mask.sum(dim=1, keepdim=True)).cpu(),
                )
        return F.normalize(sums, dim=1)

    def _warn(self, rows: Sequence[Sequence[int]], long: str) -> None:
        """Say of how many texts something is lost."""
        n_cut = sum(len(ids) > self.max_length - 2 for ids in rows) if long == "cut" else 0
        if n_cut:
            warnings.warn(f"{n_cut} of {len(rows)} texts were cut to {self.max_length} tokens", stacklevel=3)
        n_unknown = sum(set(ids) == {self.tokenizer.unk_id} for ids in rows)
        if n_unknown:
            warnings.warn(
                f"{n_unknown} of {len(rows)} texts hold no word that the vocabulary knows", stacklevel=3
            )

    def about(self) -> dict[str, str]:
        """Return what its vectors depend on: the model's name, the hash of its weights, and the length."""
        return {
            "embedder": self.name,
            "weights": weights_hash(self.model),
            "max_length": str(self.max_length),
        }


def load_embedder(
    name_or_path: str | os.PathLike[str] = "all-minilm-l6-v2",
    *,
    max_length: int = 256,
    device: str | torch.device = "cpu",
) -> TextEmbedder:
    """Return the embedder of a model that `load_bert` knows; good ones were trained for sentences.

    Args:
        name_or_path: As for `shared.weights.bert.load_bert`, where the errors stand too.
        max_length: See `TextEmbedder`; a smaller context counts instead.
        device: Where the model computes.
    """
    model, tokenizer = load_bert(name_or_path, device=device), load_bert_tokenizer(name_or_path)
    length = min(whole_number("max_length", max_length), model.config.context_length)
    return TextEmbedder(model, tokenizer, max_length=length, name=os.fspath(name_or_path))

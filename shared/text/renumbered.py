"""A byte pair encoding whose ids are somebody else's: `BPETokenizer` inside, other numbers at its border.

Left out: files in GPT-2's and tiktoken's formats, which number tokens by their order.

Follows what Hugging Face's tokenizers do with bytes that are not in the vocabulary: they leave them out.

Explained and proven in ch05_pretraining/07_a_real_model.ipynb; written from there by `make promote`.
"""

import os
from collections.abc import Iterable, Mapping

from shared.data.encoding import SafeEncoding
from shared.text.merges import merge_symbols, to_symbols
from shared.text.tokenizer import GPT2_PATTERN, SINGLE_BYTES, BPETokenizer, check_apart


class RenumberedTokenizer(BPETokenizer):
    """A byte pair encoding with other people's ids, which may lack some of the 256 bytes.

    A byte without an id is left out of the text, as Hugging Face's tokenizers and llama.cpp do.

    Args:
        merges: As in `BPETokenizer`.
        ids: Token -> id, for the bytes and for what the merges make.
        special_ids: Special token -> id.
        pattern: As in `BPETokenizer`.

    Raises:
        ValueError: A merge makes a token without an id, or an id stands twice.
    """

    def __init__(
        self,
        merges: Iterable[tuple[bytes, bytes]],
        ids: Mapping[bytes, int],
        special_ids: Mapping[str, int],
        pattern: str = GPT2_PATTERN,
    ) -> None:
        super().__init__(merges, tuple(special_ids), pattern)
        for left, right in self.merges:
            if left + right not in ids:
                raise ValueError(f"ids must have every token that the merges make, not {left + right}")
        names = {name.encode("utf-8"): number for name, number in special_ids.items()}
        self._bytes = {number: token for token, number in [*ids.items(), *names.items()]}
        if len(self._bytes) < len(ids) + len(names):
            raise ValueError("ids and special_ids must be different numbers, and one stands twice")
        self._theirs = [ids.get(token) for token in self._tokens]  # None: without an id
        self._missing = b"".join(token for token in SINGLE_BYTES if token not in ids)
        self.special_ids, self.vocab = dict(special_ids), {**ids, **names}
        self.n_vocab = max(self._bytes) + 1

    def _encode_pieces(self, pieces: list[str]) -> list[int]:
        ids = [self._theirs[token] for token in super()._encode_pieces(pieces)]
        if None not in ids:
            return ids
        # Rare: some bytes have no id, and their neighbours are merged as if they had never been there.
        ids = []
        for piece in pieces:
            symbols = to_symbols(piece.encode("utf-8").translate(None, self._missing))
            ids += [self._theirs[ord(symbol)] for symbol in merge_symbols(symbols, self._ranks, self._pairs)]
        return ids

    def to_tiktoken(self, name: str = "bpe") -> SafeEncoding:
        """Return tiktoken's encoding with the same ids; a byte without an id gets one that is not below `n_vocab`."""
        check_apart(self.special_tokens)
        ranks = {
            token: number for token, number in self.vocab.items() if number not in self.special_ids.values()
        }
        ranks |= {bytes([byte]): self.n_vocab + i for i, byte in enumerate(self._missing)}
        return SafeEncoding(
            name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.special_ids
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Refuse (ValueError): a `.tiktoken` file numbers the tokens by its lines."""
        raise ValueError(f"{path} cannot be written: its format has no place for other ids")

    def save_gpt2_files(
        self, *, merges_path: str | os.PathLike[str], vocab_path: str | os.PathLike[str]
    ) -> None:
        """Refuse (ValueError): GPT-2's files are read back by the order of the merges."""
        raise ValueError(f"{vocab_path} cannot be written: its format has no place for other ids")

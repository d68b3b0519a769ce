"""The two algorithms of byte pair encoding: learning merges from counted words, and carrying them out on one
word.

Tokens are numbers, and a sequence of them is a string in which `chr(i)` stands for token i; the first 256
are the single bytes in GPT-2's order. `train_merges` follows Sennrich et al. (2016), its work for each
merge proportional to the words that hold the pair; the work of `merge_symbols` is proportional to the
length of the word. Knows nothing of text, patterns, special tokens or files.

Explained and proven in ch02_text_data/03_byte_pair_encoding.ipynb; written from there by `make promote`.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from operator import add

# GPT-2's table from byte to visible character, in the order of its ids.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_TO_UNICODE = {b: chr(b) for b in _VISIBLE} | {b: chr(256 + i) for i, b in enumerate(_HIDDEN)}
UNICODE_TO_BYTE = {character: byte for byte, character in BYTE_TO_UNICODE.items()}
SINGLE_BYTES = tuple(bytes([byte]) for byte in BYTE_TO_UNICODE)


# A sequence of tokens is a string in which chr(i) stands for token i: string methods find and replace pairs.
_SYMBOL_OF_BYTE = {single[0]: chr(token) for token, single in enumerate(SINGLE_BYTES)}


def to_symbols(data: bytes) -> str:
    """Return the string of symbols, one for each byte."""
    return data.decode("latin-1").translate(_SYMBOL_OF_BYTE)


def changed_pairs(parts: list[str], pair: str, new: str) -> Iterator[tuple[str, str]]:
    """Yield each pair beside a merged one as it was and as it is; `parts` are the symbols, split at `pair`."""
    left, right = pair
    last = len(parts) - 1
    for i, part in enumerate(parts):
        if part:
            if i > 0:
                yield right + part[0], new + part[0]
            if i < last:
                yield part[-1] + left, part[-1] + new
        elif 0 < i < last:  # two merged pairs side by side
            yield right + left, new + new


def train_merges(counts: Mapping[str, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Learn at most `n_merges` merges (Sennrich et al., 2016) from pre-tokens and how often each occurs.

    Each step merges the most frequent pair; ties go to the lexicographically greater pair of byte strings.
    """
    words = [to_symbols(piece.encode("utf-8")) for piece in counts]  # each distinct piece once
    occurrences = list(counts.values())
    tokens, merges = list(SINGLE_BYTES), []
    # Sorts greater byte strings first: bytes are inverted, and the end sign comes after every byte.
    keys = ["".join(chr(255 - byte) for byte in token) + chr(256) for token in tokens]
    pair_counts, words_with = defaultdict(int), defaultdict(set)  # how often a pair stands, in which words
    for i, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            pair_counts[pair] += occurrences[i]
            words_with[pair].add(i)

    def entry(pair: str) -> tuple[int, str, str]:
        return -pair_counts[pair], keys[ord(pair[0])] + keys[ord(pair[1])], pair

    # The most frequent pair is merged, again and again.
    heap = [entry(pair) for pair in pair_counts]
    heapify(heap)
    while heap and len(merges) < n_merges:
        count, _, pair = heappop(heap)
        if -count != pair_counts[pair]:
            if pair_counts[pair]:  # it has fallen since the entry was written
                heappush(heap, entry(pair))
            continue
        left, right = map(ord, pair)
        new = chr(len(tokens))
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
        keys.append(keys[left][:-1] + keys[right])
        # Only the words that hold it change, and with them the pairs on both sides of the new token.
        gained = set()
        for i in words_with.pop(pair):
            parts = words[i].split(pair)
            words[i] = new.join(parts)
            for before, after in changed_pairs(parts, pair, new):
                pair_counts[before] -= occurrences[i]
                pair_counts[after] += occurrences[i]
                words_with[after].add(i)
                gained.add(after)
        pair_counts[pair] = 0
        for after in gained:
            if pair_counts[after]:
                heappush(heap, entry(after))
    return merges


def merge_symbols(symbols: str, ranks: Mapping[str, int], pairs: Sequence[str]) -> str:
    """Carry out merges on one pre-token: `pairs[r]` becomes `chr(256 + r)`, low r first; `ranks[pair]` is r.

    The work is proportional to the length n, and to d log d for the d different merges that are used.
    """
    tokens, end = list(symbols), len(symbols)
    after, before = list(range(1, end + 1)), list(range(-1, end - 1))
    places: dict[int, list[int]] = {}  # for each rank where its pair begins, from left to right
    waiting: list[int] = []  # a heap of these ranks, each once

    def remember(pair: str, place: int) -> None:
        if (rank := ranks.get(pair)) is not None:
            if rank not in places:
                places[rank] = []
                heappush(waiting, rank)
            places[rank].append(place)

    for place, pair in enumerate(map(add, symbols, symbols[1:])):
        remember(pair, place)
    # A pair with a new token was learned after that token: no rank below the current one is added.
    while waiting:
        rank = heappop(waiting)
        (left, right), new = pairs[rank], chr(256 + rank)
        for place in places.pop(rank):
            gap = after[place]
            if gap == end or tokens[place] != left or tokens[gap] != right:
                continue  # an earlier join has used up one of the two
            tokens[place], tokens[gap] = new, ""
            # The neighbors meet across the gap, and each makes a new pair with the new token.
            following = after[place] = after[gap]
            if following < end:
                before[following] = place
                remember(new + tokens[following], place)
            if before[place] >= 0:
                remember(tokens[before[place]] + new, before[place])
    return "".join(tokens)

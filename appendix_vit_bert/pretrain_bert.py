"""Pretrain a small BERT on tales, and record how far it comes.

    python pretrain_bert.py opponents      what counting achieves, and what the grammar allows (two minutes)
    python pretrain_bert.py ship           the shipped model, 25 minutes of one thread; goes on where it was stopped

`ship` reads short excerpts of stories first and pairs of whole stories afterwards, as attention over long texts is dear
(Devlin et al., 2019, A.2). Its learning rate is the best of 0.0005, 0.001 and 0.002 for a model of five blocks, which
filled 33, 61 and 78 % of the validation's blanks after 1,250 steps of 128 pairs (seed 9, on a GPU). While it runs it
looks at validation pairs; what the record holds of the shipped model, its opponents and the ceiling is measured on
other pairs (`TEST_SEED`). In all of them 15 % of the tokens are hidden by [MASK].

Rows go to `pretrain_bert.csv`, states and the vocabulary to `--scratch`, the checkpoint to `--output`.
"""

import argparse
import math
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.model.bert import BERTConfig, BERTForPreTraining
from shared.notebook.records import replace_rows
from shared.pretraining.processes import cpu_name
from shared.tales.blanks import BlankFiller
from shared.tales.generator import TaleGenerator
from shared.tales.scoring import split_sentences
from shared.text.wordpiece import WordPieceTokenizer
from shared.training.batches import IGNORE
from shared.training.loop import train
from shared.training.losses import choose_device
from shared.training.masking import Masking, mask_tokens, pretraining_loss, pretraining_targets, sentence_pair
from shared.training.optimizers import build_optimizers
from shared.training.schedules import build_schedule
from shared.weights.bert import OWN_CONFIG, save_bert

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "pretrain_bert.csv"
COLUMNS = ["run", "role", "seed", "step", "measure", "value", "n", "seconds", "hardware", "torch"]
KEY = ("run", "role", "seed", "step", "measure")

NAME, VOCAB_SIZE, CONTEXT_LENGTH = "tales-bert", 2816, 232
VOCABULARY_SEED, COUNTED_SEED, VALIDATION_SEED, TEST_SEED, MASK_SEED = 2048, 30_000, 7003, 7004, 15
SHORT_SEED, LONG_SEED = 41_000, 42_000
ALPHABET = "".join(map(chr, range(33, 127)))
LONGEST_HEAD, EXCERPT = 7, 4  # sentences of a first segment (every tale has at least 8); of an excerpt
N_TEST, N_WATCHED, EVERY = 2000, 100, 100  # pairs; steps from one look and state to the next
HIDDEN = Masking(0.15, 1.0, 0.0)  # how all are judged

SHIPPED = BERTConfig(VOCAB_SIZE, CONTEXT_LENGTH, emb_dim=128, n_heads=4, n_layers=3, dropout=0.0)
N_SHORT, N_LONG, BATCH_SIZE, RATE = 2400, 1200, 64, 2e-3  # steps on excerpts and on stories; pairs of a step


# --- pairs


def vocabulary(scratch: Path) -> WordPieceTokenizer:
    """Return the vocabulary of the shipped model; it is learned once."""
    path = scratch / "vocab.txt"
    if not path.is_file():
        scratch.mkdir(parents=True, exist_ok=True)
        texts = [story.text for story in TaleGenerator(VOCABULARY_SEED).stories(5000)]
        WordPieceTokenizer.train(texts, VOCAB_SIZE, alphabet=ALPHABET).save(path)
    return WordPieceTokenizer.load(path)


def story_sentences(tokenizer: WordPieceTokenizer, seed: int, n: int) -> list[list[list[int]]]:
    """The stories of a seed as lists of sentences, those as lists of ids."""
    return [
        [tokenizer.encode_ordinary(sentence) for sentence in split_sentences(story.text)]
        for story in TaleGenerator(seed).stories(n)
    ]


def make_pairs(tokenizer: WordPieceTokenizer, seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs as inputs, int16 (n, context_length), and their first segments' lengths.

    The lengths are those of [CLS] first [SEP], negative where the label is 1.
    """
    length = CONTEXT_LENGTH
    documents, rng = story_sentences(tokenizer, seed, n), np.random.default_rng(seed)
    rows, heads = np.zeros((n, length), dtype=np.int16), np.zeros(n, dtype=np.int16)
    for i in range(n):
        pair = sentence_pair(documents, rng, place=i, longest_head=LONGEST_HEAD)
        ids, segments = tokenizer.build_input(pair.first, pair.second, length)
        rows[i, : len(ids)] = ids
        heads[i] = segments.index(1) * (-1 if pair.label else 1)
    return rows, heads


def excerpt_pairs(tokenizer: WordPieceTokenizer, seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs as `make_pairs` does, of a few sentences from anywhere in a story."""
    rng, length = np.random.default_rng(seed), CONTEXT_LENGTH
    documents = []
    for sentences in story_sentences(tokenizer, seed, n):
        start = int(rng.integers(len(sentences) - EXCERPT + 1))
        documents.append(sentences[start : start + EXCERPT])
    rows, heads = np.zeros((n, length), dtype=np.int16), np.zeros(n, dtype=np.int16)
    for i in range(n):
        pair = sentence_pair(documents, rng, place=i)
        ids, segments = tokenizer.build_input(pair.first, pair.second, length)
        rows[i, : len(ids)] = ids
        heads[i] = segments.index(1) * (-1 if pair.label else 1)
    return rows, heads


class Pairs:
    """Pairs on a device: rows of ids, length of the first segment, label.

    Args:
        rows, heads: As `make_pairs` returns them.
        device: Where they are kept.
    """

    def __init__(self, rows: np.ndarray, heads: np.ndarray, device: torch.device) -> None:
        self.rows = torch.from_numpy(np.ascontiguousarray(rows)).to(device)
        self.heads = torch.from_numpy(np.abs(heads).astype(np.int64)).to(device)
        self.labels = torch.from_numpy((heads < 0).astype(np.int64)).to(device)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, chosen: Tensor | slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return tokens, segments, mask and labels of some pairs, with little padding."""
        tokens = self.rows[chosen].long()
        mask = tokens != 0
        # A multiple of 16: a CPU keeps a plan for each shape that it has met.
        longest = min(-(-int(mask.sum(1).max()) // 16) * 16, tokens.shape[1])
        tokens, mask = tokens[:, :longest], mask[:, :longest]
        places = torch.arange(longest, device=tokens.device)
        segments = ((places >= self.heads[chosen][:, None]) & mask).long()
        return tokens, segments, mask, self.labels[chosen]


def sorted_batches(pairs: Pairs, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
    """Yield the places of batches from number `start` on; rows of similar length together, each once an epoch."""
    n = len(pairs) // batch_size
    lengths = (pairs.rows != 0).sum(1)
    for epoch in range(start // n, 10**9):
        rng = np.random.default_rng([seed, epoch])
        order = torch.from_numpy(rng.permutation(len(pairs)))
        batches = []
        for pool in order.split(8 * batch_size):
            batches += [
                part for part in pool[lengths[pool].argsort()].split(batch_size) if len(part) == batch_size
            ]
        chosen = rng.permutation(len(batches))
        for i in chosen[start % n if epoch == start // n else 0 :]:
            yield batches[i]


def judged_pairs(tokenizer: WordPieceTokenizer, seed: int, n: int) -> tuple[Pairs, Tensor, Tensor]:
    """Return pairs of a seed, their tokens with 15 % hidden, and the targets; the same on every device."""
    pairs = Pairs(*make_pairs(tokenizer, seed, n), torch.device("cpu"))
    generator = torch.Generator().manual_seed(MASK_SEED)
    hidden, targets = mask_tokens(
        pairs.rows.long(), tokenizer.special_ids, tokenizer.mask_id, tokenizer.vocab_size, HIDDEN, generator
    )
    return pairs, hidden, targets


@torch.no_grad()
def judge(model: BERTForPreTraining, judged: tuple[Pairs, Tensor, Tensor]) -> dict[str, float]:
    """Return accuracies and losses on pairs with hidden tokens."""
    device = next(model.parameters()).device
    pairs, hidden, targets = judged
    totals: dict[str, float] = defaultdict(float)
    for start in range(0, len(pairs), 250):
        chosen = slice(start, min(start + 250, len(pairs)))
        tokens, segments, mask, labels = (part.to(device) for part in pairs.batch(chosen))
        asked = targets[chosen][:, : tokens.shape[1]].to(device)
        places = (asked.flatten() != IGNORE).nonzero().squeeze(1)
        logits, next_logits = model(hidden[chosen][:, : tokens.shape[1]].to(device), segments, mask, places)
        wanted = asked.flatten()[places]
        totals["masked accuracy"] += (logits.argmax(1) == wanted).sum().item()
        totals["masked loss"] += nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        totals["next accuracy"] += (next_logits.argmax(1) == labels).sum().item()
        totals["next loss"] += nn.functional.cross_entropy(next_logits, labels, reduction="sum").item()
        totals["n masked"] += len(places)
        totals["n next"] += len(labels)
    return {
        f"{task} {measure}": totals[f"{task} {measure}"] / totals[f"n {task}"]
        for task in ("masked", "next")
        for measure in ("accuracy", "loss")
    } | {"n masked": totals["n masked"], "n next": totals["n next"]}


def rows_of(
    run: str, role: str, seed: int, step: int, scores: dict[str, float], **more: object
) -> list[dict[str, object]]:
    """One row of the record for each score."""
    return [
        {"run": run, "role": role, "seed": seed, "step": step, "measure": name, "value": value}
        | {"n": int(scores.get(f"n {name.split()[0]}", 0))}
        | more
        for name, value in scores.items()
        if not name.startswith("n ")
    ]


def record(rows: list[dict[str, object]]) -> None:
    """Put rows into the record."""
    rows = [row | {"value": f"{row['value']:.6g}"} for row in rows]
    replace_rows(RESULTS, COLUMNS, rows, lambda row: tuple(str(row[name]) for name in KEY))


# --- training


def training_batches(
    tokenizer: WordPieceTokenizer, pairs: Pairs, seed: int, start: int
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Yield batches from number `start` on: the same for the same seed, wherever a run was stopped."""
    device = pairs.rows.device
    for number, places in enumerate(sorted_batches(pairs, BATCH_SIZE, seed, start), start):
        tokens, segments, mask, labels = pairs.batch(places.to(device))
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + number)
        hidden, targets = mask_tokens(
            tokens, tokenizer.special_ids, tokenizer.mask_id, tokenizer.vocab_size, Masking(), generator
        )
        yield (hidden, segments, mask), pretraining_targets(targets, labels)


def ship(options: argparse.Namespace) -> None:
    """Make the shipped model. A state is kept at each look, from which a stopped run goes on."""
    tokenizer, device = vocabulary(options.scratch), choose_device(options.device)
    torch.manual_seed(options.seed)
    model = BERTForPreTraining(SHIPPED).to(device)
    optimizer = build_optimizers(model, "adamw", RATE, betas=(0.9, 0.98))[0]
    watched = judged_pairs(tokenizer, VALIDATION_SEED, N_WATCHED)
    rows: list[dict[str, object]] = []
    step, spent = 0, 0.0
    # A run that was stopped goes on.
    state_file = options.scratch / f"ship-{options.seed}-state.pt"
    if state_file.is_file():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rows, step, spent = state["rows"], state["step"], state["seconds"]
    started = time.process_time() - spent

    def watch(now: int) -> float:
        scores, seconds = judge(model, watched), round(time.process_time() - started)
        print(f"{now}: {seconds} s,", {name: round(value, 3) for name, value in scores.items()}, flush=True)
        if now != step:
            rows.extend(rows_of("bert, shipped", "curve", options.seed, now, scores, seconds=seconds))
            # A rate that a schedule has scaled is not the peak.
            kept = optimizer.state_dict()
            for group in kept["param_groups"]:
                group["lr"] = group.pop("initial_lr", group["lr"])
            state = {"model": model.state_dict(), "optimizer": kept, "rows": rows, "step": now}
            torch.save(state | {"seconds": time.process_time() - started}, state_file.with_suffix(".part"))
            os.replace(state_file.with_suffix(".part"), state_file)
        return scores["masked loss"]

    # Excerpts first, then whole stories. On a CPU the fused attention is slow backwards.
    fused = [SDPBackend.EFFICIENT_ATTENTION] if device.type == "cuda" else []
    for make, seed, first, last in (
        (excerpt_pairs, SHORT_SEED, 0, N_SHORT),
        (make_pairs, LONG_SEED, N_SHORT, N_SHORT + N_LONG),
    ):
        if step >= last:
            continue
        n = (last - first) * BATCH_SIZE + 8 * BATCH_SIZE
        pairs = Pairs(*make(tokenizer, seed + options.seed, n), device)
        with sdpa_kernel([*fused, SDPBackend.MATH]):
            train(
                model,
                training_batches(tokenizer, pairs, options.seed, step - first),
                optimizer,
                n_steps=last,
                start_step=step,
                loss=pretraining_loss,
                max_grad_norm=1.0,
                schedule=build_schedule("linear", N_SHORT + N_LONG, min(125, (N_SHORT + N_LONG) // 4)),
                autocast=torch.bfloat16,
                evaluate_every=EVERY,
                on_evaluate=watch,
            )
        step = last
    # In 16 bits, judged as they are.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    more = {
        "seconds": round(time.process_time() - started),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "torch": torch.__version__,
    }
    scores = judge(model.eval(), judged_pairs(tokenizer, TEST_SEED, N_TEST))
    record(rows + rows_of("bert, shipped", "run", options.seed, step, scores, **more))
    about = {
        "recipe": "python appendix_vit_bert/pretrain_bert.py ship",
        "seed": options.seed,
        "steps": {"excerpts": N_SHORT, "stories": N_LONG},
        "batch_size": BATCH_SIZE,
        "learning_rate": RATE,
    }
    save_bert(
        model,
        tokenizer,
        options.output / NAME,
        dtype=torch.bfloat16,
        config_name=OWN_CONFIG,
        replace=True,
        **about,
        **more,
    )
    print(f"the model is in {options.output / NAME}")


# --- what needs no training


def by_counting(options: argparse.Namespace) -> list[dict[str, object]]:
    """Rules that learn by counting: the most frequent token, the neighbours, words that two segments share."""
    tokenizer = vocabulary(options.scratch)
    pairs, hidden, targets = judged_pairs(tokenizer, TEST_SEED, N_TEST)
    rows, heads = make_pairs(tokenizer, COUNTED_SEED, 20_000)
    rows = rows.astype(np.int64)
    # What stands between two neighbours, or after one, or anywhere.
    anywhere = Counter(rows[rows > 4].tolist())
    left: dict[int, Counter] = defaultdict(Counter)
    both: dict[tuple[int, int], Counter] = defaultdict(Counter)
    for row in rows.tolist():
        for a, b, c in zip(row, row[1:], row[2:], strict=False):
            if b > 4:
                left[a][b] += 1
                both[a, c][b] += 1
    most = anywhere.most_common(1)[0][0]
    best_left = {a: counts.most_common(1)[0][0] for a, counts in left.items()}
    best_both = {a: counts.most_common(1)[0][0] for a, counts in both.items()}
    scores: Counter[str] = Counter()
    for row, asked in zip(hidden.tolist(), targets.tolist(), strict=True):
        for place, wanted in enumerate(asked):
            if wanted != IGNORE:
                scores["n"] += 1
                scores["most frequent token"] += wanted == most
                by_left = best_left.get(row[place - 1], most)
                after = row[place + 1] if place + 1 < len(row) else 0
                scores["neighbours"] += wanted == best_both.get((row[place - 1], after), by_left)
    result = []
    for name in ("most frequent token", "neighbours"):
        result += rows_of(
            name, "baseline", 0, 0, {"masked accuracy": scores[name] / scores["n"], "n masked": scores["n"]}
        )
    # Rare words that both segments have, each weighted by how rare it is; the threshold from training pairs.
    frequency = Counter(i for row in rows for i in set(row.tolist()))
    weight = {i: math.log(len(rows) / n) for i, n in frequency.items()}

    def overlap(row: Iterable[int], head: int) -> float:
        row = list(row)
        shared = {i for i in row[:head] if i > 4} & {i for i in row[head:] if i > 4}
        return sum(weight.get(i, 0.0) for i in shared)

    known = np.array(
        [overlap(row, abs(int(head))) for row, head in zip(rows[:4000].tolist(), heads[:4000], strict=True)]
    )
    follows = heads[:4000] > 0
    order = np.argsort(known)
    # With the threshold behind place k, the first k are called others.
    correct = np.concatenate([[0], np.cumsum(~follows[order])]) + np.concatenate(
        [np.cumsum(follows[order][::-1])[::-1], [0]]
    )
    k = int(correct.argmax())
    threshold = known[order][min(k, len(order) - 1)]
    test = np.array(
        [overlap(row, int(head)) for row, head in zip(hidden.tolist(), pairs.heads.tolist(), strict=True)]
    )
    accuracy = float(((test >= threshold) == (pairs.labels.numpy() == 0)).mean())
    result += rows_of("shared rare words", "baseline", 0, 0, {"next accuracy": accuracy, "n next": len(test)})
    share = float((pairs.labels == 0).float().mean())
    return result + rows_of(
        "always the same", "baseline", 0, 0, {"next accuracy": max(share, 1 - share), "n next": len(test)}
    )


def by_grammar(options: argparse.Namespace) -> list[dict[str, object]]:
    """What the grammar allows on the test's pairs: the exact chance of each answer, given all that is seen."""
    tokenizer = vocabulary(options.scratch)
    pairs, hidden, targets = judged_pairs(tokenizer, TEST_SEED, N_TEST)
    filler, scores = BlankFiller(tokenizer, most_sentences=LONGEST_HEAD), defaultdict(float)
    for row, asked, head, label in zip(
        hidden.tolist(), targets.tolist(), pairs.heads.tolist(), pairs.labels.tolist(), strict=True
    ):
        seen = [None if token == tokenizer.mask_id else token for token in row]
        found = filler.fill_pair(seen[1 : head - 1], seen[head : row.index(tokenizer.sep_id, head)])
        wanted = [token for token in asked if token != IGNORE]
        scores["n masked"] += len(wanted)
        scores["masked accuracy"] += sum(found.best)
        scores["masked loss"] -= sum(
            math.log(place[token]) for place, token in zip(found.places, wanted, strict=True)
        )
        scores["n next"] += 1
        scores["next accuracy"] += max(found.follows, 1 - found.follows)
        scores["next loss"] -= math.log(1 - found.follows if label else found.follows)
    means = {
        name: value / scores[f"n {name.split()[0]}"] for name, value in scores.items() if name[:2] != "n "
    }
    return rows_of("ceiling", "ceiling", 0, 0, means | {n: scores[n] for n in ("n masked", "n next")})


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("opponents", "ship"))
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir(), "tales-bert"))
    parser.add_argument("--output", type=Path, default=Path("bert_results"), help="for the checkpoint")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of ship")
    options = parser.parse_args()
    # Another number of threads adds in another order: runs would agree to some digits only.
    torch.set_num_threads(1)
    if options.what == "opponents":
        record(by_counting(options) + by_grammar(options))
    else:
        ship(options)


if __name__ == "__main__":
    main()

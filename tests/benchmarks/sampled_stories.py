"""How many stories of a checkpoint are whole stories of the grammar, sampled at temperature 1 without any filter.

    python -m tests.benchmarks.sampled_stories tales-1m tales-tiny --stories 1000

Each story is drawn from its end token to the next one. It counts if `shared.tales.generator.derivations` finds a plan
that has all of it, every sentence and every agreement; the others are listed by what `shared.tales.scoring.score` finds
wrong.
The share at temperature 1 says how much probability the model keeps for stories of the grammar. `--temperature 0.7`
shows how much of the rest is rare words that are cut off. `--record` writes the count into the config.json of a shipped
checkpoint, where `tests/weights/test_checkpoints.py` reads it.
"""

import argparse
import json
import os
from collections import Counter

from shared.generation.engine import generate
from shared.model.gpt import GPTModel
from shared.tales.encoding import tale_encoding
from shared.tales.scoring import Score, score
from shared.weights.pretrained import CHECKPOINTS, load_pretrained

ROWS = 100  # stories generated together


def sample_stories(model: GPTModel, n_stories: int, *, temperature: float = 1.0, seed: int = 0) -> list[str]:
    """Return texts drawn without a filter, each to its end token or the end of the context."""
    encoding, texts = tale_encoding(), []
    end = encoding.eot_token
    for start in range(0, n_stories, ROWS):
        prompts = [[end]] * min(ROWS, n_stories - start)
        options = {"temperature": temperature, "stop_tokens": (end,), "seed": seed + start}
        written = generate(model, prompts, model.config.context_length - 1, **options)
        texts += [encoding.decode([id for id in ids if id != end]) for ids in written]
    return texts


def what_is_wrong(found: Score) -> str:
    """Name the grades below 1 of a text that is no whole story."""
    grades = {
        "sentences": found.sentences,
        "pronouns": found.pronouns,
        "names": found.names,
        "objects": found.objects,
        "consequences": found.consequences,
    }
    return " and ".join(kind for kind, grade in grades.items() if grade is not None and grade < 1) or "order"


def record(name: str, whole: int, n_stories: int) -> None:
    """Store the count in the results of a shipped checkpoint, atomically."""
    path = CHECKPOINTS / name / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["results"]["sampled_stories"] = n_stories
    config["results"]["whole_stories"] = whole
    part = path.with_suffix(".part")
    part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")
    os.replace(part, path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="+", help="names of shipped checkpoints, or folders")
    parser.add_argument("--stories", type=int, default=1000)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write the count into config.json")
    given = parser.parse_args()
    if given.record and given.temperature != 1:
        parser.error(f"--record is for temperature 1, got {given.temperature}")
    for name in given.checkpoint:
        model = load_pretrained(name)
        texts = sample_stories(model, given.stories, temperature=given.temperature, seed=given.seed)
        scores = [score(text) for text in texts if text.strip()]
        whole = sum(found.story for found in scores)
        print(f"{name}: {whole} of {given.stories} are whole stories of the grammar")
        for kind, count in Counter(what_is_wrong(found) for found in scores if not found.story).most_common():
            print(f"   {count:4} wrong {kind}")
        if given.record:
            record(name, whole, given.stories)


if __name__ == "__main__":
    main()

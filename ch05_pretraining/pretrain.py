"""Pretrain a GPT on text files or tales: one process or many, interrupted at any moment and continued exactly.

    python ch05_pretraining/pretrain.py --recipe ch05_pretraining/recipes/tales-tiny.toml --out build/tales-tiny
    python ch05_pretraining/pretrain.py --data books/ --tokenizer gpt2 --preset gpt2-small --out build/books
    torchrun --nproc-per-node 2 ch05_pretraining/pretrain.py --recipe RECIPE --out build/run --parallel fsdp

Text is cut into windows of the model's context, tales are read from their beginning (--rows); what has no place in a
row is counted and said. The same command again continues the run that it finds in --out, and one with more --steps
makes it longer, as long as the learning rate has not begun to fall. Batches and dropout depend on (seed, step) alone,
so the continued run has the losses of an unbroken one of as many processes and threads, to the last digit. SIGTERM and
SIGINT (Ctrl-C) save and stop after the current step, with exit status 0. --out holds checkpoints/, log.csv,
evaluation.csv, data.json, tensorboard/, shards/ and a lock. Errors are one line and exit status 1, and lose nothing
that was saved before.
"""

import signal
from pathlib import Path

from shared.pretraining.options import Options, read_options


def main() -> None:
    """Run the command line."""
    try:
        train(read_options(__doc__))
    except ValueError as error:
        raise SystemExit(f"pretrain: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("pretrain: stopped before the first step; the same command goes on") from None


def train(options: Options) -> None:
    """Begin or continue a run, to its last step or a signal; SystemExit with one line where it fails."""
    # Only now, so that --help and a wrong option answer at once: torch takes seconds to import.
    import torch

    from shared.pretraining.divergence import Diverged
    from shared.pretraining.processes import Processes
    from shared.pretraining.run import Run

    processes = run = None
    try:
        # A new run, or the one that the folder holds.
        run = Run(options, processes := Processes(options.device, options.threads))
        run.restore()
        run.open_log()

        # Signals are noted and acted on between two steps.
        for number in (signal.SIGTERM, signal.SIGINT):
            # A second signal changes nothing: torchrun passes on what the terminal has sent already.
            signal.signal(number, lambda *_: setattr(run, "signalled", True))
        run.say_what_it_does()

        # A run that may go back needs a place to go back to.
        if run.step == 0 and options.on_divergence == "rollback":
            run.save()
        run.advance()

        # It ends before its last step only when it was told to.
        if run.step < options.steps:
            processes.say(f"stopped by a signal after step {run.step:,}; the same command continues")
        elif options.export:
            run.export(Path(options.export))
    except (ValueError, TypeError, OSError, Diverged) as error:
        raise SystemExit(f"pretrain: {error}") from error
    except torch.OutOfMemoryError as error:
        advice = "a smaller --batch-size or a larger --accumulation needs less"
        raise SystemExit(f"pretrain: the device has too little memory: {advice}") from error
    finally:
        for each in (run, processes):
            if each is not None:
                each.close()


if __name__ == "__main__":
    main()

    from shared.pretraining.processes import end_this_process

    end_this_process()

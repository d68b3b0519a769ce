"""What the chapters of the course have built, in rooms that import one way, in this order:

- `data`: what ships with the course, and downloads.
- `text`: raw text to tokens to batches.
- `model`: attention, layers, GPT, encoder-decoders.
- `tales`: generated stories whose entropy is known.
- `generation`: logits to tokens and text.
- `weights`: trained weights in and out.
- `training`: loss, loop, optimizers, schedules, checkpoints of a run, diagnosis.
- `pretraining`: the machinery of `ch05_pretraining/pretrain.py`.
- `safety`: what a model may do to people, measured and held in check.
- `serving`: the program `llm`: models in a terminal.
- `doctor`: will the course run on this machine, and how fast? `python -m shared.doctor`.
- `notebook`: figures, proofs and records, for notebooks and scripts alone.

`checkpoints/` holds trained weights. The rooms `text`, `model`, `generation`, `weights`, `training` and `safety` are
written by `make promote` from notebook cells, the others by hand.
"""

"""The machinery of `ch05_pretraining/pretrain.py`. In reading order:

- `options`: everything that a run depends on, from a recipe and the command line.
- `files`: which text files are read.
- `stretches`: text files cut for several jobs, and into pieces that fit into memory.
- `shards`: text files as shards of tokens.
- `rows`: batches of documents or windows that depend on seed and step alone.
- `start`: what a run begins with: its data as rows, and its model.
- `processes`: this process among those of a run.
- `objective`: what is minimized.
- `updates`: one update of the weights from one batch.
- `divergence`: when a loss is not as it should be.
- `evaluation`: the losses on held-out rows.
- `log`: the files that a run writes.
- `saving`: what a checkpoint holds, gathered from all processes.
- `run`: all of it together.
"""

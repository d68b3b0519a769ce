"""The machinery of `ch05_pretraining/pretrain.py`. In reading order:

- `options`: everything that a run depends on, from a recipe and the command line.
- `shards`: text files as shards of tokens.
- `rows`: batches of documents or windows that depend on seed and step alone.
- `processes`: this process among those of a run.
- `log`: the files that a run writes.
"""

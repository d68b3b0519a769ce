"""Models outside the notebook: in a terminal. In reading order:

- `models`: a model, its tokenizer and its chat format from a name, a folder or a file.
- `onnx_runtime`: a model from an ONNX file, computed without torch.
- `texts`: texts that a model goes on with.
- `terminal`: what the commands share: input, output, and errors of one line.
- `exporting`: what `llm export` writes.
- `adapting`: what `llm adapt` does: a classifier of your own.
- `chat`: a conversation in a terminal.
- `cli`: the program `llm`.
"""

"""Models outside the notebook: in a terminal, and behind HTTP. In reading order:

- `models`: a model, its tokenizer and its chat format from a name, a folder or a file.
- `onnx_runtime`: a model from an ONNX file, computed without torch.
- `texts`: texts that a model goes on with.
- `terminal`: what the commands share: input, output, and errors of one line.
- `exporting`: what `llm export` writes.
- `adapting`: what `llm adapt` does: a classifier of your own.
- `pictures`: pictures to labels, here and in the service.
- `classifying`: what `llm classify` does.
- `chat`: a conversation in a terminal.
- `cli`: the program `llm`.

The service, `llm serve`:

- `schemas`: what requests and replies look like.
- `errors`: what is refused, as OpenAI's servers say it.
- `pieces`: tokens become text while they come.
- `worker`: the thread that computes, and how it talks with the event loop.
- `loading`: what is loaded when it is first asked for.
- `service`: a model that is served, from texts to sequences.
- `replies`: one object at the end, or server-sent events.
- `api`: the addresses.
- `limits`: how much and how long.
- `security`: API keys, and headers for browsers.
- `gate`: who is let in, and what is noted.
- `logs`: lines of JSON, without texts.
- `metrics`: what Prometheus is told.
- `server`: how it starts and drains.
- `serve`: the commands `llm serve` and `llm key`.
"""

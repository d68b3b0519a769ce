"""The program `llm`: a model in the terminal (`llm`, or `python -m shared.serving.cli`).

    llm info                                      the models that have a name
    llm generate tales-3m "Once upon a time"      a text goes on
    llm chat smollm2-135m-instruct                a conversation
    llm classify spam "Win a prize now"           a label
    llm classify --image four.png                 a picture's label
    llm embed MODEL < texts.txt                   a vector for each line
    llm export tales-3m tales.gguf --to gguf      a file for other programs
    llm adapt reviews.csv my_adapter              a classifier of your own, as an adapter
    llm serve                                     a service that speaks OpenAI's protocol

A model is a name, a folder or a `.gguf` file; `generate` takes an `.onnx` file, too, and then needs no torch.
`generate`, `chat` and `export` also take an adapter (`--adapter FOLDER`), one of ours or of PEFT's. Exit status: 0
done, 1 failed, 2 not understood, 130 ended by Ctrl-C. What takes long is imported when it is needed.

Left out: pictures in a conversation, and what makes them.
"""

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.serving import adapting, classifying, serve
from shared.serving.terminal import (
    FAILED,
    INTERRUPTED,
    Failure,
    check_utf8,
    complain,
    guarded,
    input_texts,
    message_of,
    prepare_streams,
    progress,
    read_input,
    write,
    write_json,
)

if TYPE_CHECKING:
    from shared.serving.models import OpenedModel

app = typer.Typer(
    help="Language models in the terminal. A model is a name (`llm info` lists them), a folder or a .gguf file.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Target(StrEnum):
    """What `llm export` writes."""

    gguf = "gguf"
    onnx = "onnx"
    hf = "hf"
    peft = "peft"


class Kind(StrEnum):
    """How a GGUF file stores its matrices."""

    F32 = "F32"
    F16 = "F16"
    Q8_0 = "Q8_0"
    Q4_0 = "Q4_0"


class Dtype(StrEnum):
    """How a model's numbers are kept in memory."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[str, typer.Argument(help="A name, a folder or a .gguf file.")]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Take the tokenizer of this model instead.")
]
InMemory = Annotated[
    Dtype | None, typer.Option("--dtype", help="How numbers are kept; bfloat16 halves the memory.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="How many threads compute.")]
AsJson = Annotated[bool, typer.Option("--json", help="Lines of JSON, in and out.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Most tokens to write.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0, help="0: always the most probable token.")
]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Choose among so many; 0: among all.")]
TopP = Annotated[
    float, typer.Option("--top-p", min=0, max=1, help="Choose among the most probable of this share.")
]
Penalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1: what was written becomes less likely.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Of the random choices.")]
Adapter = Annotated[
    str | None, typer.Option("--adapter", help="A folder with a LoRA adapter for the model, ours or PEFT's.")
]


def opened(
    model: str,
    dtype: Dtype | None,
    tokenizer: str | None,
    threads: int | None,
    adapter: str | None = None,
) -> "OpenedModel":
    """Load a model and what belongs to it."""
    import torch

    from shared.serving.models import open_model

    if threads is not None:
        torch.set_num_threads(threads)
    if adapter is not None:
        adapter = check_utf8("--adapter", adapter)
    kind = dtype and dtype.value
    return open_model(check_utf8("MODEL", model), dtype=kind, tokenizer=tokenizer, adapter=adapter)


@app.command()
@guarded
def generate(
    model: Annotated[str, typer.Argument(help="A name, a folder, a .gguf file or an .onnx file.")],
    prompt: Annotated[str | None, typer.Argument(help="The beginning; standard input if not given.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A text that ends it; may be repeated.")
    ] = None,
    seed: Seed = None,
    as_json: AsJson = False,
    dtype: InMemory = None,
    tokenizer: Tokenizer = None,
    threads: Threads = None,
    adapter: Adapter = None,
) -> None:
    """Continue a text.

    \b
    llm generate tales-3m "Once upon a time"
    echo "The capital of France is" | llm generate smollm2-135m-instruct --max-tokens 20
    llm generate tales-3m --json < prompts.jsonl > texts.jsonl      lines of {"prompt": "..."}
    llm generate tales-3m "The owl" --adapter my_adapter            with a LoRA adapter
    llm generate tales.onnx "Once upon a time"                      without torch
    """
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    options |= {"repetition_penalty": repetition_penalty, "stop_strings": tuple(stop or ())}
    if model.endswith(".onnx"):
        if temperature or repetition_penalty != 1 or stop or dtype or tokenizer or adapter:
            raise Failure("an .onnx file takes --max-tokens, --threads and --json only")
        from shared.serving.onnx_runtime import OnnxModel

        pieces_of = OnnxModel(check_utf8("MODEL", model), threads).text_writer(max_tokens)
    else:
        from shared.serving.texts import text_writer

        pieces_of = text_writer(opened(model, dtype, tokenizer, threads, adapter), max_tokens, options)
    # One text is written while it is made, lines of JSON one by one.
    if not as_json:
        for piece in pieces_of(read_input() if prompt is None else check_utf8("PROMPT", prompt)):
            write(piece, end="")
        write("")
        return
    for entry in progress(input_texts(prompt, as_json=True, field="prompt"), "texts"):
        write_json(entry | {"text": "".join(pieces_of(entry["prompt"]))})


@app.command()
@guarded
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told first.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    as_json: AsJson = False,
    dtype: InMemory = None,
    tokenizer: Tokenizer = None,
    threads: Threads = None,
    adapter: Adapter = None,
) -> None:
    """Hold a conversation. /help lists the commands, Ctrl-C stops a reply, Ctrl-D ends.

    \b
    llm chat smollm2-135m-instruct
    llm chat smollm2-135m-instruct --system "You answer in one sentence." --temperature 0.7
    llm chat model.gguf --json < questions.txt      a reply for each line
    """
    from shared.generation.conversation import Conversation
    from shared.generation.options import GenerationOptions
    from shared.serving.chat import TerminalChat
    from shared.text.tokenizer import BPETokenizer

    found = opened(model, dtype, tokenizer, threads, adapter)
    words, chat_format = found.needed_tokenizer(), found.chat_format
    if chat_format is None:
        raise Failure(f"{model} was taught no chat format, it only continues texts: llm generate {model}")
    if (
        not isinstance(words, BPETokenizer)
        or not {chat_format.start, chat_format.end} <= words.special_ids.keys()
    ):
        raise Failure(
            f"the tokenizer must have {chat_format.start} and {chat_format.end}, which begin and end a turn"
        )
    options = GenerationOptions(
        max_new_tokens=max_tokens or 256,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )

    def begin(message: str | None) -> Conversation:
        return Conversation(found.model, words, chat_format, system=message, options=options)

    first = None if system is None else check_utf8("--system", system)
    TerminalChat(begin, model, first, as_json=as_json).run()


app.command()(guarded(classifying.classify))


@app.command()
@guarded
def embed(
    model: Model,
    text: Annotated[
        str | None, typer.Argument(help="A text; standard input, line by line, if not given.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The input is lines of JSON; the output always is.")
    ] = False,
    dtype: InMemory = None,
    tokenizer: Tokenizer = None,
    threads: Threads = None,
) -> None:
    """Turn each text into a vector: the mean of the model's last hidden states over its tokens. Writes lines of JSON.

    \b
    llm embed smollm2-135m-instruct "A lamp on a hill"
    llm embed tales-3m < texts.txt > vectors.jsonl
    """
    import torch

    found = opened(model, dtype, tokenizer, threads)
    words, limit = found.needed_tokenizer(), found.model.config.context_length
    for entry in progress(input_texts(text, as_json=as_json, field="text"), "texts"):
        ids = words.encode_ordinary(entry["text"])
        if not 1 <= len(ids) <= limit:
            raise Failure(f"a text must have 1 to {limit} tokens, got {len(ids)}: {entry['text'][:60]!r}")
        with torch.inference_mode():
            vector = found.model.hidden_states(torch.tensor([ids]))[0].float().mean(dim=0)
        write_json(entry | {"embedding": [round(number, 6) for number in vector.tolist()]})


@app.command()
@guarded
def export(
    model: Model,
    path: Annotated[Path, typer.Argument(help="The file, or for hf the folder, to write; it must be new.")],
    to: Annotated[
        Target,
        typer.Option(
            "--to", help="For llama.cpp and Ollama; ONNX Runtime; transformers; of an adapter, for PEFT."
        ),
    ],
    kind: Annotated[Kind, typer.Option("--type", help="Of GGUF's matrices.")] = Kind.Q8_0,
    modelfile: Annotated[
        bool, typer.Option("--modelfile", help="Also write Ollama's Modelfile beside.")
    ] = False,
    tokenizer: Tokenizer = None,
    adapter: Adapter = None,
) -> None:
    """Write a model for other programs. Nothing is overwritten, and nothing half-written is left.

    \b
    llm export tales-3m tales.gguf --to gguf --type Q8_0          llama.cpp, Ollama, LM Studio
    llm export smollm2-135m-instruct smol.gguf --to gguf --modelfile
    llm export tales-3m tales.onnx --to onnx                       ONNX Runtime, browsers, phones
    llm export smollm2-135m-instruct smol --to hf                  transformers, vLLM
    llm export my_adapter for_peft --to peft                       a folder with an adapter
    """
    from shared.serving.exporting import export_adapter, export_model

    if modelfile and to != Target.gguf:
        raise Failure("--modelfile belongs to --to gguf")
    if to == Target.peft:
        for line in export_adapter(check_utf8("MODEL", model), path):
            complain(line)
        return
    for line in export_model(
        opened(model, None, tokenizer, None, adapter),
        path,
        to.value,
        kind=kind.value,
        modelfile=modelfile,
        progress=progress,
    ):
        complain(line)


@app.command()
@guarded
def info(
    model: Annotated[
        str | None, typer.Argument(help="A name, a folder or a .gguf file; none lists the names.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Say what a model is, or list the models that have a name.

    \b
    llm info
    llm info smollm2-135m-instruct
    """
    from shared.serving.models import describe, model_names

    found = {"models": model_names()} if model is None else describe(check_utf8("MODEL", model))
    if as_json:
        write_json(found)
    elif model is None:
        write("\n".join(found["models"]))
    else:
        width = max(map(len, found))
        write("\n".join(f"{name:{width}}  {value}" for name, value in found.items()))


app.command()(guarded(adapting.adapt))
app.command()(guarded(serve.serve))
app.command()(guarded(serve.key))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    prepare_streams()
    try:
        status = app(arguments, prog_name="llm", standalone_mode=False)
    except KeyboardInterrupt:
        return INTERRUPTED
    except MemoryError as error:
        complain(message_of(error))
        return FAILED
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        # A command line that is not understood.
        context = getattr(error, "ctx", None)
        where = f" ({context.command_path} --help explains)" if context else ""
        complain(f"{error.format_message()}{where}")
        return getattr(error, "exit_code", FAILED)
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())

"""What requests and replies look like, as OpenAI's servers have them; the documentation at `/docs` is made from
this.

A field of OpenAI's that would change the reply and is not built here is refused, with its name. Other unknown fields
are ignored, since clients send many that only their own servers know (`user`, `store`, `metadata`, `chat_id`, ...).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Switch = Annotated[bool, Field(strict=True)]
Id = Annotated[int, Field(strict=True, ge=0, le=2**31)]
Name = Annotated[str, Field(max_length=200)]
MOST_STOPS = 16
MOST_CHOICES = 16
MOST_PICTURES = 16


class Body(BaseModel):
    """A JSON object; fields that are not known are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class StreamOptions(Body):
    """Of a stream."""

    include_usage: Switch = Field(
        False, description="A last piece without choices says how many tokens it took."
    )


class ResponseFormat(Body):
    """The form of a reply that is wished for. It is not enforced: check what comes."""

    type: Literal["text", "json_object", "json_schema"] = "text"


class Writing(Body):
    """What completions and chat have in common."""

    model: Name = Field(description="A name that `/v1/models` lists.")
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = Field(
        None, description="0: always the most probable token. Default 1."
    )
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="Choose among the most probable of this share."
    )
    top_k: Annotated[Whole, Field(ge=0, le=10**6)] | None = Field(
        None, description="Not OpenAI's. 0: among all."
    )
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(None, description="Not OpenAI's.")
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = Field(
        None, description="Not OpenAI's."
    )
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    max_tokens: Annotated[Whole, Field(ge=1, le=10**9)] | None = Field(
        None, description="Most tokens to write; fewer where there is room for fewer."
    )
    n: Annotated[Whole, Field(ge=1, le=MOST_CHOICES)] | None = Field(
        None, description="How many continuations."
    )
    seed: Annotated[Whole, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None, description="The same seed and request give the same text on the same server."
    )
    stop: (
        Annotated[str, Field(max_length=1000)]
        | Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=MOST_STOPS)]
        | None
    ) = Field(
        None, description="Texts that end the continuation; they are not part of it. Empty ones are ignored."
    )
    stream: Switch | None = Field(None, description="Server-sent events, a piece at a time.")
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, Number] | None = Field(None, description="Not supported: must be empty.")

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings that are not empty."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


Prompt = str | list[str] | list[Id] | list[list[Id]]


class CompletionRequest(Writing):
    """Continue a prompt, or several."""

    prompt: Prompt = Field(description="A text, several texts, ids, or several lists of ids.")
    logprobs: Annotated[Whole, Field(ge=0, le=5)] | None = None
    echo: Switch | None = Field(None, description="Not supported: must be false.")
    suffix: str | None = Field(None, description="Not supported: must be null.")
    best_of: Whole | None = Field(None, description="Not supported: must be null or equal to n.")


class TextPart(Body):
    """A part of a message."""

    type: str
    text: str | None = None


class ChatMessage(Body):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def text(self) -> str | None:
        """Return the content as one text; None if a part of it is something else."""
        if isinstance(self.content, str):
            return self.content
        texts = [part.text for part in self.content if part.type == "text" and part.text is not None]
        return "".join(texts) if len(texts) == len(self.content) else None


class ChatRequest(Writing):
    """Reply to a conversation."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[Whole, Field(ge=1, le=10**9)] | None = Field(
        None, description="Most tokens to write; goes before max_tokens."
    )
    logprobs: Switch | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = Field(None, description="Not supported: must be empty.")
    functions: list[Any] | None = Field(None, description="Not supported: must be empty.")


class EmbeddingRequest(Body):
    """Turn texts into vectors of length 1."""

    model: Name
    input: Prompt = Field(description="A text, several texts, ids, or several lists of ids.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = Field(None, description="Not supported: must be null or the vector's own.")


class ClassifyRequest(Body):
    """Label texts, or pictures: there must be either `input` or `image`."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["input"]}, {"required": ["image"]}]})

    input: str | list[str] | None = Field(None, description="A text, or several.")
    image: str | Annotated[list[str], Field(min_length=1, max_length=MOST_PICTURES)] | None = Field(
        None,
        description="A picture, PNG, JPEG or WebP, in base64 or as a URL `data:image/png;base64,...`; or several.",
    )
    model: Name | None = Field(
        None, description="The classifier; null for the one there is, of texts or of pictures."
    )


class PromptDetails(Body):
    """Of the tokens of a prompt."""

    cached_tokens: int


class Usage(Body):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class CompletionChoice(Body):
    """One continuation."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "content_filter"] | None


class Completion(Body):
    """Continuations."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ReplyMessage(Body):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Body):
    """One reply."""

    index: int
    message: ReplyMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "content_filter"]


class ChatCompletion(Body):
    """Replies."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Embedding(Body):
    """One vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Numbers, or the base64 of 32-bit floats.")


class InputUsage(Body):
    """How many tokens were read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Body):
    """Vectors."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: InputUsage


class Label(Body):
    """What a text or a picture was found to be."""

    index: int
    label: str
    probabilities: dict[str, float]


class Labels(Body):
    """What texts or pictures were found to be."""

    object: Literal["list"]
    data: list[Label]
    model: str


class ModelCard(Body):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Body):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


class Status(Body):
    """How a server is."""

    status: str


class ErrorDetail(Body):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Body):
    """A refusal, as OpenAI's servers write it."""

    error: ErrorDetail

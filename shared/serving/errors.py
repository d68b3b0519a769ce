"""What a server refuses, in the form in which OpenAI's servers say it.

`{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}`, with a status that says whose fault it is: 4xx
the caller's, 5xx ours. A message names the field and what is allowed; what was sent stands in no message, so that it
cannot reach a log or another person's screen.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
PHRASES = {404: "there is nothing at this address", 405: "this address does not take this method"}


class ApiError(Exception):
    """A request that is not served.

    Args:
        status: Of HTTP.
        message: What is wrong, for the person who calls.
        code: A word for programs, such as `context_length_exceeded`.
        param: The field at fault.
        headers: More headers of the reply, such as `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON of the reply."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """Return the reply."""
        return JSONResponse(self.body(), self.status, self.headers)


def not_found(model: str, known: Sequence[str]) -> ApiError:
    """Return the error for a model that is not served here."""
    return ApiError(
        404,
        f"the model {model[:100]!r} is not served here; there is {', '.join(known)}",
        code="model_not_found",
        param="model",
    )


def unsupported(param: str, why: str) -> ApiError:
    """Return the error for a field that OpenAI has and that would change the reply, but that is not built here."""
    return ApiError(400, f"{param} {why}", code="unsupported_parameter", param=param)


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    """Answer an `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer what the framework refuses: unknown addresses and methods."""
    assert isinstance(error, HTTPException)
    message = PHRASES.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response()


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """Answer a body that does not have the fields it must have, by the first of them."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    # The place in the body; what stands in brackets is the library's name for one of several allowed kinds.
    place = [str(part) for part in first["loc"] if part != "body"]
    kinds = re.compile(r"str|int|float|list|.*[\[-].*")
    param = ".".join(part for part in place if not kinds.fullmatch(part))
    return ApiError(400, f"{param or 'the body'}: {first['msg']}", param=param or None).response()

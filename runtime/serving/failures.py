"""What an error is to a client: a status, and one line of JSON that tells nothing of the inside of the server."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, Field
from starlette.responses import Response

from ...plugins.shared.command import one_line
from ...plugins.shared.errors import MisfError, OutOfMemory

log = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""nginx's status for a client that left before the answer; it is only ever logged and counted."""


class Failure(BaseModel):
    """The body of every answer that is not a success; the names are those of IOPaint."""

    error: str = Field(description="The kind of failure, such as Unprocessable Content")
    detail: str = Field(description="What was expected, what came and what to do")
    body: str = Field("", description="Always empty; clients of IOPaint expect the key")
    errors: str = Field(description="The same as detail; the page of IOPaint shows it")


class RequestError(MisfError):
    """A request that is refused or not finished, with the status that says why."""

    def __init__(self, status: int, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status, self.retry_after = status, retry_after


def failure_response(
    status: int, detail: str, retry_after: int | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Return the answer for a failure: one line of JSON."""
    kind = "Client Closed Request" if status == CLIENT_LEFT else HTTPStatus(status).phrase
    response = Response(failure_line(kind, detail), status, headers, "application/json")
    if retry_after is not None:
        response.headers["Retry-After"] = str(retry_after)
    if status == HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def failure_line(kind: str, detail: str) -> str:
    """Return the body of a failure, with a line break at its end."""
    return json.dumps(Failure(error=kind, detail=detail, body="", errors=detail).model_dump()) + "\n"


def response_for(error: Exception) -> Response:
    """Return the answer for whatever a route raised; what is the server's own fault is logged, not told."""
    if isinstance(error, RequestError):
        return failure_response(error.status, str(error), error.retry_after)
    if isinstance(error, ValueError):  # of the readers of pictures and masks: about what the client sent
        return failure_response(422, one_line(error))
    if isinstance(error, MemoryError | OutOfMemory):
        log.warning("%s", one_line(error))
        return failure_response(503, "not enough memory for this picture at the moment: send it later or smaller", 10)
    log.error("%s", one_line(error), exc_info=not isinstance(error, MisfError))
    return failure_response(500, "the server failed; its log says why, under the X-Request-Id of this answer")


FILLING = (400, 401, 408, 413, 415, 422, 500, 503, 504)
"""How a request to fill a picture may fail."""


def documented(*statuses: int, success: dict[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    """Return what OpenAPI says of failures with these statuses, and of the success where it is given."""
    texts = {
        400: "The request is malformed, or the mask is not of the picture's size.",
        401: "The bearer token is missing or wrong.",
        408: "The body came too slowly.",
        413: "Too many bytes or pixels.",
        415: "The file is not a picture that misf reads.",
        422: "A field is missing or wrong, or a picture is damaged.",
        500: "The server failed.",
        503: "The queue or the memory is full. Retry-After says when to try again.",
        504: "The request was not finished by its deadline.",
    }
    failures: dict[int | str, dict[str, Any]] = {
        status: {"model": Failure, "description": texts[status]} for status in statuses
    }
    return failures | ({200: success} if success else {})

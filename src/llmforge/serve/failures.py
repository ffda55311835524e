"""How errors become OpenAI's error object, with the right status and without a stack trace."""

import json
import logging
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from llmforge.data.rows import shown
from llmforge.errors import ConversationError, InputError, LlmforgeError
from llmforge.serve.models import UnknownModelError
from llmforge.serve.openai import ApiError
from llmforge.serve.requests import OverloadedError

logger = logging.getLogger("llmforge.serve")


def install_handlers(app: FastAPI) -> None:
    """Have an application answer errors in OpenAI's shape; those that nobody expected are left to the door."""

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            return error_response(_invalid(request, error.errors()))
        if isinstance(error, HTTPException):
            return error_response(_http_error(request, error))
        return error_response(as_api_error(error))

    for kind in (ApiError, LlmforgeError, TimeoutError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


def as_api_error(error: Exception) -> ApiError:
    """Say what a client is told of an error; one that is nobody's mistake but ours goes to the log."""
    match error:
        case ApiError():
            return error
        case OverloadedError():
            retry = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            return ApiError(429, str(error), type="rate_limit_error", code="overloaded", headers=retry)
        case UnknownModelError():
            return ApiError(404, str(error), param="model", code="model_not_found")
        case ConversationError():
            return ApiError(400, str(error), param="messages")
        case InputError():
            return ApiError(400, str(error))
        case RecursionError():  # nothing but what a client sent is nested in itself
            return ApiError(400, "values stand in values too deep to read", code="invalid_value")
        case TimeoutError():
            return ApiError(
                504,
                "the answer took longer than the server allows; ask for fewer tokens, or start it with a longer "
                "--request-timeout",
                type="server_error",
                code="timeout",
            )
    logger.error("a request failed", exc_info=error)
    return ApiError(
        500, "the model failed while answering; the server's log says why", type="server_error", code="engine_error"
    )


def error_response(error: ApiError) -> Response:
    """Give the response that tells of an error."""
    return Response(json.dumps(error.body), error.status, error.headers, "application/json")


def _http_error(request: Request, error: HTTPException) -> ApiError:
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = f"there is no {request.url.path}; the server answers {', '.join(_paths(request))}", "not_found"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message, code = f"{request.url.path} does not take {request.method}; use {allowed}", "method_not_allowed"
    elif error.status_code == 413:
        code = "body_too_large"
    elif error.status_code == 400:
        message, code = "the body is no JSON that can be read", "invalid_json"
    return ApiError(error.status_code, message, code=code, headers=error.headers)


def _paths(request: Request) -> list[str]:
    return [route.path for route in request.app.routes if getattr(route, "include_in_schema", False)]


def _invalid(request: Request, problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """Name the first field that is wrong, and what it may be."""
    problem = problems[0]
    kind: str = problem["type"]
    param: str | None = _place(problem["loc"]) or None
    said = str(problem["msg"]).removeprefix("Value error, ")
    content_type = request.headers.get("content-type", "")
    code = None
    if kind == "json_invalid":
        message = f"the body is no JSON: {problem['ctx']['error']}, at character {problem['loc'][-1]}"
        param, code = None, "invalid_json"
    elif not param and "json" not in content_type:
        given = shown(content_type) if content_type else "none"
        message = f"the body must be JSON, with the header Content-Type: application/json; given {given}"
        code = "invalid_json"
    elif not param:
        message = said if kind == "value_error" else f"the body must be a JSON object: {said}"
    elif kind == "extra_forbidden":
        message, code = f"{param} is no field that this server knows; leave it out", "unknown_parameter"
    elif kind == "missing":
        message, code = f"{param} is missing", "missing_required_parameter"
    else:
        message, code = f"{param}: {said}; given {reprlib.repr(problem['input'])}", "invalid_value"
    return ApiError(400, message, param=param, code=code)


def _place(location: Sequence[str | int]) -> str:
    """Write where in the body a problem is, as `messages[0].content`, without the names of a union's members."""
    place = ""
    for part in location[1:]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part.replace("_", "a").isalnum() and not part.startswith("_") and part not in ("str", "int"):
            place += f".{part}" if place else part
        elif location[-1] == part and not place:
            place = part
    return place

"""What a client is told instead of an answer: OpenAI's error object, with its status."""

from __future__ import annotations

from typing import Any

SHOWN_CHARACTERS = 2000  # of a message, which may name what a client sent


class Refusal(Exception):
    """A request that gets no answer. `code` is stable, for programs; the message for people."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        parameter: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        if len(message) > SHOWN_CHARACTERS:
            message = f"{message[:SHOWN_CHARACTERS]}..."
        super().__init__(message)
        self.status, self.code, self.parameter = status, code, parameter
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": str(self),
                "type": "rate_limit_error" if self.status == 429 else kind,
                "param": self.parameter,
                "code": self.code,
            }
        }


def bad_request(code: str, message: str, parameter: str | None = None) -> Refusal:
    """The client's mistake: asking again would not help."""
    return Refusal(400, code, message, parameter=parameter)


def overloaded(message: str, retry_after_s: float) -> Refusal:
    """No room now; says when to ask again."""
    headers = {"Retry-After": str(max(1, round(retry_after_s)))}
    return Refusal(429, "overloaded", message, headers=headers)


def unavailable(message: str, retry_after_s: float = 5) -> Refusal:
    """Workers are missing or failed, and other workers failed too."""
    headers = {"Retry-After": str(max(1, round(retry_after_s)))}
    return Refusal(503, "unavailable", message, headers=headers)

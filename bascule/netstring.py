"""Netstrings (https://cr.yp.to/proto/netstrings.txt), the framing of socketmap_table(5)."""

from __future__ import annotations

from bascule.serving import BadRequest

MAX_LENGTH = 100_000  # bytes; socketmap_table(5), "PROTOCOL"
_MAX_DIGITS = len(str(MAX_LENGTH))


class NetstringError(BadRequest):
    """The peer does not speak netstrings; the connection is of no more use."""


class BadLength(NetstringError):
    """The length is not a decimal number without leading zeros, or is too large."""


class MissingComma(NetstringError):
    """The byte after the payload is not a comma."""


def encode(payload: bytes) -> bytes:
    return b"%d:%b," % (len(payload), payload)


class Parser:
    """A push parser: feed it bytes as they come, it gives the payloads that are complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """
        Raises:
            BadLength, MissingComma: at the first byte that cannot be right.
        """
        self._buffer += data
        complete = []
        while (payload := self._next()) is not None:
            complete.append(payload)
        return complete

    @property
    def pending(self) -> bool:
        """Whether a netstring has begun and is not complete."""
        return bool(self._buffer)

    def _next(self) -> bytes | None:
        colon = self._buffer.find(b":", 0, _MAX_DIGITS + 1)
        digits = bytes(self._buffer[: _MAX_DIGITS + 1] if colon < 0 else self._buffer[:colon])
        if digits and not digits.isdigit():
            raise BadLength(f"a length is expected, not {digits[:8]!r}")
        if len(digits) > 1 and digits.startswith(b"0"):
            raise BadLength("the length has a leading zero")
        if len(digits) > _MAX_DIGITS or (digits and int(digits) > MAX_LENGTH):
            raise BadLength(f"more than {MAX_LENGTH} bytes are announced")
        if colon < 0:
            return None
        if not digits:
            raise BadLength("the length is missing")
        end = colon + 1 + int(digits)
        if len(self._buffer) <= end:
            return None
        if self._buffer[end] != ord(","):
            raise MissingComma("the byte after the payload is not a comma")
        payload = bytes(self._buffer[colon + 1 : end])
        del self._buffer[: end + 1]
        return payload

"""The parser sees the same netstrings however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule import netstring
from bascule.netstring import BadLength, MissingComma, NetstringError, Parser

READ_SIZES = (1, 16, 128, 4096)


def parse(data: bytes, size: int) -> list[bytes]:
    parser = Parser()
    complete = []
    for start in range(0, len(data), size):
        complete += parser.feed(data[start : start + size])
    return complete


@pytest.mark.parametrize("size", READ_SIZES)
@pytest.mark.parametrize(
    ("data", "payloads"),
    [
        (b"", []),
        (b"0:,", [b""]),
        (b"5:hello,", [b"hello"]),
        (b"5:hello,5:world,", [b"hello", b"world"]),
        (b"3:a:b,3:,,,,", [b"a:b", b",,,"]),
        (b"5:hel", []),
        (b"300:" + b"x" * 300 + b",", [b"x" * 300]),
    ],
)
def test_payloads(data: bytes, payloads: list[bytes], size: int) -> None:
    assert parse(data, size) == payloads


@pytest.mark.parametrize("size", READ_SIZES)
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"x:", BadLength),
        (b":,", BadLength),
        (b"05:hello,", BadLength),
        (b"-1:", BadLength),
        (b"100001:", BadLength),
        (b"99999999999999999999", BadLength),
        (b"GET / HTTP/1.0\r\n", BadLength),
        (b"5:hello;", MissingComma),
    ],
)
def test_what_cannot_be_right_is_refused(data: bytes, error: type[NetstringError], size: int) -> None:
    with pytest.raises(error):
        parse(data, size)


@given(st.lists(st.binary(max_size=200), max_size=5), st.integers(min_value=1, max_value=50))
def test_what_is_encoded_is_parsed(payloads: list[bytes], size: int) -> None:
    assert parse(b"".join(netstring.encode(each) for each in payloads), size) == payloads


@given(st.binary(max_size=300), st.integers(min_value=1, max_value=50))
def test_any_bytes_are_parsed_or_refused(data: bytes, size: int) -> None:
    try:
        assert all(isinstance(each, bytes) for each in parse(data, size))
    except NetstringError as error:
        assert str(error)

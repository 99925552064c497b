"""Frames: the bytes on the wire, and a stream that is cut into them."""

import msgspec
import pytest
from serving.framing import FrameParser, ProtocolError, body_size, frame

LIMIT = 1000


def test_a_frame_is_its_length_and_a_body_of_msgpack() -> None:
    assert frame({"a": 1}) == b"\x04\x00\x00\x00" + msgspec.msgpack.encode({"a": 1})
    assert body_size(b"\x04\x01\x00\x00", LIMIT) == 260


def test_frames_survive_any_fragmentation() -> None:
    bodies = [b"", b"a", b"bc" * 300, b"d" * 7, b""]
    stream = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    for size in (1, 2, 3, 5, 64, 604, len(stream)):
        parser, found = FrameParser(LIMIT), []
        for start in range(0, len(stream), size):
            found += [bytes(body) for body in parser.feed(stream[start : start + size])]
        assert found == bodies, size


def test_frame_over_the_limit_is_refused_before_it_arrives() -> None:
    with pytest.raises(ProtocolError, match="a frame of 1001 bytes"):
        FrameParser(LIMIT).feed((LIMIT + 1).to_bytes(4, "little"))

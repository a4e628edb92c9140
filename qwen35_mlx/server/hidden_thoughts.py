"""Thoughts in the fields that clients only send back: signatures and encrypted contents.

Nothing is secret in them. A client that does not show a thought returns it so, after a restart of
the server too, and the prompt begins as before.
"""

import base64
import binascii
import zlib

PREFIX = "q35."
MAX_CHARS = 2_000_000


def hidden(thought: str) -> str:
    """The thought as an opaque text."""
    return PREFIX + base64.b64encode(zlib.compress(thought.encode())).decode()


def revealed(text: str | None) -> str:
    """The thought in an opaque text; empty if it is none of ours."""
    if not text or not text.startswith(PREFIX):
        return ""
    try:
        unpacked = zlib.decompressobj()
        data = unpacked.decompress(base64.b64decode(text.removeprefix(PREFIX)), MAX_CHARS)
        return data.decode()
    except (ValueError, binascii.Error, zlib.error):
        return ""

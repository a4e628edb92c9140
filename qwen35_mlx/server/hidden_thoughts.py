"""Thoughts in fields that clients send back unchanged: signatures and encrypted contents.

They are not secret. A client that does not show thoughts returns them in this form, also after a
restart of the server, so the prompt has the same prefix as before.
"""

import base64
import binascii
import zlib

PREFIX = "q35."
MAX_CHARS = 2_000_000


def hidden(thought: str) -> str:
    """Encode a thought as an opaque text."""
    return PREFIX + base64.b64encode(zlib.compress(thought.encode())).decode()


def revealed(text: str | None) -> str:
    """Decode a thought; empty if the text is not from `hidden`."""
    if not text or not text.startswith(PREFIX):
        return ""
    try:
        unpacked = zlib.decompressobj()
        data = unpacked.decompress(base64.b64decode(text.removeprefix(PREFIX)), MAX_CHARS)
        return data.decode()
    except (ValueError, binascii.Error, zlib.error):
        return ""

"""Holds the names a kernel uses against those Metal has."""

from metal.signature import Signature


def check_names(signature: Signature) -> None:
    pass

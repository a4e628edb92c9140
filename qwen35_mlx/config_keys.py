"""Keys of a config.json: read, checked, and named where they are wrong."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError

log = logging.getLogger(__name__)

# MLX counts rows in 32 bits.
MAX_SIZE = 2**31 - 1


class Reader:
    """Reads required keys and names them when they are missing or of the wrong kind."""

    def __init__(self, text: Mapping[str, Any], prefix: str = ""):
        self.text, self.prefix = text, prefix

    def number(self, key: str, default: float | None = None) -> float:
        """A number above zero; required without a default, else null and 0 mean the default."""
        value = self.text.get(key)
        if default is not None and (value is None or value == 0):
            return default
        if value is None:
            raise ConfigError(
                f"config key {self.prefix}{key} is missing",
                got="null" if key in self.text else "no such key",
                expected="a number above zero",
            )
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if not (plain and 0 < value < math.inf):
            raise self._unusable(key, "a number above zero")
        return value

    def positive(self, key: str, most: int = MAX_SIZE) -> int:
        """A whole number."""
        value = self.number(key)
        if int(value) != value or value > most:
            raise self._unusable(key, f"a whole number up to {most}")
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; `default` where there is no such key."""
        value = self.text.get(key, default)
        if not isinstance(value, bool):
            raise self._unusable(key, "true or false")
        return value

    def _unusable(self, key: str, expected: str) -> ConfigError:
        value = self.text.get(key)
        what = f"config key {self.prefix}{key}={value!r} is not usable"
        return ConfigError(what, got=repr(value), expected=expected)


def unsupported(key: str, value: object, expected: str) -> ConfigError:
    """The error for a value that this project does not implement."""
    return ConfigError(f"{key}={value!r} is not supported", got=repr(value), expected=expected)


def refuse_unsupported(
    text: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], prefix: str = ""
) -> None:
    """Raise for a key that would change the computation."""
    for key, allowed in neutral.items():
        if key in text and text[key] not in allowed:
            wanted = " or ".join(repr(v) for v in allowed if v is not None) or "absent"
            raise unsupported(prefix + key, text[key], wanted)


def report_unknown(text: Mapping[str, Any], known: set[str], prefix: str = "") -> None:
    """Warn about keys that no code reads."""
    unknown = sorted(prefix + key for key in text if key not in known)
    if unknown:
        log.warning("config keys without a known meaning are not used: %s", ", ".join(unknown))

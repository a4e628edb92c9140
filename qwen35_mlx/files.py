"""Files: atomic writes, locks between processes, decoding of text, folders of the user."""

import codecs
import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import ConfigError, Qwen35Error, first_line

# A prompt, or a list of tools: 20 bytes for each token of the longest context, a million.
MAX_TEXT_BYTES = 20 * 10**6
# A text to train on or to compare models on; settings of a model.
MAX_CORPUS_BYTES = 2**30
READ_BYTES = 2**20

# UTF-32 before UTF-16: the little-endian mark of UTF-32 begins with that of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# The scratch folder of `qwen35-mlx cluster`; set in each of the processes that share a model.
RING_VARIABLE = "QWEN35_MLX_RING"
# The value of its option --split.
SPLIT_VARIABLE = "QWEN35_MLX_SPLIT"


def cache_home() -> Path:
    """Folder for files that can be made again; the variable QWEN35_MLX_CACHE overrides it."""
    places = "Library/Caches", "XDG_CACHE_HOME", ".cache"
    return _user_folder("QWEN35_MLX_CACHE", *places, "qwen35-mlx")


def session_home() -> Path:
    """Folder for saved sessions; the variable QWEN35_MLX_SESSIONS overrides it."""
    places = "Library/Application Support", "XDG_DATA_HOME", ".local/share"
    return _user_folder("QWEN35_MLX_SESSIONS", *places, "qwen35-mlx/sessions")


def _user_folder(override: str, on_macos: str, variable: str, elsewhere: str, name: str) -> Path:
    """Raises Qwen35Error if the user has no home folder."""
    if chosen := os.environ.get(override):
        return Path(os.path.expanduser(chosen))
    is_macos = sys.platform == "darwin"
    if not is_macos and (chosen := os.environ.get(variable)):
        return Path(chosen, name)
    home = os.path.expanduser("~")
    if home == "~":
        raise Qwen35Error(
            "the home folder is not known",
            got=f"no variable HOME, and no account of user {os.getuid()}",
            hint=f"set {override} to a folder",
        )
    return Path(home, on_macos if is_macos else elsewhere, name)


def read_bytes(source: Path | BinaryIO, max_bytes: int, name: str = "") -> bytes:
    """All of a file or a stream, which may never end; raises Qwen35Error if it is longer."""
    if isinstance(source, Path):
        with source.open("rb") as stream:
            return read_bytes(stream, max_bytes, str(source))
    parts, num_bytes = [], 0
    # A read allocates all that it is allowed to return.
    while part := source.read(READ_BYTES):
        parts.append(part)
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise Qwen35Error(f"{name} is too large", expected=f"at most {max_bytes:,} bytes")
    return b"".join(parts)


def read_stdin(max_bytes: int) -> bytes:
    """All of standard input; nothing if it is closed."""
    return read_bytes(sys.stdin.buffer, max_bytes, "standard input") if sys.stdin else b""


def read_text(file: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read a text file: UTF-8, or the encoding that its byte order mark names."""
    return decode_text(read_bytes(file, max_bytes), str(file))


def decode_text(data: bytes, name: str, encoding: str = "utf-8") -> str:
    """Text of a file or of standard input, with line ends as \\n; raises Qwen35Error."""
    marked = next((e for mark, e in BYTE_ORDER_MARKS if data.startswith(mark)), encoding)
    try:
        text = data.decode(marked)
        if "\0" in text:
            raise ValueError("a NUL character")
    except ValueError as error:
        raise Qwen35Error(
            f"{name} cannot be read as text", got=error, expected=f"text in {marked}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_object(path: Path) -> dict[str, Any]:
    """Parse a file that holds a JSON object; anything else is a ConfigError."""
    try:
        parsed = json.loads(read_bytes(path, MAX_CORPUS_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read", got=error) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON", got=error, expected="a JSON object") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{path} is not a JSON object", got=type(parsed).__name__)
    return parsed


@contextmanager
def replacing(file: Path, mode: int = 0o666) -> Iterator[Path]:
    """Yield a temporary name to write to; on success it becomes `file`, flushed to the disk.

    On an error the temporary file is removed and `file` stays as it was. Only one process may
    write at a time; the temporary file of a killed one is overwritten. The temporary name keeps
    the suffix of `file`, because MLX chooses the format by it.
    """
    # Follows links. Refuses folders and devices: root could replace /dev/null.
    file = Path(os.path.realpath(file))
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    temporary = file.with_name(f".{file.stem}.partial{file.suffix}")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode))
        yield temporary
        with temporary.open("rb") as written:
            flush(written.fileno())
        temporary.replace(file)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(file.parent)


def require_writable(file: Path) -> None:
    """Raise if `file` could not be written, before long work. Makes its folder."""
    probe = file.with_name(f".{file.stem}.partial{file.suffix}")
    with write_errors(file, "choose another folder for it"):
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666))
        probe.unlink()


@contextmanager
def write_errors(
    path: Path, hint: str = "free disk space, or choose another folder"
) -> Iterator[None]:
    """Turn an OSError of the block, which writes `path`, into a Qwen35Error."""
    try:
        yield
    except OSError as error:
        raise Qwen35Error(f"cannot write {path}", got=error, hint=hint) from error


def require_space(folder: Path, needed_bytes: int, hint: str) -> None:
    """Raise if the disk of `folder`, which need not exist yet, has less room."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise Qwen35Error(
            f"not enough disk space in {existing}",
            got=f"{free_bytes / 1e9:.2f} GB free",
            expected=f"{needed_bytes / 1e9:.2f} GB",
            hint=hint,
        )


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder for the block; afterwards, remove what was made and is empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):
            for path in made:
                path.rmdir()


def save_arrays(
    file: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str], mode: int = 0o666
) -> None:
    """Write MLX arrays as safetensors, whole or not at all; a failed write is an OSError."""
    import mlx.core as mx

    # Here, so that below an error is one of writing.
    mx.eval(list(arrays.values()))
    try:
        with replacing(file, mode) as temporary:
            mx.save_safetensors(str(temporary), dict(arrays), dict(metadata))
    except RuntimeError as error:
        # MLX does not say why.
        needed = sum(array.nbytes for array in arrays.values())
        free = shutil.disk_usage(file.parent).free
        why = f"{first_line(error)}; {needed:,} bytes are needed, {free:,} are free"
        raise OSError(errno.ENOSPC if free < needed else errno.EIO, why, str(file)) from None


def write_file(file: Path, data: bytes) -> None:
    """Write a small file, whole or not at all."""
    with replacing(file) as temporary:
        temporary.write_bytes(data)


def write_json(file: Path, value: object) -> None:
    """Write a JSON file, whole or not at all."""
    try:
        data = json.dumps(value, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # File names may hold surrogates, which UTF-8 cannot encode.
        data = json.dumps(value, indent=2).encode()
    write_file(file, data + b"\n")


def flush(descriptor: int) -> None:
    """fsync, and on macOS the drive's own cache too."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        # Network drives do not support it.
        with suppress(OSError):
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk, where the file system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock on `path`: an existing folder, or a lock file, which is created if needed.

    Raises BlockingIOError if another process holds it and `wait` is false. The lock ends with
    the process, whatever ends it.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            # Some network drives have no locks; they are more common than two writers.
            pass
        yield
    finally:
        os.close(descriptor)

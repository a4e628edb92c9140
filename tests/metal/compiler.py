"""Compiles a generated Metal kernel for the CPU with the clang of the package ziglang."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx
import ziglang
from metal.errors import AddressSpaceError, NotMetalError
from metal.signature import Signature

SHIM = Path(__file__).parent / "shim"
MLX_INCLUDE = Path(next(iter(mlx.__path__))) / "include"
ZIG = Path(ziglang.__file__).parent / ("zig.exe" if os.name == "nt" else "zig")

COMMON = ["-std=c++17", "-Wno-everything", "-ffp-contract=off", "-fno-lax-vector-conversions"]
COMMON += ["-Werror=uninitialized", "-Werror=sometimes-uninitialized", "-Werror=return-type"]
COMMON += ["-fno-exceptions", "-fno-rtti"]
# Metal has no double: 1.0 is a float. Its half and bfloat are rounded after each operation.
COMMON += ["-Xclang", "-cl-single-precision-constant"]
for kind in ("float16", "bfloat16"):
    COMMON += ["-Xclang", f"-f{kind}-excess-precision=none"]
CODE = ["-fPIC", "-O2", "-fno-stack-protector", "-fno-unroll-loops"]
# Every access to memory calls the runtime; wider ones than 16 bytes would not.
CHECKED = ["-fno-vectorize", "-fno-slp-vectorize", "-fno-threadsafe-statics"]
CHECKED += ["-ftrivial-auto-var-init=pattern", "-fsanitize=thread"]
for option in ("read-before-write=1", "func-entry-exit=0"):
    CHECKED += ["-mllvm", f"-tsan-instrument-{option}"]
if platform.machine() == "x86_64":
    CHECKED.append("-march=x86-64-v3")
LINK = ["-shared", "-nostdlib++"] + (
    ["-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else []
)

VECTOR = r"(?:char|short|int|long|uchar|ushort|uint|ulong|float|half|bfloat|bool)[234]"
REWRITES = [
    # Metal's literals
    (r"\b((?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?)h\b", r"half(\1)"),
    (r"\b((?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?)bf\b", r"bfloat(\1)"),
    # clang takes casts between vectors for casts of bits
    (rf"\bstatic_cast<({VECTOR})>\s*\(", r"emu::make<\1>("),
    (rf"\(({VECTOR})\)\s*(?=[\w(.-])", r"emu::cast<\1>()->*"),
    (rf"(?<![\w<])({VECTOR})\s*\(", r"emu::make<\1>("),
    (r"\b((?:metal::)?vec<[\w:]+,\s*\w+>)\s*\(", r"emu::make<\1>("),
    # set by nobody for a custom kernel
    (r"\[\[function_constant\(\d+\)\]\]", "= {}"),
    (r"\[\[threadgroup\(\d+\)\]\]", ""),
    (r"#pragma (?:once|METAL[^\n]*)", ""),
    # registers matter on a GPU, here the time to compile
    (r"#pragma unroll[^\n]*", ""),
]
# `void next() thread {`: C++ has no such qualifiers of functions.
METHOD_QUALIFIER = r"\)(\s*const)?\s*\b(?:thread|device|constant|threadgroup)\b(\s*[:{;])"
# An array as a parameter is a pointer, which clang denies to address spaces.
ARRAY_PARAMETER = (
    r"\b((?:device|constant|threadgroup)\s+(?:const\s+)?[\w:]+)\s+(\w+)\[\w*\](?=\s*[,)])"
)
# `threadgroup float a[32], b[8];`
DECLARATOR = r"\w+(?:\s*\[[^\];]*\])*"
SHARED = (
    r"(?<=[;{}])(\s*)threadgroup\s+([\w:<>, ]+?)\s+"
    rf"({DECLARATOR}(?:\s*,\s*{DECLARATOR})*)\s*;"
)


def without_comments(text: str) -> str:
    """The same lines and columns of code, comments blank."""
    comments = r"//[^\n]*|/\*.*?\*/"
    return re.sub(comments, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL)


def rewrite(text: str) -> str:
    """Metal to what clang calls C++, line by line."""
    text = without_comments(text)
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)

    def shared(match: re.Match) -> str:
        before, ctype, names = match.groups()
        labels = re.findall(r"(\w+)(?:\s*\[[^\]]*\])*\s*(?:,|$)", names)
        notes = "".join(f" EMU_SHARE({n});" for n in labels)
        return f"{before}EMU_SHARED {ctype} {names};{notes}"

    text = re.sub(SHARED, shared, text)
    text = re.sub(ARRAY_PARAMETER, r"\1* \2", text)
    return re.sub(METHOD_QUALIFIER, r")\1\2", text)


def flatten(text: str, seen: set[str]) -> str:
    """Replaces MLX's own includes by their text, each once."""

    def include(match: re.Match) -> str:
        path = match[1]
        if path in seen:
            return ""
        seen.add(path)
        for root in (SHIM, MLX_INCLUDE):
            if (root / path).exists():
                return flatten((root / path).read_text(), seen)
        raise NotMetalError(f"there is no header {path}")

    text = re.sub(r'#include\s+"(mlx/[^"]+)"', include, text)
    return re.sub(r"#include\s+<metal_\w+>", "", text)


@functools.cache
def prelude() -> tuple[str, frozenset[str]]:
    """What MLX puts in front of every custom kernel, and the headers it consists of."""
    seen: set[str] = set()
    text = flatten('#include "mlx/backend/metal/kernels/utils.h"', seen)
    return rewrite(text), frozenset(seen)


def beginning() -> str:
    """What each translation unit begins with."""
    return f'#include <metal_stdlib>\n#line 1 "mlx"\n{prelude()[0]}\n'


def translation_unit(signature: Signature) -> str:
    """The kernel as C++, and an entry that calls it with buffers and the place of a thread.

    It lacks its beginning, which is compiled once.
    """
    seen = prelude()[1]
    arguments = []
    for i, a in enumerate(signature.arguments):
        declared = re.sub(r"\b(device|constant)\b", "", a.declaration)
        ctype = declared[: declared.rindex(a.name)].replace("&", "*")
        arguments.append(f"{'*' if a.is_reference else ''}({ctype})buffers[{i}]")
    arguments += [f"emu::attribute_{name}(thread_)" for name in signature.attributes]
    return "\n".join(
        [
            '#line 1 "header"',
            rewrite(flatten(signature.header, set(seen))),
            signature.prototype().rstrip("\n"),
            f'#line 1 "{signature.name}"',
            # The brace gives a declaration at the start something to follow.
            rewrite("{" + signature.body)[1:],
            "}",
            "#if !defined(EMU_CHECK_ONLY)",
            '#include "emu/attributes.h"',
            'extern "C" __attribute__((no_sanitize("thread"), visibility("default")))',
            "void emu_entry(void** buffers, const EmuThread* thread_) {",
            f"  {signature.specialised()}({', '.join(arguments)});",
            "}",
            "#else",
            f"template decltype({signature.specialised()}) {signature.specialised()};"
            if signature.template
            else "",
            "#endif",
            "",
        ]
    )


@functools.cache
def cache_folder() -> Path:
    base = Path.home() / "Library" / "Caches" if sys.platform == "darwin" else None
    base = base or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("EMULATOR_CACHE") or base / "qwen35-mlx" / "metal-emulator")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def shim_digest() -> str:
    files = [f for f in sorted(SHIM.rglob("*")) if f.is_file()]
    parts = [f.read_bytes() for f in [*files, Path(__file__)]]
    parts += [ZIG.as_posix().encode(), " ".join(COMMON + CODE + CHECKED + LINK).encode()]
    parts.append(f"{sys.platform} {platform.machine()} {ZIG.stat().st_size}".encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def zig(tool: str, *arguments: str | Path) -> str:
    """What clang, or cc (which also knows the system's headers and libraries), complains about."""
    command = [ZIG, tool, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return (result.stderr or "failed") if result.returncode else ""


def digest_of(function) -> str:
    """Of the module that a function comes from."""
    return hashlib.sha256(Path(function.__code__.co_filename).read_bytes()).hexdigest()


def built(text: str, suffix: str, make, how: str = "") -> Path:
    """The cached product of a text; `make(source, product)` is called where there is none."""
    key = hashlib.sha256((shim_digest() + how + text).encode()).hexdigest()[:32]
    target = cache_folder() / f"{key}{suffix}"
    if not target.exists():
        with tempfile.TemporaryDirectory() as scratch:
            source, product = Path(scratch) / "kernel.cpp", Path(scratch) / f"product{suffix}"
            source.write_text(text)
            make(source, product)
            finished = target.with_suffix(f".{os.getpid()}")
            shutil.copy(product, finished)
            finished.rename(target)
    return target


@functools.cache
def runtime_library() -> Path:
    """The runtime, which all kernels share."""
    flags = ["-std=c++17", "-w", *CODE, *LINK, "-fno-exceptions", "-fno-strict-aliasing"]
    flags += ["-fno-sanitize=all", "-I", str(SHIM)]

    def make(source: Path, product: Path) -> None:
        if stderr := zig("cc", *flags, source, "-lm", "-o", product):
            raise RuntimeError(stderr)

    return built((SHIM / "runtime.cpp").read_text(), ".so", make)


@functools.cache
def precompiled(*flags: str) -> Path:
    """The beginning of a translation unit for these flags."""

    def make(source: Path, product: Path) -> None:
        # Without the headers' times, which are others after a new checkout in the same place.
        embed = ["-Xclang", "-fmodules-embed-all-files", "-Xclang", "-fno-pch-timestamp"]
        embed += ["-x", "c++-header"]
        if stderr := zig("clang", *flags, "-I", SHIM, *embed, source, "-o", product):
            raise RuntimeError(stderr)

    # It names the headers by their paths, which are others in another copy of the repository.
    return built(beginning(), ".pch", make, f"{SHIM} {' '.join(flags)}")


def clang(source: Path, flags: list[str], *arguments: str | Path) -> str:
    """What clang complains about in a translation unit."""
    begun = ["-include-pch", precompiled(*flags)]
    return zig("clang", *flags, "-I", SHIM, *begun, *arguments, source)


IMPLICIT_COPY = re.compile(
    r"\(the implicit copy (?:assignment operator|constructor)\).*address space"
)


def complaint(stderr: str) -> str:
    return "\n".join([line for line in stderr.splitlines() if "error:" in line][:6]) or stderr


def check(source: Path) -> None:
    """Compiles for the verdict only: once with a strict bfloat, once with address spaces."""
    base = [*COMMON, "-DEMU_CHECK_ONLY"]
    if stderr := clang(source, [*base, "-DEMU_STRICT_BFLOAT"], "-fsyntax-only"):
        raise NotMetalError(complaint(stderr))
    spaces = [*base, "-DEMU_ADDRESS_SPACES"]
    stderr = clang(source, spaces, "-fsyntax-only", "-ferror-limit=0")
    # Metal copies structs from one address space to another, clang's implicit operators cannot.
    errors = re.split(r"^(?=[^\n]*: error: )", stderr, flags=re.MULTILINE)
    errors = [e for e in errors if ": error: " in e and not IMPLICIT_COPY.search(e)]
    if errors:
        raise AddressSpaceError(complaint("".join(errors)))


def compiled(signature: Signature, flags: list[str], count, *, checked: bool = False) -> Path:
    """The compiled kernel, its intermediate code rewritten by `count`; cached.

    Raises NotMetalError, and if `checked` AddressSpaceError.
    """

    def make(source: Path, product: Path) -> None:
        ir, code = source.with_suffix(".ll"), source.with_suffix(".o")
        if stderr := clang(source, [*COMMON, *flags], "-S", "-emit-llvm", "-o", ir):
            raise NotMetalError(complaint(stderr))
        if checked:
            check(source)
        ir.write_text(count(ir.read_text()))
        machine = [f for f in flags if f.startswith("-march")]
        backend = ["-O1", "-fPIC", "-w", "-Xclang", "-disable-llvm-passes", *machine]
        stderr = zig("clang", *backend, "-c", ir, "-o", code)
        # Without the system's libraries, which the process has: three times as fast.
        link = ["cc", *LINK] if sys.platform == "darwin" else ["ld.lld", "-shared"]
        if stderr := stderr or zig(*link, code, "-o", product):
            raise RuntimeError(stderr)

    how = beginning() + " ".join(flags) + digest_of(count)
    return built(translation_unit(signature), ".so", make, how)


def kernel_library(signature: Signature) -> Path:
    """The checked and compiled kernel; once for a specialisation."""
    return compiled(signature, [*CODE, *CHECKED], count_float_ops, checked=True)


FLOAT_OP = re.compile(
    r"^\s+%\S+ = (?:f(?:add|sub|mul|div)\b.*?|(?:tail |notail )?call [^@]*)"
    r"(?:<(\d+) x )?(?:float|half|bfloat)\b"
)
FLOAT_CALL = re.compile(r"@(llvm\.(?:fma|exp|exp2|log|log2|sqrt|pow|sin|cos)|exp|log|tanh)")


def count_float_ops(ir: str) -> str:
    """Adds to each basic block the number of its floating-point operations, a fused one as two."""
    groups = dict(re.findall(r"^attributes (#\d+) = \{(.*)\}", ir, re.MULTILINE))
    instrumented = {g for g, text in groups.items() if "sanitize_thread" in text}
    out: list[str] = []
    block: list[str] = []
    counting = False
    serial = 0

    def flush() -> None:
        nonlocal serial
        total, first = 0, None
        for i, line in enumerate(block):
            match = FLOAT_OP.match(line) if counting else None
            called = FLOAT_CALL.search(line) if match and " call " in line else None
            if not match or (" call " in line and not called):
                continue
            ops = 2 if called and called[1] == "llvm.fma" else 1
            total += ops * int(match[1] or 1)
            first = i if first is None else first
        if first is not None:
            serial += 1
            counter = [
                f"  %emu.a{serial} = load i64, ptr @emu_float_ops, align 8",
                f"  %emu.b{serial} = add i64 %emu.a{serial}, {total}",
                f"  store i64 %emu.b{serial}, ptr @emu_float_ops, align 8",
            ]
            block[first:first] = counter
        out.extend(block)
        block.clear()

    for line in ir.splitlines():
        if line.startswith("define"):
            counting = bool(instrumented & set(re.findall(r"#\d+", line)))
        if re.match(r"[\w.$\"-]+:", line) or line.startswith(("define", "}")):
            flush()
        block.append(line)
    flush()
    return "\n".join([*out, "@emu_float_ops = global i64 0, align 8", ""])


if __name__ == "__main__":
    runtime_library()

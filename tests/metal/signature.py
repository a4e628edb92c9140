"""The source that MLX generates around the body of a custom kernel."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

TYPE_NAMES = {
    mx.bool_: "bool",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    mx.complex64: "complex64_t",
}

# What a kernel may ask about itself; MLX passes those whose names occur in the source.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

# Smaller inputs are passed in the constant address space.
MAX_CONSTANT_ELEMENTS = 8

TemplateArg = bool | int | mx.Dtype


@dataclass(frozen=True)
class Argument:
    """One buffer of the kernel, in the order of its index."""

    name: str
    role: str  # input, shape, strides, ndim, output
    source: int  # which input or output it belongs to
    ctype: str  # of an element, as written in Metal
    declaration: str

    @property
    def is_reference(self) -> bool:
        return "&" in self.declaration


@dataclass(frozen=True)
class Signature:
    """A kernel specialised for types and template arguments."""

    name: str
    arguments: tuple[Argument, ...]
    attributes: tuple[str, ...]
    template: tuple[tuple[str, TemplateArg], ...]
    header: str
    body: str

    def _template_head(self) -> str:
        def kind(value: TemplateArg) -> str:
            if isinstance(value, bool):
                return "bool"
            return "int" if isinstance(value, int) else "typename"

        if not self.template:
            return ""
        return "template <" + ", ".join(f"{kind(v)} {n}" for n, v in self.template) + ">\n"

    def template_values(self) -> list[str]:
        return [TYPE_NAMES[v] if isinstance(v, mx.Dtype) else str(int(v)) for _, v in self.template]

    def specialised(self) -> str:
        return f"{self.name}<{', '.join(self.template_values())}>" if self.template else self.name

    def prototype(self) -> str:
        """From the template head to the opening brace."""
        lines = [f"  {a.declaration} [[buffer({i})]]" for i, a in enumerate(self.arguments)]
        lines += [f"  {ATTRIBUTES[a]} {a} [[{a}]]" for a in self.attributes]
        return (
            f"{self._template_head()}[[kernel]] void {self.name}(\n" + ",\n".join(lines) + ") {\n"
        )

    def source(self) -> str:
        """The text that MLX hands to the Metal compiler, without MLX's own prelude."""
        text = f"{self.header}{self.prototype()}{self.body}\n}}\n"
        if self.template:
            f = self.specialised()
            text += f'\ntemplate [[host_name("{self.name}")]] [[kernel]] decltype({f}) {f};\n'
        return text


def sign(
    name: str,
    inputs: list[tuple[str, mx.Dtype, tuple[int, ...]]],
    outputs: list[tuple[str, mx.Dtype]],
    template: list[tuple[str, TemplateArg]],
    *,
    header: str,
    source: str,
    atomic_outputs: bool,
) -> Signature:
    """The signature MLX makes for inputs of these types and shapes."""
    arguments = []
    mangled = f"custom_kernel_{name}"
    if template:
        values = [TYPE_NAMES[v] if isinstance(v, mx.Dtype) else str(int(v)) for _, v in template]
        mangled += "_" + "".join("_" + v.replace("-", "_") for v in values)
    for i, (label, dtype, shape) in enumerate(inputs):
        elements = 1
        for n in shape:
            elements *= n
        small = elements < MAX_CONSTANT_ELEMENTS
        ctype = TYPE_NAMES[dtype]
        mangled += f"_{ctype}" + ("s" if not shape else "c" if small else "")
        space = "constant" if small else "device"
        mark = "*" if shape else "&"
        declaration = f"const {space} {ctype}{mark} {label}"
        arguments.append(Argument(label, "input", i, ctype, declaration))
        if not shape:
            continue
        for role, kind in (("shape", "int*"), ("strides", "int64_t*"), ("ndim", "int&")):
            extra = f"{label}_{role}"
            if extra in source:
                arguments.append(
                    Argument(extra, role, i, kind[:-1], f"const constant {kind} {extra}")
                )
    for i, (label, dtype) in enumerate(outputs):
        ctype = TYPE_NAMES[dtype]
        mangled += f"_{ctype}"
        written = f"atomic<{ctype}>" if atomic_outputs else ctype
        arguments.append(Argument(label, "output", i, ctype, f"device {written}* {label}"))
    attributes = tuple(a for a in ATTRIBUTES if a in source)
    return Signature(mangled, tuple(arguments), attributes, tuple(template), header, source)


def recorded_source(exported: bytes) -> str:
    """The generated source of the one custom kernel in a file of mx.export_function."""
    # Strings are written as a 64-bit length and their bytes.
    start = exported.index(b"custom_kernel_")
    start += int.from_bytes(exported[start - 8 : start], "little")
    length = int.from_bytes(exported[start : start + 8], "little")
    return exported[start + 8 : start + 8 + length].decode()

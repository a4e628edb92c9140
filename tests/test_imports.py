"""The arrows between the parts: who may import whom, and what an import may cost."""

import ast
import functools
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Where a folder's modules live once installed.
FOLDERS = {
    "qwen35_mlx": "qwen35_mlx",
    "qwen35_mlx/text": "qwen35_mlx.text",
    "qwen35_mlx/checkpoint": "qwen35_mlx.checkpoint",
    "qwen35_mlx/kernels": "qwen35_mlx.kernels",
    "qwen35_mlx/media": "qwen35_mlx.media",
    "qwen35_mlx/model": "qwen35_mlx.model",
    "qwen35_mlx/engine": "qwen35_mlx.engine",
    "qwen35_mlx/evaluation": "qwen35_mlx.evaluation",
    "qwen35_mlx/training": "qwen35_mlx.training",
    "qwen35_mlx/chat": "qwen35_mlx.chat",
    "qwen35_mlx/server": "qwen35_mlx.server",
    "qwen35_mlx/cli": "qwen35_mlx.cli",
    "convert": "qwen35_mlx.convert",
    "quant": "qwen35_mlx.quant",
}
# From the top down: a package imports those behind it, and the modules beside the packages.
RUNTIME_LAYERS = ("cli", "server", "evaluation", "training", "chat", "engine", "model", "kernels")
HEAVY = (
    "mlx",
    "mlx_lm",
    "numpy",
    "transformers",
    "huggingface_hub",
    "torch",
    "tokenizers",
    "prompt_toolkit",
    "PIL",
    "av",
    "starlette",
    "uvicorn",
)


def module_names() -> dict[str, Path]:
    """Dotted name -> file, for every module of the package."""
    modules = {}
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).glob("*.py")):
            name = package if file.stem == "__init__" else f"{package}.{file.stem}"
            modules[name] = file
    return modules


MODULES = module_names()
CONVERT = [m for m in MODULES if m.split(".")[1:2] == ["convert"]]
QUANT = [m for m in MODULES if m.split(".")[1:2] == ["quant"]]
# __main__ starts the command; nothing imports it.
CLI = [m for m in MODULES if m.split(".")[1:2] in (["cli"], ["__main__"])]
RUNTIME = [m for m in MODULES if m not in (*CONVERT, *QUANT, *CLI)]


def syntax(module: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))))


@functools.cache
def imports(module: str) -> list[str]:
    return list(_imports(module))


def _imports(module: str) -> Iterator[str]:
    """Absolute dotted names a module imports, inside functions too; `from a import b` is `a.b`."""
    is_package = MODULES[module].stem == "__init__"
    for node in syntax(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                base = ".".join([*kept, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    name = str(argument.value)
                    yield f"qwen35_mlx{name}" if name.startswith(".") else name


def called_name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)


def offenders(modules: list[str], *forbidden: str, but: tuple[str, ...] = ()) -> list[str]:
    """`module imports name` for each forbidden import; `but` are the exceptions."""
    return [
        f"{module} imports {name}"
        for module in modules
        for name in imports(module)
        if within(name, *forbidden) and not within(name, *but)
    ]


def test_every_folder_has_modules():
    for folder, package in FOLDERS.items():
        assert len([m for m in MODULES if m.rpartition(".")[0] == package]) > 1, folder


@pytest.mark.parametrize("layer", range(len(RUNTIME_LAYERS)))
def test_imports_point_down(layer):
    """A package knows none above it; the modules beside the packages know no package."""
    above = [f"qwen35_mlx.{name}" for name in RUNTIME_LAYERS[:layer]]
    own = f"qwen35_mlx.{RUNTIME_LAYERS[layer]}"
    assert offenders([m for m in MODULES if within(m, own)], *above) == []
    beside = [m for m in RUNTIME if m.count(".") == 1 and m not in FOLDERS.values()]
    assert offenders(beside, own) == []


def test_nothing_imports_the_cli():
    assert (
        offenders([m for m in MODULES if m not in CLI], "qwen35_mlx.cli", "qwen35_mlx.__main__")
        == []
    )


def test_runtime_imports_neither_convert_nor_quant():
    assert offenders(RUNTIME, "qwen35_mlx.convert", "qwen35_mlx.quant") == []


def test_quant_imports_of_ours_only_what_runs_no_mlx():
    allowed = ("quant", "errors", "files", "checkpoint.quantization")
    assert offenders(QUANT, "qwen35_mlx", but=tuple(f"qwen35_mlx.{m}" for m in allowed)) == []
    module = "qwen35_mlx.checkpoint.quantization"
    code = f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])"
    assert run_python(code).split() == []


# They run the model itself, so that calibration and comparison see what the runtime computes.
RUNNERS = tuple(
    f"qwen35_mlx.convert.{name}"
    for name in ("layerwise", "calibrate", "calibration_text", "distill")
)


def test_convert_imports_of_the_runtime_what_runs_no_model():
    allowed = (
        "qwen35_mlx.convert",
        "qwen35_mlx.quant",
        "qwen35_mlx.errors",
        "qwen35_mlx.config",
        "qwen35_mlx.family",
        "qwen35_mlx.files",
        "qwen35_mlx.checkpoint.adapter",
        "qwen35_mlx.checkpoint.headers",
        "qwen35_mlx.checkpoint.pipeline",
        "qwen35_mlx.checkpoint.sharding",
        "qwen35_mlx.machine",
        "qwen35_mlx.media.patches",
        "qwen35_mlx.media.settings",
        "qwen35_mlx.progress",
        "qwen35_mlx.training.examples",
        "qwen35_mlx.checkpoint.names",
        "qwen35_mlx.checkpoint.quantization",
        "qwen35_mlx.checkpoint.resolver",
        "qwen35_mlx.checkpoint.tensor_table",
        "qwen35_mlx.memory",
        "qwen35_mlx.__version__",
    )
    assert offenders([m for m in CONVERT if m not in RUNNERS], "qwen35_mlx", but=allowed) == []
    model = tuple(f"qwen35_mlx.model.{name}" for name in ("adapters", "language", "loading"))
    # Distillation takes the parts of a layer with experts one after the other.
    model += ("qwen35_mlx.kernels.router", "qwen35_mlx.kernels.grouped_expert_matmul")
    assert offenders(list(RUNNERS), "qwen35_mlx", but=(*allowed, *model)) == []


def test_folders_are_imported_under_their_installed_names():
    assert offenders(list(MODULES), "convert", "quant") == []


def test_only_the_cli_knows_typer_rich_and_prompt_toolkit():
    libraries = ("typer", "rich", "click", "prompt_toolkit")
    assert offenders([m for m in MODULES if m not in CLI], *libraries) == []
    typing = [m for m in MODULES if m != "qwen35_mlx.cli.line_input"]
    assert offenders(typing, "prompt_toolkit") == []


def test_only_the_server_knows_its_libraries():
    others = [m for m in MODULES if not within(m, "qwen35_mlx.server")]
    assert offenders(others, "starlette", "uvicorn", "h11") == []


def test_no_pickle_and_no_torch():
    assert offenders(list(MODULES), "pickle", "cloudpickle", "dill", "joblib", "torch") == []


@functools.cache
def settings(module: str) -> list[tuple[object, ast.expr]]:
    return list(_settings(module))


def _settings(module: str) -> Iterator[tuple[object, ast.expr]]:
    """Each name given a value in a call or in a dict literal."""
    for node in syntax(module):
        if isinstance(node, ast.keyword):
            yield node.arg, node.value
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                yield getattr(key, "value", None), value


@pytest.mark.parametrize("switch", ["trust_remote_code", "allow_pickle"])
def test_no_code_out_of_a_checkpoint(switch):
    values = [(m, value) for m in MODULES for name, value in settings(m) if name == switch]
    assert [m for m, value in values if getattr(value, "value", None) is not False] == []


def test_media_knows_no_model():
    media = [m for m in MODULES if within(m, "qwen35_mlx.media")]
    allowed = ("qwen35_mlx.media", "qwen35_mlx.errors", "qwen35_mlx.files")
    assert offenders(media, "qwen35_mlx", "mlx", but=allowed) == []


@pytest.mark.parametrize("folder", ["convert", "quant"])
def test_folder_stays_flat(folder):
    # package-dir maps one folder; a folder inside would be left out of the wheel.
    assert [d.name for d in (ROOT / folder).iterdir() if d.is_dir()] in ([], ["__pycache__"])


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("module", ["qwen35_mlx", "qwen35_mlx.cli.main"])
def test_import_is_light(module):
    code = f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])"
    assert run_python(code).split() == []


def test_the_list_of_commands_needs_nothing_but_the_command_line():
    own = "[m for m in sys.modules if m.startswith('qwen35_mlx')]"
    loaded = run_python(f"import sys, qwen35_mlx.cli.main; print(*{own})").split()
    others = {m for m in loaded if not m.startswith("qwen35_mlx.cli")}
    assert others == {"qwen35_mlx", "qwen35_mlx.errors", "qwen35_mlx.files"}


@pytest.mark.slow
def test_runtime_and_cli_import_where_convert_and_quant_are_deleted():
    # None in sys.modules makes an import fail.
    run_python(
        "import sys, importlib\n"
        "sys.modules['qwen35_mlx.convert'] = sys.modules['qwen35_mlx.quant'] = None\n"
        f"for module in {[*RUNTIME, *CLI]}: importlib.import_module(module)"
    )


# mlx-lm alone gets its cache from ours, and has been imported then; the bench compares on demand,
# training runs its loop, and a stub without a cache of its own gets mlx-lm's.
MLX_LM_CALLERS = (
    "qwen35_mlx.model.cache",
    "qwen35_mlx.model.layer_cache",
    "qwen35_mlx.engine.foreign",
    "qwen35_mlx.evaluation.bench",
    "qwen35_mlx.training.trainer",
)


def test_no_module_needs_the_programs_we_are_compared_with():
    assert offenders(list(MODULES), "transformers") == []
    callers = [m for m in MODULES if m not in MLX_LM_CALLERS]
    assert offenders(callers, "mlx_lm") == []


def test_an_answer_imports_no_more_than_it_needs(converted_demo, record_property):
    """mlx-lm and transformers took longer to import than the demo to answer."""
    code = f"""
import sys, time
import qwen35_mlx
model, tokenizer = qwen35_mlx.load({str(converted_demo)!r})
messages = [dict(role="user", content="What is the capital of France?")]
responses = qwen35_mlx.stream_generate(model, tokenizer, messages, temperature=0.0)
answer = next(responses).text
seconds = time.process_time()
assert "Paris" in answer + "".join(response.text for response in responses)
assert "Paris" in "".join(p.text for p in qwen35_mlx.Chat(model, tokenizer, sampling=dict(
    temperature=0.0)).send(messages[0]["content"]))
too_many = "mlx_lm transformers torch huggingface_hub requests httpx safetensors rich typer yaml"
print(*[name for name in too_many.split() if name in sys.modules], seconds, len(sys.modules))
"""
    *heavy, seconds, num_modules = run_python(code).split()
    assert heavy == []
    assert int(num_modules) < 700
    limits = "1.00 s at most on a quiet machine"
    record_property("CPU of load and a first token", f"{float(seconds):.2f} s ({limits})")
    # A busy or slow machine takes several times as much.
    assert float(seconds) < 3


@pytest.mark.slow
def test_tools_use_only_names_that_exist() -> None:
    """A bench is run seldom: what moves is missed there first."""
    missing = []
    for file in sorted((ROOT / "tools").rglob("*.py")):
        nodes, imported = list(ast.walk(ast.parse(file.read_text("utf-8")))), {}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qwen35_mlx"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    if name in MODULES:
                        imported[alias.asname or alias.name] = importlib.import_module(name)
                    if not hasattr(module, alias.name) and name not in MODULES:
                        missing.append(f"{file.name}: {name}")
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = imported.get(node.value.id)
                if isinstance(module, ModuleType) and not hasattr(module, node.attr):
                    missing.append(f"{file.name}: {module.__name__}.{node.attr}")
    assert missing == []

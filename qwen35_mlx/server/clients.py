"""Settings of each client for this server: printed by `serve`, used by `launch`."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Qwen35Error

# Some clients need any key.
ANY_KEY = "local"
TIMEOUT_MS = 3_600_000
# Without the last two, Claude Code sometimes asks for another model, and compacts too late.
CLAUDE_NEEDS = (
    "ANTHROPIC_BASE_URL",
    "ANTHROPIC_AUTH_TOKEN",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL",
    "CLAUDE_CODE_MAX_CONTEXT_TOKENS",
)


@dataclass(frozen=True)
class Endpoint:
    """A running server: its address, model and context length."""

    url: str
    model: str
    context_length: int
    api_key: str | None = None

    @property
    def key(self) -> str:
        """The key that clients send."""
        return self.api_key or ANY_KEY

    @property
    def max_output(self) -> int:
        """Maximum length of an answer: half of the context, to leave room for the prompt."""
        return max(1024, min(32_000, self.context_length // 2))


@dataclass(frozen=True)
class Launch:
    """How to start a client: its command, environment and settings files."""

    program: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    install: str
    files: Mapping[str, str] = field(default_factory=dict)


def claude(server: Endpoint) -> Launch:
    """Claude Code; it needs the context length to compact in time."""
    environment = {
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_AUTH_TOKEN": server.key,
        "ANTHROPIC_MODEL": server.model,
        "ANTHROPIC_SMALL_FAST_MODEL": server.model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": server.model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": server.model,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": server.model,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(server.context_length),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(server.max_output),
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "API_TIMEOUT_MS": str(TIMEOUT_MS),
        "CLAUDE_STREAM_IDLE_TIMEOUT_MS": str(TIMEOUT_MS),
    }
    install = "npm install -g @anthropic-ai/claude-code"
    return Launch("claude", ["--model", server.model], environment, install)


def qwen_code(server: Endpoint) -> Launch:
    """Qwen Code."""
    settings = {
        "security": {"auth": {"selectedType": "openai"}},
        "model": {"name": server.model},
        "modelProviders": {
            "openai": [
                {
                    "id": server.model,
                    "name": server.model,
                    "baseUrl": f"{server.url}/v1",
                    "envKey": "OPENAI_API_KEY",
                    "generationConfig": {
                        "timeout": TIMEOUT_MS,
                        "contextWindowSize": server.context_length,
                    },
                }
            ]
        },
    }
    return Launch(
        "qwen",
        ["--auth-type", "openai", "--model", server.model],
        {
            "OPENAI_BASE_URL": f"{server.url}/v1",
            "OPENAI_API_KEY": server.key,
            "OPENAI_MODEL": server.model,
            "QWEN_CODE_SYSTEM_SETTINGS_PATH": "{folder}/qwen-settings.json",
        },
        "npm install -g @qwen-code/qwen-code (Node.js 22 or newer)",
        {"qwen-settings.json": _json(settings)},
    )


def opencode(server: Endpoint) -> Launch:
    """opencode."""
    config = {
        "$schema": "https://opencode.ai/config.json",
        "provider": {
            "qwen35-mlx": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "qwen35-mlx",
                "options": {"baseURL": f"{server.url}/v1", "apiKey": server.key},
                "models": {
                    server.model: {
                        "name": server.model,
                        "limit": {"context": server.context_length, "output": server.max_output},
                    }
                },
            }
        },
        "model": f"qwen35-mlx/{server.model}",
    }
    return Launch(
        "opencode",
        [],
        {"OPENCODE_CONFIG": "{folder}/opencode.json"},
        "npm install -g opencode-ai",
        {"opencode.json": _json(config)},
    )


def codex(server: Endpoint) -> Launch:
    """Codex."""
    provider = "model_providers.qwen35-mlx"
    values = {
        "model": server.model,
        "model_provider": "qwen35-mlx",
        "model_context_window": server.context_length,
        f"{provider}.name": "qwen35-mlx",
        f"{provider}.base_url": f"{server.url}/v1",
        f"{provider}.wire_api": "responses",
        f"{provider}.env_key": "QWEN35_MLX_API_KEY",
        f"{provider}.stream_idle_timeout_ms": TIMEOUT_MS,
    }
    options = [
        text for key, value in values.items() for text in ("-c", f"{key}={json.dumps(value)}")
    ]
    install = "npm install -g @openai/codex"
    return Launch("codex", options, {"QWEN35_MLX_API_KEY": server.key}, install)


LAUNCHES = {"qwen-code": qwen_code, "claude": claude, "opencode": opencode, "codex": codex}


def prepared(launch: Launch, folder: Path) -> dict[str, str]:
    """Write a client's files into a scratch folder; returns its environment."""
    for name, text in launch.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return {
        name: value.replace("{folder}", str(folder)) for name, value in launch.environment.items()
    }


def command_of(launch: Launch, more: Sequence[str], path: str | None) -> list[str]:
    """The command to run; raises Qwen35Error if it is not installed."""
    if path is None:
        raise Qwen35Error(
            f"{launch.program} is not installed",
            expected=f"{launch.program} in one of the folders of PATH",
            hint=launch.install,
        )
    return [path, *launch.arguments, *more]


def settings_text(server: Endpoint) -> str:
    """The settings for each client, to copy and paste."""
    key = shlex.quote(server.key)
    url, model = server.url, shlex.quote(server.model)
    exports = " ".join(
        f"{name}={shlex.quote(value)}"
        for name, value in claude(server).environment.items()
        if name in CLAUDE_NEEDS
    )
    python = f'OpenAI(base_url="{url}/v1", api_key="{server.key}")'
    lines = {
        "Qwen Code": f"OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key} OPENAI_MODEL={model} "
        "qwen --auth-type openai",
        "Claude Code": f"{exports} claude --model {model}",
        "opencode": "qwen35-mlx launch opencode",
        "Codex": "qwen35-mlx launch codex",
        "Open WebUI": f"OPENAI_API_BASE_URLS={url}/v1 OPENAI_API_KEYS={key} open-webui serve",
        "openai-python": f"{python}, model={server.model!r}",
        "Ollama clients": f"OLLAMA_HOST={url}",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {line}" for name, line in lines.items())


def shown_url(host: str, port: int) -> str:
    """The address for clients on this machine."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name and name[0] != "[" else f"http://{name}:{port}"


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"

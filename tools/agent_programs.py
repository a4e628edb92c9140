"""Runs agents from npm without a terminal, each for one turn with a tool, on a scripted model.

The agents' prompts have 20,000 tokens, too many for the demo model's context, and the demo does not
follow them. So a scripted engine calls the first tool that runs a command, and answers when it has
a result. All else, from the socket to the chat template, is the real server.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from qwen35_mlx.cli.local_models import SOURCE
from qwen35_mlx.engine.output import Piece
from qwen35_mlx.engine.requests import Request
from qwen35_mlx.engine.tool_calls import ToolCall
from qwen35_mlx.files import read_object
from qwen35_mlx.prompt import encode_messages
from qwen35_mlx.server import clients
from qwen35_mlx.server.app import make_app
from qwen35_mlx.server.run import Server, bind
from qwen35_mlx.server.service import Settings
from qwen35_mlx.text.tokenizer import read_tokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

# Where `make test-agents` installs them; packages for a single system have other program folders.
MODULES = ROOT / ".venv" / "agents" / "node_modules"
PROGRAM_FOLDERS = (
    ".bin",
    "@anthropic-ai/claude-code-linux-x64",
    "opencode-linux-x64/bin",
)
CONTEXT_LENGTH = 131_072
WORD = "pomegranate"
COMMAND = f"echo {WORD}"
SECONDS = 120
# The names of tools that run a command, with their arguments.
SHELLS = {
    "run_shell_command": {"command": COMMAND, "is_background": False, "description": "say it"},
    "Bash": {"command": COMMAND, "description": "say it"},
    "bash": {"command": COMMAND, "description": "say it"},
    "shell": {"command": ["sh", "-c", COMMAND]},
    "shell_command": {"command": COMMAND},
    "exec_command": {"cmd": COMMAND},
}
# The arguments that make each agent answer one prompt and exit.
HEADLESS = {
    "qwen-code": ["--approval-mode", "yolo", "-o", "json", "PROMPT"],
    "claude": ["-p", "PROMPT", "--allowedTools", "Bash", "--output-format", "json"],
    "opencode": ["run", "PROMPT"],
    "codex": [
        "exec",
        "--skip-git-repo-check",
        "--dangerously-bypass-approvals-and-sandbox",
        "PROMPT",
    ],
}
PROMPT = f"Run `{COMMAND}` and tell me what it prints."


def scripted_engine(tokenizer: Any) -> Any:
    """An engine that calls a shell once and then reports its result."""
    from server.fake_engine import FakeEngine, FakeTicket

    class Scripted(FakeEngine):
        def submit(self, request: Request) -> FakeTicket:
            # Fails if the model's chat template does not accept the request.
            encode_messages(
                tokenizer,
                list(request.messages or ()),
                add_generation_prompt=True,
                tools=list(request.tools) or None,
            )
            ticket = FakeTicket(self, request)
            self.tickets.append(ticket)
            return ticket

        def events(self, ticket: FakeTicket) -> Any:
            self.say, self.finish = script(ticket.request)
            return super().events(ticket)

    return Scripted(tokenizer)


def script(request: Request) -> tuple[list[Any], str]:
    """The events of an answer: a call if there is a shell and no result yet, else a text."""
    messages = list(request.messages or ())
    results = [m for m in messages if m["role"] == "tool"]
    names = [tool["function"]["name"] for tool in request.tools]
    shell = next((name for name in SHELLS if name in names), None)
    if shell is None or results:
        return [Piece("thought", "The result is there."), f"It prints {WORD}."], "stop"
    arguments = SHELLS[shell]
    raw = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
    call = ToolCall(shell, dict(arguments), raw)
    return [Piece("thought", "I call the shell."), Piece("tool_call", "", call)], "tool_calls"


def search_path() -> str:
    """PATH with the folders of the installed agents in front."""
    folders = [str(MODULES / folder) for folder in PROGRAM_FOLDERS]
    return os.pathsep.join([*folders, os.environ.get("PATH", "")])


def run_all() -> dict[str, str]:
    """Each installed agent with its problem; an empty text if there is none."""
    tokenizer = read_tokenizer(SOURCE, read_object(SOURCE / "config.json"))
    engine = scripted_engine(tokenizer)
    settings = Settings("demo", CONTEXT_LENGTH, vocab_size=2560)
    server = Server(lambda: make_app(engine, settings, tokenizer))
    bound = bind("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
    thread.start()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    try:
        endpoint = clients.Endpoint(url, "demo", CONTEXT_LENGTH)
        found = {name: make(endpoint) for name, make in clients.LAUNCHES.items()}
        return {
            name: run_one(name, launch, engine)
            for name, launch in found.items()
            if shutil.which(launch.program, path=search_path())
        }
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


def run_one(name: str, launch: clients.Launch, engine: Any) -> str:
    """Run a turn of one agent; returns its problem, or an empty text."""
    engine.tickets.clear()
    arguments = [PROMPT if word == "PROMPT" else word for word in HEADLESS[name]]
    if name == "codex":
        arguments = ["exec", *launch.arguments, *arguments[1:]]
    else:
        arguments = [*launch.arguments, *arguments]
        if name == "opencode":
            arguments = [*HEADLESS[name][:1], PROMPT]
    with tempfile.TemporaryDirectory() as home:
        environment = {
            "PATH": search_path(),
            "HOME": home,
            "TERM": "dumb",
            **clients.prepared(launch, Path(home)),
        }
        try:
            run = subprocess.run(
                [shutil.which(launch.program, path=search_path()) or "", *arguments],
                cwd=home,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"it did not end; the server got {len(engine.tickets)} requests"
    if WORD not in run.stdout:
        return f"exit {run.returncode}: {run.stdout[-300:]} {run.stderr[-500:]}"
    has_result = any(
        message["role"] == "tool" and WORD in str(message["content"])
        for ticket in engine.tickets
        for message in ticket.request.messages or ()
    )
    return "" if has_result else "the tool was not run"


def main() -> None:
    """Run all agents and print the results; exit 1 if one fails or none is installed."""
    problems = run_all() or {"agents": "none is installed"}
    for name, problem in problems.items():
        print(f"{name}: {problem or 'ok'}")
    sys.exit(any(problems.values()))


if __name__ == "__main__":
    main()

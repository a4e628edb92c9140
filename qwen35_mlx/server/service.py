"""State of all handlers: engine, information about the model, stored calls and responses."""

import asyncio
import hashlib
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest

from .. import __version__
from ..checkpoint.names import OF_EXPERTS
from ..engine.requests import Request, Ticket, Top
from ..sampling import SamplingParams
from ..text.detokenizer import token_bytes
from .events import Answer, Mailbox, dumps
from .faults import ApiError
from .fields import WORKER_BYTES, Fields, parse_object, read_body
from .messages import CallMemory

# Threads for tokenizing and reading pictures; MLX has its own thread.
NUM_WORKERS = 2
MAX_RESPONSES_KEPT, MAX_KEPT_CHARS = 200, 2**27
FINGERPRINT = f"qwen35-mlx-{__version__}"


@dataclass
class Settings:
    """Information about the model for clients, and the limits of the server."""

    model_id: str
    context_length: int
    # Other names for the model.
    aliases: Sequence[str] = ()
    # Names of adapters, for requests: `MODEL:NAME`, or the field `adapters`.
    adapters: Sequence[str] = ()
    vocab_size: int = 0
    defaults: SamplingParams = field(default_factory=SamplingParams)
    architecture: str = "qwen3_5"
    num_bytes: int = 0
    digest: str = ""
    num_parameters: int = 0
    parameter_size: str = ""
    quantization: str = ""
    template: str = ""
    sees: bool = False
    # Whether the chat template renders the arguments of calls as JSON.
    json_calls: bool = False
    created_s: int = field(default_factory=lambda: int(time.time()))
    api_key: str | None = None
    hosts: Sequence[str] = ()
    max_body_bytes: int = 64 * 2**20
    max_requests: int = 256

    @property
    def capabilities(self) -> list[str]:
        """The model's capabilities, in Ollama's terms."""
        return ["completion", "tools", "thinking", *(["vision"] if self.sees else [])]

    @classmethod
    def of(cls, model: Any, tokenizer: Any, folder: Path, **given: Any) -> "Settings":
        """Settings from a loaded model."""
        from ..text.chat_template import DEFAULT

        config = model.config
        template = str(getattr(tokenizer, "chat_templates", {}).get(DEFAULT, ""))
        files = [file for file in folder.glob("*.safetensors") if file.is_file()]
        card = folder / "config.json"
        num_parameters, bits = _parameters(model)
        unit, sign = (1e6, "M") if num_parameters < 1e9 else (1e9, "B")
        return cls(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            defaults=model.sampling_defaults,
            num_bytes=sum(file.stat().st_size for file in files),
            digest=hashlib.sha256(card.read_bytes()).hexdigest() if card.is_file() else "",
            num_parameters=num_parameters,
            parameter_size=f"{num_parameters / unit:.1f}{sign}",
            quantization=f"{bits}-bit" if bits else "",
            template=template,
            sees=getattr(tokenizer, "vision", None) is not None,
            json_calls="<function=" not in template,
            **given,
        )


def _parameters(model: Any) -> tuple[int, int]:
    """Number of parameters, and the bits of most of them; 0 if they are not quantized."""
    total, by_bits, experts = 0, Counter[int](), getattr(model, "experts", None)
    for path, module in model.named_modules():
        stack = held = 1
        if experts and OF_EXPERTS in f".{path}.":
            # The arrays hold only some experts; the others are on disk.
            stack, held = experts.num_experts, experts.num_slots
        is_packed = "scales" in module
        if is_packed:
            by_bits[module.bits] += module["scales"].size * module.group_size * stack // held
        plain = [v for name, v in module.items() if name not in ("weight", "scales", "biases")]
        arrays = plain if is_packed else module.values()
        total += sum(value.size for value in arrays if hasattr(value, "size")) * stack // held
    return total + by_bits.total(), max(by_bits, key=by_bits.__getitem__, default=0)


class Service:
    """The state of a server."""

    def __init__(self, engine: Any, settings: Settings, tokenizer: Any = None):
        self.engine = engine
        self.settings = settings
        self.tokenizer = tokenizer
        self.workers = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="requests")
        self.calls = CallMemory(settings.json_calls)
        # For /v1/responses, by id: the response, the items of the conversation before it, and the
        # characters of both.
        self.responses: OrderedDict[str, tuple[dict[str, Any], list[Any], int]] = OrderedDict()
        # End tokens, which are not a part of the text.
        self.ends: frozenset[int] = frozenset(getattr(tokenizer, "eos_token_ids", ()))
        self._mailbox: Mailbox | None = None
        self.num_requests = 0
        self.is_stopping = False

    async def fields(self, http: HttpRequest) -> Fields:
        """The JSON of a request."""
        self.num_requests += 1
        data = await read_body(http, self.settings.max_body_bytes)
        is_small = len(data) < WORKER_BYTES
        return Fields(parse_object(data) if is_small else await self.in_worker(parse_object, data))

    async def in_worker(self, function: Any, *arguments: Any) -> Any:
        """Run a slow function in a worker thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.workers, function, *arguments)

    async def answer(self, *requests: Request) -> Answer:
        """Submit requests; raises errors of the first ones."""
        for request in requests:
            if request.messages is not None:
                request.messages = self.calls.restored(request.messages)
        # Created here, because it needs a running loop.
        self._mailbox = self._mailbox or Mailbox()
        return await Answer(self._submit, requests, self._mailbox).start()

    async def _submit(self, request: Request) -> Ticket:
        ticket: Ticket = await self.in_worker(self.engine.submit, request)
        return ticket

    async def count(self, request: Request) -> int:
        """Number of tokens of a prompt."""
        if request.messages is not None:
            request.messages = self.calls.restored(request.messages)
        return int(await self.in_worker(self.engine.count_tokens, request))

    @property
    def model_names(self) -> list[str]:
        """Names of the model, and of the model with each adapter."""
        base = self.settings.model_id
        return [base, *(f"{base}:{adapter}" for adapter in self.settings.adapters)]

    def knows(self, name: str) -> bool:
        """Whether a name is one of the model's; Ollama's clients append :latest."""
        names = (*self.model_names, *self.settings.aliases)
        return name in names or name.removesuffix(":latest") in names

    def adapter(self, body: Fields) -> str:
        """The name of the adapter for a request, or an empty string."""
        given = body.text("adapters")
        if given and given not in self.settings.adapters:
            names = ", ".join(self.settings.adapters) or "nothing: this server has no adapters"
            raise body.refuse("adapters", names)
        name = (body.text("model") or body.text("name") or "").removesuffix(":latest")
        known = dict(zip(self.model_names[1:], self.settings.adapters, strict=True))
        named = known.get(name, "")
        if given and named and given != named:
            raise body.refuse("adapters", f"{named}, which model names, or nothing")
        return given or named

    def check_model(self, body: Fields) -> str:
        """The client's name of the model, which is optional; raises ApiError if it is unknown."""
        return self.known_model(body.text("model") or self.settings.model_id)

    def known_model(self, name: str) -> str:
        """The name; raises ApiError if it is not one of the model's."""
        if not self.knows(name):
            own = self.settings.model_id
            message = f"The model '{name[:200]}' does not exist; this server has '{own}'"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    def keep_response(self, response: dict[str, Any], given: list[Any]) -> None:
        """Store a response with its input items; the oldest ones are dropped."""
        kept = self.responses
        kept[response["id"]] = response, given, len(dumps([response, given]))
        while len(kept) > MAX_RESPONSES_KEPT or sum(n for *_, n in kept.values()) > MAX_KEPT_CHARS:
            kept.popitem(last=False)

    def token_entry(self, token: int, logprob: float | None, top: Top | None) -> dict[str, Any]:
        """A token with its log probability, in the form of OpenAI's chat completions."""
        entry = self._entry(token, logprob)
        entry["top_logprobs"] = [self._entry(t, p) for t, p in top or ()]
        return entry

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = list(self.bytes_of(token))
        return {"token": self.text_of(token), "logprob": finite(logprob), "bytes": data}

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token, which may be a part of a character."""
        return token_bytes(self.tokenizer.backend_tokenizer.id_to_token(token))

    def text_of(self, token: int) -> str:
        """The text of a token; incomplete characters become U+FFFD."""
        return self.bytes_of(token).decode(errors="replace")

    def id_of(self, text: str) -> int | None:
        """The id of an added token."""
        found = self.tokenizer.backend_tokenizer.token_to_id(text)
        return None if found is None else int(found)

    def close(self) -> None:
        """End the workers."""
        self.workers.shutdown(wait=False, cancel_futures=True)


def finite(logprob: float | None) -> float:
    """A finite log probability for JSON; -9999 for impossible tokens, as OpenAI's servers do."""
    return -9999.0 if logprob is None or not logprob > -9999.0 else float(logprob)


def service_of(http: HttpRequest) -> Service:
    """The service of a request's application."""
    service: Service = http.app.state.service
    return service


async def begun(http: HttpRequest) -> tuple[Service, Fields]:
    """The service and the JSON body of a request."""
    service = service_of(http)
    return service, await service.fields(http)

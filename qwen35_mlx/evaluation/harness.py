"""A model for lm-evaluation-harness: shared prompts are prefilled once, answers are resumable."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import (
    get_rolling_token_windows,
    handle_non_serializable,
    make_disjoint_window,
    make_table,
)

from ..chat.sessions import model_identity
from ..engine.generate import batch_generate
from ..errors import Qwen35Error, first_line
from ..model.language import Model
from ..progress import StepProgress
from ..prompt import THINK_CLOSE, THINK_OPEN
from ..sampling import SamplingParams
from .scoring import Pair, Score, score

# The harness's default where a task says nothing.
MAX_NEW_TOKENS = 256
# Results that describe this machine, not the model.
PRIVATE = ("pretty_env_info", "git_hash", "upper_git_hash", "transformers_version")


class Journal:
    """Answers in a file of JSON lines; a later run finds them by their questions."""

    def __init__(self, file: Path | None, identity: str):
        """`identity`: everything besides the question that determines an answer."""
        self._file, self._identity = file, identity
        self._answers: dict[str, Any] = {}
        if file is None or not file.exists():
            return
        for line in file.read_bytes().splitlines():
            try:
                key, answer = json.loads(line)
                self._answers[key] = answer
            # An incomplete last line of a killed run.
            except (ValueError, TypeError):
                continue

    def get(self, *question: Any) -> Any:
        """The answer, or None."""
        return self._answers.get(self._key(question))

    def add(self, answer: Any, *question: Any) -> None:
        """Keep an answer."""
        key = self._key(question)
        self._answers[key] = answer
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as stream:
                # The newline comes first: it ends an incomplete line.
                stream.write("\n" + json.dumps([key, answer]))

    def _key(self, question: Sequence[Any]) -> str:
        text = json.dumps([self._identity, *question], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class HarnessModel(TemplateLM):
    """A loaded model behind the harness's interface."""

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        journal: Journal,
        *,
        batch_size: int = 32,
        enable_thinking: bool | None = None,
        progress: StepProgress = lambda done, total, what: None,
    ):
        super().__init__()
        self.model, self.tokenizer, self.journal = model, tokenizer, journal
        self.batch_size = batch_size
        self._template = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._progress = progress
        # Tokens that were prefilled, and their number without shared prefixes.
        self.num_read = self.num_asked = 0
        self._done = 0

    def _report(self, total: int, what: str) -> None:
        self._done += 1
        self._progress(self._done - 1, total, what)

    @property
    def eot_token_id(self) -> int:
        """The token before a text without a context."""
        return int(self.tokenizer.eos_token_id)

    @property
    def max_length(self) -> int:
        """Maximum length of a context and its continuation."""
        return self.model.config.context_length

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests."""
        return "qwen35-mlx"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Ids of a text; names of control tokens in it become control tokens."""
        return list(self.tokenizer.encode(string, add_special_tokens=False))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt as text; without a generation prompt the last message stays open."""
        text = str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._template,
            )
        )
        return text if add_generation_prompt else text.rstrip().removesuffix("<|im_end|>")

    def _loglikelihood_tokens(self, requests: list[Any], **unused: Any) -> list[tuple[float, bool]]:
        results: list[Any] = [None] * len(requests)
        pairs, places = [], []
        for place, (_, context, continuation) in enumerate(requests):
            # As usual for the harness, a context that is too long is cut at the left.
            cut = max(len(context) + len(continuation) - self.max_length, 0)
            pair = Pair(context[min(cut, len(context) - 1) :], continuation)
            results[place] = self.journal.get("score", *pair)
            if results[place] is None:
                pairs.append(pair)
                places.append(place)

        def scored(i: int, found: Score) -> None:
            results[places[i]] = list(found)
            self.journal.add(list(found), "score", *pairs[i])
            self._report(len(results), "log-likelihoods")

        self._done = len(results) - len(pairs)

        _, num_read = score(self.model, pairs, scored)
        self.num_read += num_read
        self.num_asked += sum(len(p.context) + len(p.continuation) - 1 for p in pairs)
        return [(float(value), bool(greedy)) for value, greedy in results]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log probability of whole texts."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for window in windows:
                pairs.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers to prompts, without thoughts."""
        answers: list[Any] = [self.journal.get("answer", *r.args) for r in requests]
        by_settings = defaultdict(list)
        for place, request in enumerate(requests):
            if answers[place] is None:
                by_settings[json.dumps(request.args[1], sort_keys=True)].append(place)
        self._done = sum(answer is not None for answer in answers)
        for settings, places in by_settings.items():
            self._generate(requests, answers, places, json.loads(settings))
        return answers

    def _generate(
        self, requests: list[Any], answers: list[Any], places: list[int], given: dict[str, Any]
    ) -> None:
        stops = given.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        texts = [requests[place].args[0] for place in places]
        # Stop strings are for the answer only: inside a thought they would end it.
        thinks = any(text.rstrip().endswith(THINK_OPEN) for text in texts)
        sampled = given.get("do_sample") and given.get("temperature") != 0
        names = ("temperature", "top_p", "top_k", "min_p") if sampled else ()

        def answered(i: int, text: str) -> None:
            text = text.rpartition(THINK_CLOSE)[2].lstrip() if thinks else text
            for stop in stops:
                text = text.partition(stop)[0] if stop else text
            answers[places[i]] = text
            # Sampled answers are not kept: each run samples again.
            if not sampled:
                self.journal.add(text, "answer", *requests[places[i]].args)
            self._report(len(answers), "answers")

        batch_generate(
            self.model,
            self.tokenizer,
            [self.tok_encode(text) for text in texts],
            max_tokens=int(given.get("max_gen_toks", MAX_NEW_TOKENS)),
            stop=[] if thinks else stops,
            batch_size=self.batch_size,
            shares_prefix=True,
            answered=answered,
            **vars(SamplingParams()) | {n: given[n] for n in names if given.get(n) is not None},
        )


def _manager(names: list[str], include_path: Path | None) -> TaskManager:
    """The tasks of the folder if they suffice: indexing the harness's own 14,000 takes long."""
    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=include_path)


def evaluate(
    model: Model,
    tokenizer: Any,
    tasks: Iterable[str],
    *,
    name: str = "",
    include_path: Path | None = None,
    journal: Path | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    enable_thinking: bool | None = None,
    progress: StepProgress = lambda done, total, what: None,
) -> tuple[dict[str, Any], str]:
    """The harness's results for its own tasks or those of a folder, and a table of them.

    With a `journal` a stopped run continues where it was.
    """
    identity = f"{model_identity(model)} {enable_thinking}"
    lm = HarnessModel(
        model,
        tokenizer,
        Journal(journal, identity),
        batch_size=batch_size,
        enable_thinking=enable_thinking,
        progress=progress,
    )
    wanted = list(tasks)
    try:
        results = simple_evaluate(
            lm,
            tasks=wanted,
            task_manager=_manager(wanted, include_path),
            batch_size=batch_size,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=chat_template,
            log_samples=False,
        )
    # Unknown names, data that cannot be fetched, invalid task files.
    except (KeyError, ValueError, OSError, ImportError) as error:
        raise Qwen35Error(
            "the tasks cannot be run",
            got=f"{type(error).__name__}: {first_line(error)}",
            expected="names of lm-evaluation-harness's tasks, or of those in --include-path",
        ) from error
    assert results is not None
    found = {key: value for key, value in results.items() if key not in PRIVATE}
    found["config"] |= {"model": name, "chat_template": chat_template}
    found["prompt_tokens_read"], found["prompt_tokens_asked"] = lm.num_read, lm.num_asked
    # Task settings may hold functions.
    found = json.loads(json.dumps(found, default=handle_non_serializable))
    table = str(make_table(found))
    return found, table + ("\n" + str(make_table(found, "groups")) if found.get("groups") else "")

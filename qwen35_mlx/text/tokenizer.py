"""The tokenizer of a model's folder: the same ids and texts as transformers', without it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from ..errors import CheckpointError
from ..files import read_object
from . import chat_template
from .detokenizer import StreamingDetokenizer

if TYPE_CHECKING:
    from ..media.settings import VisionSettings

Token = str | AddedToken
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Patterns that split text into words; Qwen3.5's keeps combining marks with their letters.
CONTRACTION, SPACES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {
    "Qwen3_5Tokenizer": rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}",
    "Qwen2Tokenizer": rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}",
}
# The class that transformers uses for a model type, and types for which it ignores the folder's.
CLASS_OF = {"qwen3_next": "Qwen2Tokenizer"}
DEFAULT_CLASS = "Qwen3_5Tokenizer"
IGNORES_FOLDER = ("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text")
# The default of eos, pad and unk token in both classes.
DEFAULT_TOKEN = "<|endoftext|>"


class Tokenizer:
    """Text to token ids and back, and messages to a prompt.

    `vision`: the model's picture settings; `no_vision`: why it reads none. `load` sets both.
    """

    vision: "VisionSettings | None" = None
    no_vision = "its folder was not looked at for a vision tower"

    def __init__(
        self,
        backend: Backend,
        named: Mapping[str, str],
        extra: Sequence[str],
        templates: Mapping[str, str],
        eos_token_ids: Iterable[int] = (),
    ):
        """named: special tokens by their use, such as `eos_token`; extra: all other ones."""
        self.backend_tokenizer = backend
        self.special_tokens_map = dict(named)
        self.extra_special_tokens = list(extra)
        self.chat_templates = dict(templates)
        self.eos_token_ids = set(eos_token_ids)
        if (eos := self.eos_token_id) is not None:
            self.eos_token_ids.add(eos)

    def __getattr__(self, name: str) -> Any:
        # Programs written for mlx-lm's wrapper look for the tokenizer inside it.
        if name == "_tokenizer":
            return self
        if name.removesuffix("_id") in NAMED:
            token = self.special_tokens_map.get(name.removesuffix("_id"))
            return token if token is None or not name.endswith("_id") else self._id(token)
        raise AttributeError(f"{type(self).__name__} has no attribute {name}")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; names of added tokens in the text become those tokens."""
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """Text of token ids; unknown ids and those of pictures are left out."""
        ids = getattr(ids, "tolist", lambda: ids)()
        ids = [i for i in ([ids] if isinstance(ids, int) else ids) if i >= 0]
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    @property
    def detokenizer(self) -> StreamingDetokenizer:
        """A new detokenizer for one answer."""
        return StreamingDetokenizer(self.backend_tokenizer.id_to_token)

    def get_vocab(self) -> dict[str, int]:
        """All tokens with their ids."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        """The added tokens, control tokens among them, and their ids."""
        added = self.backend_tokenizer.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items()}

    @property
    def vocab_size(self) -> int:
        """The number of tokens, without added ones."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or ids of several; an unknown token has that of `unk_token`."""
        return self._id(tokens) if isinstance(tokens, str) else [self._id(t) for t in tokens]

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """A token of the vocabulary, or several; None for an unknown id."""
        name = self.backend_tokenizer.id_to_token
        return name(ids) if isinstance(ids, int) else [name(int(i)) for i in ids]

    def _id(self, token: str) -> int | None:
        found = self.backend_tokenizer.token_to_id(token)
        unknown = self.special_tokens_map.get("unk_token")
        if found is None and unknown is not None:
            return self.backend_tokenizer.token_to_id(unknown)
        return found

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token that the folder's files name."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def add_eos_token(self, token: str | int) -> None:
        """Add a token, or the id of one, that ends an answer."""
        known = str(token).isdecimal()
        found = int(token) if known else self.backend_tokenizer.token_to_id(str(token))
        if found is None:
            raise ValueError(f"{token!r} is not a token of this tokenizer")
        self.eos_token_ids.add(found)

    @property
    def chat_template(self) -> str | None:
        """The template for chats without tools; None where there is none."""
        return self.chat_templates.get(chat_template.DEFAULT)

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self.chat_templates = {} if template is None else {chat_template.DEFAULT: template}

    def apply_chat_template(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None = None,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        return_dict: bool = False,
        **variables: Any,
    ) -> Any:
        """The prompt that the template writes, as ids or as text; `variables` go to the template.

        Names of control tokens in the messages become control tokens: see `prompt.encode_messages`.
        """
        name = chat_template.TOOL_USE if tools else chat_template.DEFAULT
        template = self.chat_templates.get(name, self.chat_template)
        if template is None:
            raise ValueError(f"no chat template {name}; there are {sorted(self.chat_templates)}")
        text = chat_template.render(
            template,
            list(messages),
            tools=list(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
            **self.special_tokens_map | variables,
        )
        if not tokenize:
            return text
        ids = self.encode(text, add_special_tokens=False)
        return {"input_ids": ids} if return_dict else ids


def read_tokenizer(
    folder: Path, model_config: Mapping[str, Any], eos_token_ids: Iterable[int] = ()
) -> Tokenizer:
    """The tokenizer of a folder, built as transformers builds it.

    Its two classes use the vocabulary and the merges of tokenizer.json, and define normalization,
    splitting and decoding themselves. Raises CheckpointError; damaged files may raise others.
    """
    path = folder / "tokenizer_config.json"
    config = read_object(path) if path.exists() else {}
    words = WORDS.get(_class_name(config, model_config))
    file = folder / "tokenizer.json"
    is_json = file.exists()
    if is_json:
        backend = Backend.from_file(str(file))
    elif words and (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        backend = Backend(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    else:
        raise CheckpointError(
            f"no tokenizer in {folder}", got="no tokenizer.json", expected="tokenizer.json"
        )
    in_file = backend.get_added_tokens_decoder()
    if words:
        backend = _byte_level(backend, words, bool(config.get("add_prefix_space")))
    if not isinstance(backend.decoder, decoders.ByteLevel):
        raise CheckpointError(
            f"the tokenizer in {folder} is not supported",
            got=f"decoder {type(backend.decoder).__name__}",
            expected="a byte-level BPE, as Qwen's",
        )
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    added, found, extra = _special_tokens(folder, config, in_file)
    if words:
        found = dict.fromkeys(("eos_token", "unk_token", "pad_token"), DEFAULT_TOKEN) | found
    # The order matters: tokens that are not in the vocabulary get the next free ids.
    ordered = [(use, found.get(use)) for use in (*NAMED, *found)]
    named = {use: token for use, token in ordered if token is not None}
    _add(backend, added, list(named.values()), extra)
    texts = {use: str(token) for use, token in named.items()}
    if words == WORDS["Qwen2Tokenizer"]:
        specials = dict.fromkeys([*texts.values(), *map(str, extra)])
        backend.add_tokens([AddedToken(token, special=True) for token in specials])
    if not is_json:
        _add_ends(backend, config, texts)
    templates = chat_template.read_templates(folder, config)
    return Tokenizer(backend, texts, list(map(str, extra)), templates, eos_token_ids)


def _class_name(config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str:
    """The class that transformers uses for the folder."""
    model_type = model_config.get("model_type")
    declared = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    if not declared or model_type in IGNORES_FOLDER:
        return CLASS_OF.get(str(model_type), DEFAULT_CLASS)
    return str(declared).removesuffix("Fast")


def _byte_level(loaded: Backend, words: str, add_prefix_space: bool) -> Backend:
    """A backend with the vocabulary of `loaded`, without added tokens, and the class's pipeline."""
    model = loaded.model
    if not isinstance(model, BPE):
        model = BPE(loaded.get_vocab(with_added_tokens=False), [])
    model.dropout = model.unk_token = None
    model.fuse_unk = model.byte_fallback = model.ignore_merges = False
    backend = Backend(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    if loaded.post_processor is not None:
        backend.post_processor = loaded.post_processor
    return backend


def _special_tokens(
    folder: Path, config: Mapping[str, Any], in_file: Mapping[int, AddedToken]
) -> tuple[dict[int, AddedToken], dict[str, Any], list[Token]]:
    """Added tokens by id, special tokens by use, and special tokens without a use.

    tokenizer_config.json has all of them if it lists added tokens. Otherwise they are in files of
    older programs and in tokenizer.json.
    """
    config = dict(config)
    if "additional_special_tokens" in config and not config.get("extra_special_tokens"):
        config["extra_special_tokens"] = config.pop("additional_special_tokens")
    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        added = {int(i): AddedToken(**t) for i, t in config["added_tokens_decoder"].items()}
    else:
        config |= _object(folder / "special_tokens_map.json")
        names = [*(config.get(use) for use in NAMED), *(config.get("extra_special_tokens") or [])]
        special = {str(_token(name)) for name in names if name is not None}
        for text, i in _object(folder / "added_tokens.json").items():
            is_special = text in special
            added[i] = AddedToken(text, special=is_special, normalized=not is_special)
        added |= in_file
    tokens = {k: v for k, v in config.items() if k in NAMED or _is_token(k, v)}
    extra = config.get("extra_special_tokens", config.get("additional_special_tokens")) or []
    if isinstance(extra, dict):
        tokens, extra = tokens | extra, []
    extra = [_token(t) for t in extra]
    named = {use: None if token is None else _token(token) for use, token in tokens.items()}
    by_text = {str(token): token for token in added.values()}
    for use in NAMED:
        if named.get(use) is not None:
            named[use] = by_text.get(str(named[use]), named[use])
    return added, named, extra


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _is_token(key: str, value: Any) -> bool:
    """Whether a key that is unknown to transformers names a special token of the model."""
    is_added_token = isinstance(value, dict) and value.get("__type") == "AddedToken"
    return key.endswith("_token") and (isinstance(value, str) or is_added_token)


def _token(value: Any) -> Token:
    """A token as text or with its flags; without `__type` it is from a list of special tokens."""
    if isinstance(value, str):
        return value
    flags = {k: v for k, v in value.items() if k not in ("__type", "special")}
    return AddedToken(**flags, special="__type" not in value or bool(value.get("special")))


def _add(
    backend: Backend, added: Mapping[int, AddedToken], named: list[Token], extra: list[Token]
) -> None:
    """Add the missing tokens, first by id, then the named ones; gaps between ids are not kept."""
    tokens: list[Token] = [token for _, token in sorted(added.items())]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    known |= {str(token) for token in tokens}
    for token in (*named, *extra):
        if str(token) not in known:
            tokens.append(token)
            known.add(str(token))
    names = {str(token) for token in named}
    for i, token in enumerate(tokens):
        if isinstance(token, str):
            tokens[i] = AddedToken(token, special=True)
        elif str(token) in names:
            token.special = True
    backend.add_tokens(tokens)


def _add_ends(backend: Backend, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Add bos and eos around every text where tokenizer_config.json asks for them.

    Only without a tokenizer.json, which has its own post-processor.
    """
    before, after = (
        named.get(f"{end}_token") if config.get(f"add_{end}_token") else None
        for end in ("bos", "eos")
    )
    ends = [token for token in (before, after) if token is not None]
    if ends:
        backend.post_processor = processors.TemplateProcessing(
            single=[*([before] if before else []), "$A", *([after] if after else [])],
            special_tokens=[(token, backend.token_to_id(token)) for token in ends],
        )

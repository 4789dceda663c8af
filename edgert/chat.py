"""Messages to tokens: renders the chat template; text of messages never becomes control tokens."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgert.errors import ConfigError, FormatError
from edgert.events import Listener, Notice
from edgert.llama.vocab import Vocab
from edgert.template import (
    GENERIC_STOPS,
    GENERIC_TEMPLATE,
    ChatTemplate,
    Message,
    SpecialTokens,
)

ROLES = ("system", "user", "assistant", "tool")
_MOST_MESSAGES = 100_000
_MOST_REPLIES = 256


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as tokens; the first `n_keep` are BOS and the system prompt."""

    token_ids: tuple[int, ...]
    n_keep: int


@dataclass(frozen=True, slots=True)
class _Part:
    """A piece of the rendered text: the template's own, or the content of a message."""

    text: str
    message: Message | None = None


class ChatFormat:
    """Turns conversations into prompts for one model.

    Control tokens are read only where the template wrote them: text in a message that looks like
    one stays text. The tokens of replies that were generated here are remembered, since tokenizing
    their text again can give other tokens and would spoil the KV cache.

    Args:
        vocab: The model's vocabulary.
        source: The model's template, None for a generic one (with a notice).
        model_name: For messages to people.
        listener: Gets notices.
    """

    def __init__(
        self, vocab: Vocab, source: str | None, model_name: str, listener: Listener
    ) -> None:
        self._vocab = vocab
        self._listener = listener
        self._told: set[str] = set()
        self._replies: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._bos = _text_of(vocab, vocab.bos)
        self.stops: tuple[str, ...] = ()
        if source is None:
            self.stops = GENERIC_STOPS
            self._tell(f"{model_name} has no chat template: using a generic one")
        special = SpecialTokens(self._bos, _text_of(vocab, vocab.eos))
        self._template = ChatTemplate(source or GENERIC_TEMPLATE, model_name, special)

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """Render and tokenize a conversation.

        Raises:
            ConfigError: the messages are malformed, or the template refuses them.
            FormatError: the template fails.
        """
        checked = check_messages(messages)
        text = self._template.render(checked)
        parts = self._parts(checked, text)
        if self._bos and self._vocab.add_bos and text.startswith(self._bos):
            parts = _without_prefix(parts, len(self._bos))
        whole = self._vocab.tokenize(
            "".join(part.text for part in parts), add_special=True, parse_special=True
        )
        plain = self._tokenize(parts, {})
        # the tokenizer may strip text beside control tokens, which only one call over all shows;
        # it is the safe way as long as no message brings control tokens of its own
        same_controls = _controls(self._vocab, whole) == _controls(self._vocab, plain)
        if plain != whole and same_controls:
            return Prompt(tuple(whole), self._n_keep(parts, whole))
        token_ids = self._tokenize(parts, self._replies)
        return Prompt(tuple(token_ids), self._n_keep(parts, token_ids))

    def remember(self, text: str, token_ids: Sequence[int]) -> None:
        """Note the tokens of a generated reply, also for when it comes back stripped."""
        if not text.strip() or text != _text(self._vocab, token_ids):
            return
        for key in {text, text.strip()}:
            self._replies[key] = tuple(token_ids)
            self._replies.move_to_end(key)
        while len(self._replies) > _MOST_REPLIES:
            self._replies.popitem(last=False)

    def remembered(self, messages: Sequence[Mapping[str, str]]) -> dict[str, tuple[int, ...]]:
        """Return the remembered replies among `messages`, for a saved session."""
        texts = {message["content"] for message in messages}
        return {text: ids for text, ids in self._replies.items() if text in texts}

    def _parts(self, messages: list[Message], text: str) -> list[_Part]:
        """Split the rendered text into the template's own and the messages' pieces.

        The template is rendered again with a mark in place of each content. Where templates change
        contents, other than by stripping them, there is no safe split: then all is template text.
        """
        marks = [f"\ue000{secrets.token_hex(8)}\ue001" for _ in messages]
        marked = [
            {**message, "content": mark} for message, mark in zip(messages, marks, strict=True)
        ]
        try:
            rest = self._template.render(marked)
        except (ConfigError, FormatError):
            rest = ""
        parts: list[_Part] = []
        position = 0
        for message, mark in zip(messages, marks, strict=True):
            own, found, rest = rest.partition(mark)
            start = position + len(own)
            content = next(
                (
                    each
                    for each in (message["content"], message["content"].strip())
                    if found and text.startswith(own + each, position)
                ),
                None,
            )
            if content is None:
                break
            parts += [_Part(own), _Part(content, message)]
            position = start + len(content)
        else:
            if text[position:] == rest:
                return [part for part in (*parts, _Part(rest)) if part.text]
        self._tell("the chat template rewrites messages: control tokens in them are not kept apart")
        return [_Part(text)]

    def _tokenize(
        self, parts: Sequence[_Part], replies: Mapping[str, tuple[int, ...]]
    ) -> list[int]:
        """Tokenize runs between control tokens of the template; runs hold no control tokens."""
        vocab = self._vocab
        token_ids = vocab.tokenize("", add_special=True)
        run = ""
        for index, part in enumerate(parts):
            if part.message is None:
                for piece in _split_controls(vocab, part.text):
                    if isinstance(piece, int):
                        token_ids += [*_plain(vocab, run), piece]
                        run = ""
                    else:
                        run += piece
                continue
            known = replies.get(part.text) if part.message["role"] == "assistant" else None
            if known is not None and _ends_run(vocab, parts[index + 1 :]):
                token_ids += [*_plain(vocab, run), *known]
                run = ""
            else:
                run += part.text
        return token_ids + _plain(vocab, run)

    def _n_keep(self, parts: Sequence[_Part], token_ids: Sequence[int]) -> int:
        """Count the leading tokens up to the end of a leading system message."""
        index = next((i for i, part in enumerate(parts) if part.message is not None), None)
        n_bos = len(self._vocab.tokenize("", add_special=True))
        if index is None:
            return n_bos
        message = parts[index].message
        if message is None or message["role"] != "system":
            return n_bos
        head = self._tokenize(parts[: index + 1], {})
        n_same = next(
            (i for i, (a, b) in enumerate(zip(head, token_ids, strict=False)) if a != b), len(head)
        )
        return max(n_bos, min(n_same, len(token_ids)))

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._listener(Notice(text))


def check_messages(messages: Sequence[Mapping[str, str]]) -> list[Message]:
    """Return the messages as plain dictionaries.

    Raises:
        ConfigError: not a list of role and content; the message says where.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ConfigError(f"messages is a {type(messages).__name__}, wanted a list of messages")
    if not 0 < len(messages) <= _MOST_MESSAGES:
        raise ConfigError(f"{len(messages):,} messages, wanted 1 to {_MOST_MESSAGES:,}")
    return [_checked(message, index) for index, message in enumerate(messages)]


def _checked(message: Mapping[str, str], index: int) -> Message:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ConfigError(f"{where} is a {type(message).__name__}, wanted role and content")
    unknown = sorted(str(key) for key in message if key not in ("role", "content"))
    if unknown:
        raise ConfigError(f"{where} has {', '.join(unknown)}, wanted role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ConfigError(f"{where}.role is {role!r}, wanted one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ConfigError(f"{where}.content is a {type(content).__name__}, wanted text")
    check_text(content, f"{where}.content")
    return {"role": role, "content": content}


def check_text(text: str, where: str) -> str:
    """Return `text` if it can be written as UTF-8.

    Raises:
        ConfigError: it has surrogates, as text read from bytes of another encoding has.
    """
    if not isinstance(text, str):
        raise ConfigError(f"{where} is a {type(text).__name__}, wanted text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where} is not valid Unicode at character {error.start}", hint="pass UTF-8 text"
        ) from error
    return text


def _plain(vocab: Vocab, text: str) -> list[int]:
    return vocab.tokenize(text, add_special=False, parse_special=False) if text else []


def _is_control(vocab: Vocab, token_id: int) -> bool:
    return vocab.piece(token_id, False) == b"" != vocab.piece(token_id, True)


def _controls(vocab: Vocab, token_ids: Sequence[int]) -> list[int]:
    return [token_id for token_id in token_ids if _is_control(vocab, token_id)]


def _split_controls(vocab: Vocab, text: str) -> list[str | int]:
    """Split template text at its control tokens, which become their ids."""
    pieces: list[str | int] = []
    position = 0
    for token_id in vocab.tokenize(text, add_special=False, parse_special=True):
        if not _is_control(vocab, token_id):
            continue
        name = _text_of(vocab, token_id)
        at = text.find(name, position)
        if at < 0:
            continue
        pieces += [text[position:at], token_id]
        position = at + len(name)
    return [*pieces, text[position:]]


def _ends_run(vocab: Vocab, later: Sequence[_Part]) -> bool:
    """Say whether a control token, or nothing, follows directly."""
    if not later:
        return True
    if later[0].message is not None:
        return False
    first = next((piece for piece in _split_controls(vocab, later[0].text) if piece != ""), "")
    return isinstance(first, int)


def _without_prefix(parts: Sequence[_Part], length: int) -> list[_Part]:
    """Drop the BOS text that the template wrote; the tokenizer adds the token itself."""
    first = parts[0]
    if first.message is not None or len(first.text) < length:
        return list(parts)
    return [_Part(first.text[length:]), *parts[1:]]


def _text_of(vocab: Vocab, token_id: int | None) -> str:
    return "" if token_id is None else vocab.piece(token_id, True).decode("utf-8", "replace")


def _text(vocab: Vocab, token_ids: Sequence[int]) -> str:
    return b"".join(vocab.piece(token_id) for token_id in token_ids).decode("utf-8", "replace")

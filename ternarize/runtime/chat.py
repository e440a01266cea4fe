"""A conversation with a model: what was said, what still fits its context, the next answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ternarize.errors import UsageError
from ternarize.models.reads import max_positions
from ternarize.runtime.generate import Generation, Memory, encode_chat, generate

_REMEDY = "Continue a text instead: ternarize generate"
Message = dict[str, str]


def opening(tokenizer: Any, system: str) -> list[Message]:
    """The messages that a conversation begins with: what the model is told, if anything.

    Raises UsageError where the tokenizer has no chat template, or one that does not take them.
    """
    messages = [{"role": "system", "content": system}] if system else []
    yes, no = ({"role": "user", "content": content} for content in ("yes", "no"))
    encode_chat(tokenizer, [*messages, yes], remedy=_REMEDY)

    def shown(*said: Message) -> str:
        text: str = tokenizer.apply_chat_template(list(said), tokenize=False)
        return text

    left_out = "messages" if shown(yes) == shown(no) else ""
    if messages and shown(*messages, yes) == shown(yes):
        left_out = "the system message"
    if left_out:
        found = f"the tokenizer's chat template leaves {left_out} out"
        raise UsageError("chat", found, "one that takes them as plain text", _REMEDY)
    return messages


@dataclass
class Conversation:
    """What was said, and what the model has read of it.

    start     messages that are never forgotten (`opening`)
    said      messages since, of the user and the model in turn
    forgotten messages that there was no room for any more
    """

    model: Any
    tokenizer: Any
    start: list[Message]

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.said: list[Message] = []
        self.forgotten = 0
        self.memory = Memory()

    def answer(
        self,
        text: str,
        *,
        max_new_tokens: int,
        stream: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Generation:
        """The model's answer to a message, which it takes as said; so is what was broken off.

        max_new_tokens  at most; fewer where the model's context ends before
        options         of `generate`

        Where less than a quarter of the context (or than `max_new_tokens`) is left for the answer,
        the oldest messages are forgotten until half of it is. Raises what `generate` raises;
        nothing is said then.
        """
        context = max_positions(self.model.config)
        wanted = min(max_new_tokens, context // 4)
        said = [*self.said, {"role": "user", "content": text}]
        room = context - self._tokens(said)
        if room < wanted:
            while room < context // 2 and len(said) > 2:
                said = said[2:]
                room = context - self._tokens(said)
        forgotten = len(self.said) + 1 - len(said)
        pieces: list[str] = []

        def keep(piece: str) -> None:
            pieces.append(piece)
            if stream is not None:
                stream(piece)

        def take() -> None:
            self.said = [*said, {"role": "assistant", "content": "".join(pieces)}]
            self.forgotten += forgotten

        try:
            found = generate(
                self.model,
                self.tokenizer,
                [*self.start, *said],
                max_new_tokens=min(max_new_tokens, max(1, room)),
                stream=keep,
                memory=self.memory,
                **options,
            )
        except KeyboardInterrupt:
            if pieces:
                take()
            raise
        take()
        return found

    def _tokens(self, said: list[Message]) -> int:
        return len(encode_chat(self.tokenizer, [*self.start, *said], remedy=_REMEDY))

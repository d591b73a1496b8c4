"""Chat formats: what stands before and after a user's text and which ids end a turn, found by rendering."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from crosslora.errors import UserError
from crosslora.text.vocabulary import continuation_backend

# For a base without a chat template:  <bos>User: ...\nAssistant:\n...<eos>\n
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant:\\n' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)

# Stand-ins for a message. They begin differently, so that what their token ids share is the template's alone.
MARKERS = ("Qwertz1Marker", "zebra2marker", "Éclair3 marker", "7marker4", '"5marker', "我marker6")


class ChatFormat:
    """One tokenizer with one chat template: the given one, else the tokenizer's own, else PLAIN_TEMPLATE.

    The template becomes `tokenizer.chat_template`. Where the tokenizer puts a BOS before plain text and the template
    writes none, BOS is put in front of the template, so that every reader of the saved tokenizer sees the same prompt.
    UserError: a template that cannot be rendered or that changes the user's text, a tokenizer without EOS.

    pre_query, user_end: the text before and after the user's text in a prompt; user_end includes the generation prompt.
    pre_query_ids: the ids before the user's text whatever it is. A space at the end of pre_query may be missing from
        them, where the tokenizer makes it part of the user's first word.
    eos_id: what the template writes after an assistant's answer. stop_ids: it, the tokenizer's EOS, and the
        `other_ends` of the base's generation settings.
    user_stop_ids: the first control id after a user's text, if there is one, and stop_ids.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        other_ends: Iterable[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path}: has no EOS token; set eos_token in its config"
            )
        tokenizer.chat_template = chat_template or _own_template(tokenizer) or PLAIN_TEMPLATE
        if self._lacks_bos():
            tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
        self.pre_query, self.user_end = self._around([], generate=True)
        self.pre_query_ids = self._shared_prefix()
        after_answer = self._around([{"role": "user", "content": "Hello"}], generate=False)[1]
        end_of_answer = self._first_control_id(after_answer)
        self.eos_id: int = tokenizer.eos_token_id if end_of_answer is None else end_of_answer
        self.stop_ids = frozenset({self.eos_id, tokenizer.eos_token_id, *other_ends})
        end_of_user = self._first_control_id(self.user_end)
        self.user_stop_ids = self.stop_ids if end_of_user is None else self.stop_ids | {end_of_user}

    def prompt(self, user: str) -> str:
        """The text up to where the assistant's answer begins."""
        return self._render([{"role": "user", "content": user}], generate=True)

    def prompt_ids(self, user: str) -> list[int]:
        """The ids of `prompt(user)`, which has its BOS, if there is to be one, from the template."""
        return self._ids(self.prompt(user))

    def answer_ids(self, answer: str) -> list[int]:
        """The ids of an assistant's answer and its end, as they follow a prompt: without what some tokenizers put before
        a text, such as a space."""
        return [*self._continuation.encode(answer, add_special_tokens=False).ids, self.eos_id]

    @cached_property
    def _continuation(self) -> Tokenizer:
        return continuation_backend(self.tokenizer.backend_tokenizer)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: list[dict[str, str]], generate: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(
                f"chat template of {self.tokenizer.name_or_path}: cannot be rendered ({error}); give another one"
            ) from error

    @property
    def bos_ids(self) -> list[int]:
        """What the tokenizer writes before any text: its BOS, or nothing."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][0] == bos else []

    def _lacks_bos(self) -> bool:
        return bool(self.bos_ids) and self.prompt_ids(MARKERS[0])[:1] != self.bos_ids

    def _around(self, before: list[dict[str, str]], generate: bool) -> tuple[str, str]:
        """The text before and after one more message."""
        marker = MARKERS[0]
        role = "assistant" if before else "user"
        parts = self._render([*before, {"role": role, "content": marker}], generate).split(marker)
        if len(parts) != 2:
            raise UserError(
                f"chat template of {self.tokenizer.name_or_path}: writes the {role}'s text {len(parts) - 1} times, "
                "not once; give another one"
            )
        return parts[0], parts[1]

    def _shared_prefix(self) -> list[int]:
        first, *others = [self.prompt_ids(marker) for marker in MARKERS]
        size = len(self._ids(self.pre_query))
        while any(ids[:size] != first[:size] for ids in others):
            size -= 1
        return first[:size]

    def _first_control_id(self, text: str) -> int | None:
        tokens: dict[int, Any] = self.tokenizer.added_tokens_decoder
        control = {i for i, token in tokens.items() if token.special} | set(self.tokenizer.all_special_ids)
        return next((i for i in self._ids(text) if i in control), None)


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template for plain chat; a tokenizer can carry several, by name."""
    return tokenizer.get_chat_template() if tokenizer.chat_template else None

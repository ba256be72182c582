"""What a target reads of a conversation: its tokenizer's own chat template, applied to messages."""

from __future__ import annotations

from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from cosched.errors import WorkloadError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.workload.prompt_files import Messages


class Chat:
    """A target's tokenizer with its chat template; ``end_tokens`` are where the target stops."""

    def __init__(self, tokenizer: Any, end_tokens: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens

    def ids(self, text: str) -> list[int]:
        """Tokens of a text as it is, without any that mark its beginning or its end."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, messages: Messages, where: str) -> list[int]:
        """Tokens of a conversation, up to where the target is to answer.

        Raises:
            WorkloadError: the target has no chat template, or it refuses the messages.
        """
        return self.ids(self._render(messages, where, ask=True))

    def document(self, messages: Messages, where: str) -> tuple[list[int], list[int]]:
        """Tokens of what comes before the last answer, and of that answer as its target said it.

        The answer's are followed by those that the template puts behind it, up to the one at which
        the target stops, if that is among them.

        Raises:
            WorkloadError: as ``prompt``, or the template changes the question once it is answered.
        """
        last = last_answer(messages, where)
        asked = self._render(messages[:last], where, ask=True)
        whole = self._render(messages[: last + 1], where, ask=False)
        if not whole.startswith(asked):
            raise WorkloadError(
                f"{where}: what the target's chat template asks with is not how it begins the "
                f"answered conversation (it ends in {asked[-40:]!r}), so that this answer cannot "
                f'be forced; give it as {{"text": …}}'
            )
        prompt, ids = self.ids(asked), self.ids(whole)
        joined = ids[: len(prompt)] == prompt  # else a token would reach over into the answer
        answer = ids[len(prompt) :] if joined else self.ids(whole[len(asked) :])
        if not answer:
            raise WorkloadError(f"{where}: nothing is left of its answer in the chat template")
        length = len(self._before_end(answer))
        return prompt, answer[: length + 1]

    def answer(self, tokens: Sequence[int]) -> str:
        """The text of an answer, as a client would send it back in the next turn."""
        return self._tokenizer.decode(
            self._before_end(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _before_end(self, tokens: Sequence[int]) -> list[int]:
        return list(takewhile(lambda token: token not in self._end_tokens, tokens))

    def _render(self, messages: Messages, where: str, ask: bool) -> str:
        if not self._tokenizer.chat_template:
            raise WorkloadError(
                f"{where} is chat, and the tokenizer in {self._tokenizer.name_or_path} has no chat "
                f'template; take a target that was made for chat, give {{"text": …}}, or put the '
                f"template there as chat_template.jinja"
            )
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=ask, tokenize=False
            )
        except (TemplateError, ValueError) as error:
            raise WorkloadError(
                f"{where}: the target's chat template refuses it: {error}"
            ) from error


def last_turns(messages: Messages, number: int, where: str) -> list[Messages]:
    """What each of the last ``number`` questions adds to a conversation, fewer if it has fewer.

    The first has all that was said before it as well, answers included; those that stand between
    the questions are left out, and so is one to the last question.

    Raises:
        WorkloadError: nobody asks anything, or not in the end.
    """
    asked = [index for index, one in enumerate(messages) if one["role"] == "user"]
    if not asked:
        raise WorkloadError(f"{where} has no message of the user's: there is nothing to answer")
    behind = {one["role"] for one in messages[asked[-1] + 1 :]} - {"assistant"}
    if behind:
        raise WorkloadError(
            f"{where} has a message of {behind.pop()!r} behind the last of the user's; expected its "
            f"answer at most"
        )
    asked = asked[-number:]
    between = [messages[before + 1 : at + 1] for before, at in pairwise(asked)]
    turns = [tuple(one for one in part if one["role"] != "assistant") for part in between]
    return [messages[: asked[0] + 1], *turns]


def last_answer(messages: Messages, where: str) -> int:
    """Which message is the last answer; a question that was never answered may follow it.

    Raises:
        WorkloadError: there is none.
    """
    answers = [index for index, one in enumerate(messages) if one["role"] == "assistant"]
    if not answers or not messages[answers[-1]]["content"]:
        raise WorkloadError(f"{where} has no answer of the assistant's: there is nothing to say")
    return answers[-1]

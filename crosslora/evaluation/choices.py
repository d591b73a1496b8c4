"""The harness's client of completions, with one request for all choices of a question whose choices are one token each.

By itself the harness sends every choice in a request of its own, for which an endpoint computes the log-probability of
every token of the prompt.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from lm_eval.models.openai_completions import LocalCompletionsAPI
from openai import BadRequestError

from crosslora.evaluation.client import GREEDY, asked, connect
from crosslora.gate import Completion
from crosslora.progress import progress

TOP = 20
"""Log-probabilities asked for: the most that vLLM gives."""
Request = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation: their texts, and the ids of each."""
Answer = tuple[float, bool]
"""Log-probability of the continuation, and whether it is the likeliest."""


class ChoicesAtOnce(LocalCompletionsAPI):
    """What is not among the likeliest tokens after its context is asked for as the harness does. Written answers also end
    at `stop_ids`."""

    def __init__(self, stop_ids: frozenset[int], **settings: Any) -> None:
        super().__init__(**settings)
        self.stop_ids = sorted(stop_ids)

    def _loglikelihood_tokens(self, requests: list[Request], **kwargs: Any) -> list[Answer]:
        askers = Counter(tuple(context) for _, context, choice in requests if len(choice) == 1)
        shared = [context for context, count in askers.items() if count > 1]
        likeliest = (
            dict(zip(shared, asked(self._address(), self._likeliest(shared)), strict=True)) if shared else {}
        )
        answers = {
            row: answer
            for row, (_, context, choice) in enumerate(requests)
            if (answer := _answer(likeliest.get(tuple(context), {}), choice))
        }
        left = [row for row in range(len(requests)) if row not in answers]
        if left:
            found = super()._loglikelihood_tokens([requests[row] for row in left], **kwargs)
            answers |= zip(left, found, strict=True)
        return [answers[row] for row in range(len(requests))]

    def _create_payload(self, messages: Any, generate: bool = False, **settings: Any) -> dict[str, Any]:
        """Without what tasks say to other kinds of model, and endpoints refuse; and without a base's own penalties."""
        payload = super()._create_payload(messages, generate, **settings)
        known = {name: value for name, value in payload.items() if name in Completion.model_fields}
        return known | GREEDY | ({"stop_token_ids": self.stop_ids} if generate else {})

    def _address(self) -> str:
        return str(self.base_url).removesuffix("/completions")

    async def _likeliest(self, contexts: list[tuple[int, ...]]) -> list[dict[str, float]]:
        """Of each context, the TOP likeliest next tokens ("token_id:17") with their log-probabilities."""
        gate = asyncio.Semaphore(self._concurrent)
        with progress("questions", len(contexts), "questions") as meter:
            async with connect(self._address()) as client:

                async def ask(context: tuple[int, ...]) -> dict[str, float]:
                    async with gate:
                        try:
                            completion = await client.completions.create(
                                model=self.model,
                                prompt=list(context[1 - self.max_length :]),
                                max_tokens=1,
                                temperature=0,
                                logprobs=TOP,
                                extra_body={"return_tokens_as_token_ids": True},
                            )
                        except BadRequestError:  # so many it does not give
                            return {}
                        finally:
                            meter.advance(1)
                    logprobs = completion.choices[0].logprobs
                    return logprobs.top_logprobs[0] if logprobs and logprobs.top_logprobs else {}

                return await asyncio.gather(*map(ask, contexts))


def _answer(likeliest: dict[str, float], choice: list[int]) -> Answer | None:
    """None where `choice` is not among them."""
    logprob = likeliest.get(f"token_id:{choice[0]}") if len(choice) == 1 else None
    return None if logprob is None else (logprob, logprob == max(likeliest.values()))

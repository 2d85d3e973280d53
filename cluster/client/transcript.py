"""What a client has of one request so far, and how it goes on after a router broke. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cluster.client.events import Chunk, Completion, Usage
from cluster.client.requests import typed_error
from cluster.client.resume_budget import ResumeBudget
from cluster.domain.errors import ConfigError
from cluster.domain.request import TokenLogprob
from cluster.v1 import inference_pb2
from cluster.wire import convert
from cluster.wire.status import CallFailure

RESUMES_MAX = 10
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 2.0
JITTER = 0.5  # of a pause, at most, is left out by chance
_WORTH_ANOTHER = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
_FINISH = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_ABORTED: "aborted",
}


def flat_addresses(addresses: Sequence[str | Sequence[str]]) -> tuple[str, ...]:
    """HOST:PORT each, given one by one or in lists; ConfigError when there are lists and nothing in them."""
    lists = ([entry] if isinstance(entry, str) else entry for entry in addresses)
    flat = tuple(address for entry in lists for address in entry)
    if addresses and not flat:
        raise ConfigError("The list of routers is empty; name at least one as HOST:PORT, or give no list at all.")
    return flat


class Transcript:
    """One request over any number of calls.

    ``resumes_max`` bounds the calls beyond the first one in a row without a new token, ``budget`` those in vain of all
    requests that share it; every token is received once, because each call is told those that are here already.
    ``rng`` spreads the pauses.
    """

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        addresses: Sequence[str],
        resumes_max: int = RESUMES_MAX,
        *,
        budget: ResumeBudget | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._request = request
        self._addresses = tuple(addresses)
        self._resumes_max = resumes_max
        self._budget = budget or ResumeBudget()
        self._budget.began()
        self._rng = rng or random.Random(request.request_id)  # noqa: S311 - spreads pauses, keeps no secrets
        self._known = list(request.generated_token_ids)
        self._given = len(self._known)
        self._received = request.received_characters
        self._digest = request.checkpoint_digest  # of what the tokens here were computed with
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._futile = 0  # calls in a row that brought nothing
        self._address = 0
        self.resumes = 0

    @property
    def started(self) -> bool:
        return len(self._known) > self._given

    @property
    def address(self) -> str:
        """The router to ask now."""
        return self._addresses[self._address % len(self._addresses)]

    def next_request(self) -> inference_pb2.GenerateRequest:
        """The request, with every token that is here already."""
        if self.started:
            self._request.checkpoint_digest = self._digest
            del self._request.generated_token_ids[:]
            self._request.generated_token_ids.extend(self._known)
            if self._received or not self._given:  # else nobody knows how much text came before us
                self._request.received_characters = self._received + sum(map(len, self._texts))
        return self._request

    def take(self, chunk: inference_pb2.Chunk) -> Chunk:
        logprobs = tuple(map(convert.logprob_from_message, chunk.logprobs))
        self._futile = 0
        self._digest = self._digest or chunk.checkpoint_digest
        self._known += chunk.token_ids
        self._texts.append(chunk.text)
        self._logprobs += logprobs
        return Chunk(chunk.text, tuple(chunk.token_ids), logprobs, self._digest)

    def finish(self, end: inference_pb2.End) -> Completion:
        token_ids = tuple(self._known[self._given :])
        usage = Usage(
            prompt_tokens=end.usage.prompt_tokens,
            generated_tokens=len(token_ids),
            cached_prompt_tokens=end.usage.cached_prompt_tokens,
            failovers=end.usage.failovers,
            resumes=self.resumes,
            seed=end.usage.seed,
        )
        return Completion(
            text="".join(self._texts),
            token_ids=token_ids,
            logprobs=tuple(self._logprobs),
            finish_reason=_FINISH.get(end.finish_reason, ""),
            usage=usage,
            request_id=self._request.request_id,
        )

    def pause_after_s(self, failure: CallFailure | None) -> float:
        """Seconds to wait before the call after one that broke; raises what it broke with when that is final.

        ``failure`` is None for a stream that ended without its End.
        """
        address = self.address
        code, reason, message, retry_after_s = "UNAVAILABLE", "", "", None
        if failure is not None:
            status, reason, message, retry_after_s = failure
            code = status.name
        pause_s = self.resume_after_s(code, retry_after_s)
        if pause_s is None:
            raise typed_error(code, reason, message, retry_after_s, address, started=self.started)
        return pause_s

    def resume_after_s(self, code: str, retry_after_s: float | None) -> float | None:
        """Seconds to wait before the next call, on the next router; None when the error is final.

        UNAVAILABLE is worth another call; so is RESOURCE_EXHAUSTED for a request that has started: what it has would
        be lost. One that has not started is tried once on each router.
        """
        self._futile += 1
        limit = self._resumes_max if self.started else len(self._addresses) - 1
        if code not in (_WORTH_ANOTHER if self.started else _WORTH_ANOTHER[:1]) or self._futile > limit:
            return None
        if self._futile > 1 and not self._budget.spend():
            return None
        self._address += 1
        self.resumes += 1
        if self._futile < len(self._addresses):
            return 0.0  # another router is right there
        pause_s = min(retry_after_s or BACKOFF_FIRST_S * 2 ** (self._futile - 1), BACKOFF_MAX_S)
        return pause_s * (1.0 - JITTER * self._rng.random())

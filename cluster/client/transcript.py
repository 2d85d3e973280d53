"""What a client has of one request so far, and how it goes on after a router broke. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cluster.client.address_memory import AddressMemory
from cluster.client.events import Chunk, Completion, Usage
from cluster.client.requests import typed_error
from cluster.client.resume_budget import ResumeBudget
from cluster.domain.errors import ConfigError
from cluster.domain.request import TokenLogprob
from cluster.v1 import inference_pb2
from cluster.wire import convert
from cluster.wire.status import CallFailure

# The pauses before so many calls cover 13 to 26 s: a router's pod that starts again is back by then.
RESUMES_MAX = 10
UNSTARTED_RETRIES_MAX = 3  # within 0.7 s: nobody waits long to hear that no router is there
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
JITTER = 0.5  # of a backoff, at most, is left out by chance, or added to a pause that others ask for
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

    ``resumes_max`` bounds the calls beyond the first one in a row without a new token, ``budget`` the rate of those in
    vain of all requests that share it; ``memory`` knows which addresses are worth a try. Every token is received once,
    because each call is told those that are here already. ``rng`` spreads the pauses.
    """

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        addresses: Sequence[str],
        resumes_max: int = RESUMES_MAX,
        *,
        budget: ResumeBudget | None = None,
        memory: AddressMemory | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._request = request
        self._addresses = tuple(addresses)
        self._resumes_max = resumes_max
        self._budget = budget or ResumeBudget()
        self._memory = memory or AddressMemory()
        self._rng = rng or random.Random(request.request_id)  # noqa: S311 - spreads pauses, keeps no secrets
        self._known = list(request.generated_token_ids)
        self._given = len(self._known)
        self._received = request.received_characters
        self._digest = request.checkpoint_digest  # of what the tokens here were computed with
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._futile = 0  # calls in a row that brought nothing
        self._futile_again = 0  # those of them that left no address untried
        self._tried: set[str] = set()  # by the calls in vain
        self._not_before_s: dict[str, float] = {}  # when an address wants to be asked again
        self._heard = False  # whether the call that runs has brought anything
        self._after = 0  # where the addresses behind the one that was asked last begin
        self.address = self._addresses[0]
        self.resumes = 0

    @property
    def started(self) -> bool:
        return len(self._known) > self._given

    def next_address(self, now_s: float) -> str:
        """The router to ask now, ``address`` from then on: one that no call in vain has tried, if there is one."""
        order = self._addresses[self._after :] + self._addresses[: self._after]
        welcome = [address for address in order if self._is_welcome_at(address, now_s)] or order
        untried = [address for address in welcome if address not in self._tried]
        self.address = self._memory.pick(untried or welcome, now_s)
        self._after = self._addresses.index(self.address) + 1
        self._heard = False
        return self.address

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
        self._hear()
        self._digest = self._digest or chunk.checkpoint_digest
        self._known += chunk.token_ids
        self._texts.append(chunk.text)
        self._logprobs += logprobs
        return Chunk(chunk.text, tuple(chunk.token_ids), logprobs, self._digest)

    def finish(self, end: inference_pb2.End) -> Completion:
        self._hear()
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

    def pause_after_s(self, failure: CallFailure | None, now_s: float) -> float:
        """Seconds to wait before the call after one that broke; raises what it broke with when that is final.

        ``failure`` is None for a stream that ended without its End. UNAVAILABLE is worth another call; so is
        RESOURCE_EXHAUSTED for a request that has started: what it has would be lost. One that has not started is tried
        once on each router, and up to UNSTARTED_RETRIES_MAX times more if nobody has refused it: its router broke, and
        another process or router may have the same address.
        """
        code, reason, message, retry_after_s = "UNAVAILABLE", "", "", None
        if failure is not None:
            status, reason, message, retry_after_s = failure
            code = status.name
        self._memory.failed(self.address, code, reason, now_s)
        if retry_after_s:
            self._not_before_s[self.address] = now_s + retry_after_s
        pause_s = self._pause_s(code, reason, now_s)
        if pause_s is None:
            raise typed_error(code, reason, message, retry_after_s, self.address, started=self.started)
        return pause_s

    def _pause_s(self, code: str, reason: str, now_s: float) -> float | None:
        """Seconds before the next call; None when what the last one ended with is final."""
        self._futile += 1
        self._tried.add(self.address)
        another = any(address not in self._tried and self._is_welcome_at(address, now_s) for address in self._addresses)
        self._futile_again += not another
        if not (self._may_go_on(code) if self.started else self._may_begin_again(code, reason, another=another)):
            return None
        turn_s = 0.0
        if self._futile_again > 1 and not another:
            if self.started:
                turn_s = self._budget.wait_s(now_s)
            elif not self._budget.spend(now_s):
                return None
        self.resumes += 1
        if another or (self._futile == 1 and not self.started):
            return 0.0  # another router is right there, or another process at this address
        chance = JITTER * self._rng.random()
        doublings = (self._futile if self.started else self._futile_again) - 1
        backoff_s = min(BACKOFF_FIRST_S * 2.0**doublings, BACKOFF_MAX_S) * (1.0 - chance)
        welcome_s = min(max(0.0, self._not_before_s.get(address, now_s) - now_s) for address in self._addresses)
        return max(backoff_s, welcome_s * (1.0 + chance)) + turn_s * (1.0 + chance)

    def _may_go_on(self, code: str) -> bool:
        return code in _WORTH_ANOTHER and self._futile <= self._resumes_max

    def _may_begin_again(self, code: str, reason: str, *, another: bool) -> bool:
        again = not reason and self._futile_again <= min(UNSTARTED_RETRIES_MAX, self._resumes_max)
        return code == "UNAVAILABLE" and (another or again)

    def _is_welcome_at(self, address: str, now_s: float) -> bool:
        return self._not_before_s.get(address, now_s) <= now_s

    def _hear(self) -> None:
        """The call brings something: whatever was in vain before it is over."""
        if self._heard:
            return
        self._heard = True
        self._futile = self._futile_again = 0
        self._tried.clear()
        self._memory.answered(self.address)

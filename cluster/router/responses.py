"""What a client gets to see of a request's progress. Pure."""

from __future__ import annotations

from cluster.router.forwarding import Progress
from cluster.v1 import inference_pb2


def response_of(progress: Progress, *, with_ids: bool, digest: str = "") -> inference_pb2.GenerateResponse | None:
    """The message that tells ``progress``, with token ids if asked for; None when there is nothing to tell.

    ``digest``: of what is served, where the client is to hear of it.
    """
    text, token_ids, logprobs = progress
    if not (text or logprobs or (with_ids and token_ids)):
        return None
    response = inference_pb2.GenerateResponse()
    chunk = response.chunk  # filled in place: cheaper than a message that is copied into another
    chunk.text = text
    if with_ids:
        chunk.token_ids.extend(token_ids)
    if digest:
        chunk.checkpoint_digest = digest
    if logprobs:
        chunk.logprobs.extend(logprobs)
    return response

"""Tells what the ledger, or an end that comes with the whole answer, has of a job by the events that a client would have heard.

So whoever tells an answer hears its text in tokens and then its end, however late it came to hear of the job. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from tether.answers import AnswersSoFar, choices_of
from tether.errors import JobConflict
from tether.messages import JobEnd, JobEvent, JobStarted, JobTokens
from tether.records import ChoiceResult, JobRecord, TokenLogprobs


def story_of(record: JobRecord) -> list[JobEvent]:
    """Return what happened to a job that has ended, as far as the ledger says it: its last start, its answer, its end."""
    events: list[JobEvent] = []
    if record.fingerprint:
        revision, dtype, _ = (*record.fingerprint.split("/"), "", "")[:3]
        worker_id = record.worker_id or ""
        events.append(JobStarted(record.id, record.attempt, worker_id, worker_id, revision, dtype))
    return [*events, *ending_of(end_of(record), AnswersSoFar(record.sampling.n), record.logprobs or ())]


def end_of(record: JobRecord) -> JobEnd:
    """Return the end of a job that the ledger has, with its text; an answer that was not kept is an error."""
    error = record.error
    if record.status == "completed" and record.result is None:
        error = JobConflict("the job has completed, and its answer was not kept").to_info()
    text = record.result if record.status == "completed" else None
    return JobEnd(
        record.id,
        record.status,
        record.attempt,
        record.finish_reason or "error",
        record.usage,
        error,
        text,
        exact=record.exact,
    )


def ending_of(
    end: JobEnd, known: AnswersSoFar, logprobs: Sequence[tuple[TokenLogprobs, ...]] = ()
) -> Iterator[JobEvent]:
    """Yield what an end's text has beyond the answers that are known, as tokens, and then the end, without it.

    Nobody says the ids of these tokens; `logprobs` are those of the whole answers, and count where nothing is known.
    """
    if end.text is None or end.error is not None:
        yield msgspec.structs.replace(end, text=None) if end.text is not None else end
        return
    whole: list[ChoiceResult] = choices_of(end.text, len(known.choices), end.finish_reason)
    for number, (choice, answer) in enumerate(zip(known.choices, whole, strict=False)):
        text, position = answer.text[choice.num_chars :], len(choice.token_ids)
        shown = logprobs[number] if number < len(logprobs) and not choice.num_chars else ()
        if text or shown:
            yield JobTokens(end.job_id, end.attempt, position, (), text, number, shown)
    reasons = tuple(answer.finish_reason for answer in whole) if len(whole) > 1 else ()
    yield msgspec.structs.replace(end, text=None, choices=end.choices or reasons)

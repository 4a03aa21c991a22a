"""The checker of the chaos suite finds what must not be: for each kind of wrong, a history that has it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.chaos.checker import Ledger, Tolerance, check
from tests.chaos.history import Accepted, Asked, Cut, Ended, GaveUp, History, Kind, Named, Refused, Seen, Started, Told

WHOLE = "0 1 2 "
COUNTER = ("", "", "requests", 60, 0)
TOKENS = ("", "", "tokens", 60, 0)


def client(*seen: Seen, kind: Kind = "stream", number: int = 0) -> History:
    return History(number, kind, "north", WHOLE, list(seen))


def good(number: int = 0) -> History:
    """A stream that was cut off after its second token and went on at another gateway."""
    return client(
        Asked(0.0, "one"),
        Accepted(0.1, f"job-{number}"),
        Started(0.2, "worker", 1),
        Told(1.0, "0 ", 2),
        Told(2.0, "1 ", 4),
        Cut(2.5, "reset"),
        Asked(2.6, "two"),
        Started(2.7, "worker", 2),
        Told(3.0, "2 ", 6),
        Ended(3.1, WHOLE, None),
        number=number,
    )


def without(history: History, *places: int) -> History:
    history.seen = [each for place, each in enumerate(history.seen) if place not in places]
    return history


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"job-{number}",
        "tenant_id": "north",
        "status": "completed",
        "error_code": None,
        "result": WHOLE,
        "prompt_tokens": 1,
        "completion_tokens": 3,
        "reserved_tokens": 9,
        "charges": json.dumps([COUNTER, TOKENS]),
        **changes,
    }


def counters(requests: int = 1, tokens: int = 4, reserved: int = 0) -> list[dict[str, Any]]:
    plain = {"tenant_id": "north", "key_id": "", "model": "", "window_seconds": 60, "window_start": 0}
    return [
        {**plain, "unit": "requests", "used": requests, "reserved": 0},
        {**plain, "unit": "tokens", "used": tokens, "reserved": reserved},
    ]


def ledger(*jobs: dict[str, Any], attempts: list[dict[str, Any]] | None = None, **counts: int) -> Ledger:
    found = jobs or (row(),)
    counted = {"requests": len(found), "tokens": 4 * len(found), **counts}
    return Ledger(found, attempts or [], counters(**counted))


def wrongs(history: History, found: Ledger | None = None, tolerance: Tolerance | None = None) -> set[str]:
    return {finding.wrong for finding in check([history], found or ledger(), tolerance or Tolerance())}


def test_a_stream_that_was_cut_and_went_on_is_well() -> None:
    assert check([good(0), good(1)], ledger(row(0), row(1)), Tolerance()) == []


def test_a_job_that_is_not_in_the_store_is_lost() -> None:
    assert "lost" in wrongs(good(), Ledger([], [], []))


def test_a_job_that_a_stream_only_named_may_be_refused_where_the_fault_explains_it() -> None:
    history = client(Named(0.1, "job-0"), Ended(3.0, None, "no_orchestrator"))
    nothing = Ledger([], [], [])
    assert wrongs(history, nothing) == {"refused"}
    assert wrongs(history, nothing, Tolerance(refusals=frozenset({"no_orchestrator"}))) == set()
    history.seen.insert(1, Accepted(0.2, "job-0"))
    assert "lost" in wrongs(history, nothing, Tolerance(refusals=frozenset({"no_orchestrator"})))


def test_a_job_that_a_stream_refused_and_that_runs_is_found() -> None:
    history = client(Named(0.1, "job-0"), Ended(3.0, None, "no_orchestrator"))
    assert wrongs(history, ledger(row(0)), Tolerance(refusals=frozenset({"no_orchestrator"}))) == {"ledger"}


def test_a_job_that_failed_is_lost_unless_the_fault_explains_it() -> None:
    failed = row(status="expired", error_code="deadline_exceeded", result=None)
    history = client(Accepted(0.1, "job-0"), Ended(3.0, None, "deadline_exceeded"))
    assert wrongs(history, ledger(failed)) == {"lost"}
    assert wrongs(history, ledger(failed), Tolerance(ends=frozenset({"deadline_exceeded"}))) == set()


def test_a_token_that_did_not_come_is_missing() -> None:
    assert wrongs(without(good(), 4)) == {"missing"}


def test_tokens_that_did_not_come_at_the_end_are_missing() -> None:
    assert wrongs(without(good(), 8)) == {"missing"}


def test_an_answer_of_no_tokens_at_all_is_missing() -> None:
    assert wrongs(without(good(), 3, 4, 8)) == {"missing"}


def test_a_token_that_came_twice_is_doubled() -> None:
    history = good()
    history.seen.insert(7, Told(2.9, "1 ", 4))
    assert wrongs(history) == {"doubled"}


def test_a_token_that_came_twice_under_ids_of_its_own_is_found() -> None:
    history = good()
    history.seen[8:9] = [Told(3.0, "1 ", 6), Told(3.0, "2 ", 8)]
    assert wrongs(history) == {"text"}


def test_another_text_is_found_in_pieces_in_the_result_and_in_the_store() -> None:
    history = good()
    history.seen[4] = Told(2.0, "7 ", 4)
    assert wrongs(history) == {"text"}
    history = good()
    history.seen[-1] = Ended(3.1, "0 7 2 ", None)
    assert wrongs(history) == {"text"}
    assert wrongs(good(), ledger(row(result="0 7 2 "))) == {"text"}


@pytest.mark.parametrize("kind", ["stream", "chat", "plain", "background"])
def test_a_client_without_an_end_hangs(kind: Kind) -> None:
    assert "hung" in wrongs(client(Accepted(0.1, "job-0"), kind=kind))
    assert "hung" in wrongs(client(Accepted(0.1, "job-0"), GaveUp(120.0), kind=kind))


def test_two_ends_and_what_comes_after_an_end_are_found() -> None:
    history = good()
    history.seen.append(Ended(3.2, None, "worker_lost"))
    assert wrongs(history) == {"ends"}
    history = good()
    history.seen.append(Started(3.2, "worker", 3))
    assert wrongs(history) == {"ends"}


def test_two_attempts_that_completed_a_job_are_two_ends() -> None:
    attempts = [{"job_id": "job-0", "number": number, "status": "completed"} for number in (1, 2)]
    assert wrongs(good(), ledger(attempts=attempts)) == {"ends"}


def test_a_slot_that_nobody_gave_back_is_found() -> None:
    attempts = [{"job_id": "job-0", "number": 1, "status": "running"}]
    assert wrongs(good(), ledger(attempts=attempts)) == {"unended"}


def test_an_accepted_job_without_an_end_in_the_store_is_found() -> None:
    assert wrongs(good(), ledger(row(status="running"), tokens=0, reserved=9)) == {"unended", "ledger"}


@pytest.mark.parametrize("counts", [{"requests": 2}, {"requests": 0}, {"tokens": 3}, {"tokens": 8}, {"reserved": 9}])
def test_a_quota_counter_that_is_off_by_anything_is_found(counts: dict[str, int]) -> None:
    assert wrongs(good(), Ledger([row()], [], counters(**counts))) == {"quota"}


def test_a_counter_that_is_not_there_or_that_no_job_explains_is_found() -> None:
    assert wrongs(good(), Ledger([row()], [], [])) == {"quota"}
    assert wrongs(good(), Ledger([row(charges=None)], [], counters())) == {"quota"}


def test_a_job_that_no_client_was_told_of_is_found() -> None:
    found = ledger(row(0), row(1))
    assert wrongs(good(), found) == {"ledger"}
    assert check([good()], found, Tolerance(), others={"job-1"}) == []


def test_one_client_with_two_jobs_and_two_clients_with_one_are_found() -> None:
    history = good()
    history.seen.insert(7, Accepted(2.7, "job-1"))
    assert wrongs(history, ledger(row(0))) == {"ledger"}
    twice = check([good(), good()], ledger(row(0)), Tolerance())
    assert {finding.wrong for finding in twice} == {"ledger"}


def test_a_client_that_was_told_another_outcome_than_the_store_has_is_found() -> None:
    cancelled = row(status="cancelled", error_code="job_cancelled", result=None)
    assert "ledger" in wrongs(good(), ledger(cancelled), Tolerance(ends=frozenset({"job_cancelled"})))
    history = client(Accepted(0.1, "job-0"), Ended(3.0, None, "worker_lost"))
    assert wrongs(history) == {"ledger"}


def test_a_refusal_has_to_be_explained_by_the_fault_and_to_say_when_to_come_back() -> None:
    def refused(again: str | None) -> History:
        history = good()
        history.seen.insert(1, Refused(0.05, 503, "queue_full", again))
        return history

    full = Tolerance(refusals=frozenset({"queue_full"}))
    assert wrongs(refused("2"), tolerance=full) == set()
    assert wrongs(refused(None), tolerance=full) == {"refused"}
    assert wrongs(refused("2")) == {"refused"}


def test_a_client_that_was_never_accepted_has_to_have_been_refused_for_a_reason() -> None:
    history = client(Asked(0.0, "one"), Ended(0.1, None, "internal_error"))
    assert wrongs(history, Ledger([])) == {"refused"}
    assert wrongs(history, Ledger([]), Tolerance(refusals=frozenset({"internal_error"}))) == set()


def test_the_pause_of_a_fault_is_the_silence_that_it_can_have_caused() -> None:
    history = good()
    assert history.pause_after(2.2, 0.5) == pytest.approx(1.0)
    assert history.pause_after(1.9, 0.05) == pytest.approx(1.0)
    assert history.pause_after(0.5, 0.5) is None, "there was nothing to interrupt yet"
    assert history.pause_after(4.0, 0.5) is None, "it was over"

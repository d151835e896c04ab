"""Futures made of futures: results, failures, and nobody waiting."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from closeup.errors import ModelError, UnavailableError
from closeup.futures import chained, finished, mapped


def test_mapped_converts_the_result_or_passes_the_error_on() -> None:
    assert mapped(finished(3), lambda value: value + 1).result(1) == 4
    first: Future[int] = Future()
    answer = mapped(first, lambda value: value + 1)
    first.set_exception(ModelError("broken"))
    with pytest.raises(ModelError, match="broken"):
        answer.result(1)


def test_mapped_says_that_the_server_ends_when_the_work_was_cancelled() -> None:
    first: Future[int] = Future()
    answer = mapped(first, lambda value: value)
    first.cancel()
    first.set_running_or_notify_cancel()
    with pytest.raises(UnavailableError, match="shutting down"):
        answer.result(1)


class Chain:
    """A chain of two futures under test; `undone` are the values taken back."""

    def __init__(self) -> None:
        self.first: Future[int] = Future()
        self.second: Future[str] = Future()
        self.undone: list[int] = []
        self.answer = chained(self.first, lambda value: self.second, self.undone.append)


def test_chained_answers_with_the_second_when_all_goes_well() -> None:
    chain = Chain()
    chain.first.set_result(7)
    assert not chain.answer.done()
    chain.second.set_result("end")
    assert chain.answer.result(1) == "end"
    assert chain.undone == []


def test_chained_undoes_nothing_when_the_first_fails() -> None:
    chain = Chain()
    chain.first.set_exception(ModelError("no slot"))
    with pytest.raises(ModelError, match="no slot"):
        chain.answer.result(1)
    assert chain.undone == []


def test_chained_undoes_the_first_when_the_second_fails() -> None:
    chain = Chain()
    chain.first.set_result(7)
    chain.second.set_exception(ModelError("no text"))
    with pytest.raises(ModelError, match="no text"):
        chain.answer.result(1)
    assert chain.undone == [7]


def test_chained_undoes_the_first_when_the_second_cannot_start() -> None:
    undone: list[int] = []

    def refuse(value: int) -> Future[str]:
        raise ModelError("no such encoder")

    answer = chained(finished(7), refuse, undone.append)
    with pytest.raises(ModelError, match="no such encoder"):
        answer.result(1)
    assert undone == [7]


def test_chained_undoes_the_first_when_nobody_waits_any_more() -> None:
    chain = Chain()
    chain.first.set_result(7)
    assert chain.answer.cancel()
    chain.second.set_result("end")
    assert chain.undone == [7]


def test_chained_undoes_the_first_when_the_second_is_cancelled() -> None:
    chain = Chain()
    chain.first.set_result(7)
    chain.second.cancel()
    chain.second.set_running_or_notify_cancel()
    with pytest.raises(UnavailableError):
        chain.answer.result(1)
    assert chain.undone == [7]

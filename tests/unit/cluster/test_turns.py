"""Steps whose calls come in any order begin in theirs; a fault ends those that wait."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from kvcluster.cluster.turns import Turns
from kvcluster.errors import RankLost


def test_turns_are_taken_in_order_whoever_comes_first() -> None:
    turns = Turns()
    taken: list[int] = []

    def take(number: int) -> None:
        with turns.turn(number):
            taken.append(number)

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(take, number) for number in (4, 2, 3, 1)]
        for call in calls:
            call.result(timeout=10)

    assert taken == [1, 2, 3, 4]


def test_a_fault_ends_all_that_come_after_it() -> None:
    turns = Turns()
    waits = threading.Event()

    def take(number: int) -> None:
        waits.set()
        with turns.turn(number):
            raise KeyError(number)

    with ThreadPoolExecutor(1) as pool:
        later: Future[None] = pool.submit(take, 2)
        waits.wait(timeout=10)
        with pytest.raises(KeyError):
            take(1)
        with pytest.raises(RankLost, match="call 2 cannot begin"):
            later.result(timeout=10)


def test_a_turn_is_taken_once() -> None:
    turns = Turns()
    with turns.turn(1):
        pass

    with pytest.raises(RankLost, match="call 1 cannot begin: call 2 is due"), turns.turn(1):
        raise AssertionError("a turn that is over")


def test_nobody_waits_for_a_turn_that_does_not_come() -> None:
    turns = Turns()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(turns.turn(7).__enter__)

        turns.end()

        with pytest.raises(RankLost):
            waiting.result(timeout=10)


def test_turns_can_be_ended_while_one_of_them_is_taken() -> None:
    turns = Turns()

    with turns.turn(1):
        turns.end()

    with pytest.raises(RankLost), turns.turn(2):
        raise AssertionError("a turn after the end")

"""Whoever is about to write blocks beside the steps learns when the ranks have zeroed them."""

from tests.fake_engine import FakeCluster


def test_an_idle_ring_is_told_to_zero_what_came_free_when_somebody_waits() -> None:
    fake = FakeCluster()
    fake.submit([1, 2, 3, 4, 5], max_output_tokens=1)
    fake.run()
    done: list[str] = []
    fake.engine.zeroing.flush(lambda: done.append("zeroed"))

    plan = fake.plan()
    before = list(done)
    fake.answer()

    assert plan is not None
    assert not plan.sequences
    assert before == []
    assert done == ["zeroed"]
    assert fake.plan() is None


def test_all_that_is_free_is_told_by_the_step_that_is_waited_for() -> None:
    fake = FakeCluster()
    generation = fake.submit([1, 2, 3, 4, 5], max_output_tokens=3)
    fake.plan()
    fake.answer()
    fake.engine.cancel(generation)
    fake.run()
    done: list[str] = []
    fake.engine.zeroing.flush(lambda: done.append("zeroed"))
    fake.run()

    told = {each for plan in fake.plans for each in plan.zeroed}
    assert done == ["zeroed"]
    assert told
    assert not fake.partitions.take_freed()


def test_who_waits_when_the_ranks_are_lost_waits_no_longer() -> None:
    fake = FakeCluster()
    done: list[str] = []
    fake.engine.zeroing.flush(lambda: done.append("before it was planned"))
    fake.engine.lose_ring("rank 1 is gone")
    fake.engine.restart(2)
    fake.ring.epoch = 2
    fake.engine.zeroing.flush(lambda: done.append("while it ran"))
    assert fake.engine.next_plan() is not None
    fake.engine.lose_ring("rank 1 is gone")

    assert done == ["before it was planned", "while it ran"]

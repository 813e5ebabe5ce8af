"""Work on threads: in order, bounded, shared out, and over when nobody waits for it."""

import threading
import time

import pytest

from spp_fx.parallel import in_order, sharing, thread_count


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(jobs):
    second = threading.Event()

    def first_after_second(item: int) -> int:
        if item == 0 and jobs > 1:
            assert second.wait(600)
        if item == 1:
            second.set()
        return item * item

    assert list(in_order(first_after_second, range(20), jobs)) == [item * item for item in range(20)]


def test_no_more_than_asked_run_ahead_of_the_one_who_takes_results():
    begun: list[int] = []
    results = in_order(begun.append, range(1000), jobs=2, ahead=3)
    next(results)
    time.sleep(0.05)
    assert len(begun) <= 5
    results.close()
    assert len(begun) <= 5


def test_a_job_sees_its_share_of_the_threads():
    with sharing(8):
        assert list(in_order(lambda _: thread_count(), range(2), jobs=4)) == [2, 2]
        assert list(in_order(lambda _: thread_count(), range(2), jobs=1)) == [8, 8]
        assert thread_count() == 8


def test_the_first_error_ends_it_and_what_runs_within_other_jobs():
    steps: list[int] = []
    going = threading.Event()

    def within(step: int) -> None:
        steps.append(step)
        going.set()
        time.sleep(0.01)

    def job(item: int) -> None:
        if item == 0:
            assert going.wait(600)
            raise ValueError("no")
        for _ in in_order(within, range(10_000)):
            pass

    with pytest.raises(ValueError, match="no"):
        list(in_order(job, range(2), jobs=2))
    assert 0 < len(steps) < 10_000
    done = len(steps)
    time.sleep(0.05)
    assert len(steps) == done

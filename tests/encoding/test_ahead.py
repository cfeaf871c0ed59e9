"""Work ahead of time: in order, errors in their turn, no further ahead than said, and nothing runs afterwards."""

import threading
import time

import pytest

from metaembed.encoding.ahead import ahead


def running():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers):
    def slow_at_first(number):
        time.sleep(0.02 if number < 3 else 0)
        return number * number

    with ahead(slow_at_first, range(20), workers) as results:
        assert list(results) == [number * number for number in range(20)]
    with ahead(slow_at_first, [], workers) as results:
        assert list(results) == []


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_no_more_is_taken_than_the_workers_need(workers):
    taken = []
    with ahead(lambda number: number, (taken.append(number) or number for number in range(50)), workers) as results:
        assert taken == []
        for number in results:
            assert len(taken) <= number + 1 + workers
            if number == 9:
                break
    assert len(taken) <= 10 + workers


def test_threads_work_while_the_caller_does():
    second = threading.Event()
    with ahead(lambda number: number == 1 and second.set(), range(3), 1) as results:
        next(results)
        assert second.wait(10)


def test_one_item_alone_starts_no_thread():
    with ahead(lambda _: threading.current_thread(), [1], 2) as results:
        assert list(results) == [threading.main_thread()] and not running()


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("where", ["function", "items"])
def test_an_error_comes_in_its_turn_and_nothing_runs_on(workers, where):
    done, got = [], []

    def items():
        for number in range(30):
            if where == "items" and number == 5:
                raise ValueError("item 5 is bad")
            yield number

    def work(number):
        if where == "function" and number == 5:
            raise ValueError("item 5 is bad")
        done.append(number)
        return number

    with pytest.raises(ValueError, match="item 5 is bad"), ahead(work, items(), workers) as results:
        for number in results:
            got.append(number)
    assert got == [0, 1, 2, 3, 4] and not running()
    assert max(done) <= 5 + workers


def test_an_interrupt_waits_only_for_what_is_being_done():
    begun, stop, done = threading.Event(), threading.Event(), []

    def work(number):
        if number:
            begun.set()
            assert stop.wait(10)  # it is told to end
        done.append(number)

    with pytest.raises(KeyboardInterrupt), ahead(work, range(30), 1, stop) as results:
        next(results)
        assert begun.wait(10)
        raise KeyboardInterrupt
    assert done == [0, 1] and not running()

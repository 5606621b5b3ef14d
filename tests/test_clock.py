"""Clock: what a stage of the device took, whenever the threads that watch it wake up."""

import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import jax
import jax.numpy as jnp
import pytest

from cacheclip_jax.clock import Clock


@pytest.fixture
def asleep():
    """A pool whose only thread does nothing yet, and the event that wakes it up."""
    wake = Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(wake.wait)
        yield pool, wake
        wake.set()


def test_stages_follow_each_other_also_where_no_thread_has_woken_up(asleep):
    clock = Clock(asleep[0])
    first = jax.jit(lambda x: x @ x)(jnp.ones((64, 64)))
    clock.watch("score", first)
    clock.watch("select", first + 1, "score")
    clock.watch("recompute", first + 2, "select")
    total, stages = clock.stop(), clock.stages()
    assert list(stages) == ["score", "select", "recompute"] and all(seconds > 0 for seconds in stages.values())
    assert sum(stages.values()) <= total


def test_a_thread_that_wakes_up_late_changes_no_stage(asleep):
    pool, wake = asleep
    clock = Clock(pool)
    clock.watch("score", jnp.ones(4) + 1)
    clock.stop()
    before = clock.stages()
    wake.set()
    pool.submit(lambda: None).result()
    assert clock.stages() == before


def test_a_later_stage_seen_first_doesnt_begin_after_it(asleep):
    """The thread of the stage before is still asleep when another sees the later one."""
    clock = Clock(asleep[0])
    clock.watch("select", jnp.ones(4) + 1)
    with ThreadPoolExecutor(1) as awake:
        clock._pool = awake
        clock.watch("recompute", jnp.ones(4) + 2, "select")
    clock.stop()
    assert clock.stages()["recompute"] > 0


def test_the_thread_that_saw_an_array_first_counts():
    class Array:
        """There at once for one thread; another hears of it when `told`."""
        told, asked = Event(), Event()

        def block_until_ready(self):
            if not self.asked.is_set():
                self.asked.set()
                self.told.wait()

    array = Array()
    with ThreadPoolExecutor(1) as pool:
        clock = Clock(pool)
        clock.watch("score", array)
        array.asked.wait()
        clock.stop()
        before = clock.stages()
        array.told.set()
    assert clock.stages() == before


@pytest.mark.parametrize("since", ["given", "nowhere", None])
def test_what_isnt_watched_counts_from_a_time_given_or_the_clocks_start(since):
    with ThreadPoolExecutor(1) as pool:
        clock = Clock(pool)
        time.sleep(0.02)
        clock.watch("load", jnp.ones(4) + 1, time.perf_counter() if since == "given" else since)
        total = clock.stop()
    assert clock.stages()["load"] <= total - (0.02 if since == "given" else 0)
    assert since == "given" or clock.stages()["load"] >= 0.02


def test_an_array_is_let_go_once_it_is_there():
    with ThreadPoolExecutor(1) as pool:
        clock, array = Clock(pool), jnp.ones(4) + 1
        clock.watch("load", array)
        clock.stop()
    gone = weakref.ref(array)
    del array
    assert gone() is None


def test_the_last_watch_of_a_stage_counts():
    with ThreadPoolExecutor(1) as pool:
        clock = Clock(pool)
        clock.watch("score", jnp.ones(4) + 1)
        time.sleep(0.02)
        clock.watch("score", jnp.ones(4) + 2)
        clock.stop()
    assert clock.stages()["score"] >= 0.02

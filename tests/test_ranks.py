"""Contract: the processes that tests of several ranks run on tell what went wrong, and later calls work.

1. A rank that does not end in time is told with where it stands; so is one whose process ended, with its exit code.
2. An error on one rank ends the call on all of them with that rank's traceback.
"""

from __future__ import annotations

import os
import time

import pytest

from experiments.ranks import RankError, Ranks


def number(rank, world):
    return rank + 10 * world


def wait_forever(rank, world):
    while rank == 1:
        time.sleep(0.1)


def leave(rank, world):
    if rank == 1:
        os._exit(3)


def fail(rank, world):
    if rank == 1:
        raise ValueError("of one alone")


def test_what_went_wrong_is_told_and_later_calls_work(ranks):
    """The fixture is asked for because it skips where there can be no ranks."""
    with Ranks(2, within=120) as ranks:
        assert ranks.call(number) == [20, 21]
        with pytest.raises(RankError, match=r"(?s)Traceback.*fail.*of one alone"):
            ranks.call(fail)
        assert ranks.call(number) == [20, 21]
        ranks.within = 2
        with pytest.raises(RankError, match=r"(?s)test_ranks\.wait_forever: no answer in 2 s.*rank 1.*in wait_forever"):
            ranks.call(wait_forever)
        ranks.within = 120
        with pytest.raises(RankError, match=r"(?s)test_ranks\.leave: ended.*rank 1, exit code 3"):
            ranks.call(leave)
        assert ranks.call(number) == [20, 21]
        ranks.processes[0].kill()  # between calls, as for want of memory
        ranks.processes[0].join()
        assert ranks.call(number) == [20, 21]
    assert not any(process.is_alive() for process in ranks.processes)

"""Faults, each a few times: the long run of the same is eval/fault_store.py."""

import pytest

from eval import fault_store as script


@pytest.mark.parametrize(
    "fault, times",
    [
        (script.kills, 12),
        (script.flips, 40),
        (script.full_disks, 2),
        (script.io_errors, 80),
        (script.clock_jumps, 20),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_nothing_committed_is_lost_and_nothing_corrupt_served(fault, times, tmp_path):
    found = fault(tmp_path, times, seed=1)
    assert script.ok(found), found


def test_a_torn_file_is_detected_and_healed(tmp_path):
    assert script.ok(found := script.flips(tmp_path, 20, seed=1, torn=True)), found

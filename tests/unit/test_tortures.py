"""What the tortures compare."""

import dataclasses

import pytest

from scripts.tortures.long import Sample, grown

EARLY = Sample(step=1000, memory=1000, files=78, threads=30, shared=10)


@pytest.mark.parametrize(
    ("changed", "seconds", "found"),
    [
        ({}, [1.0, 1.0], []),
        ({"memory": 1050, "files": 77}, [1.0, 1.05], []),
        ({"memory": 1051}, [1.0, 1.0], ["memory"]),
        ({}, [1.0, 1.06], ["the time of a step"]),
        ({"files": 79}, [1.0, 1.0], ["open files"]),
        ({"threads": 31}, [1.0, 1.0], ["threads"]),
        ({"shared": 11, "memory": 2000}, [1.0, 1.0], ["memory", "shared memory"]),
    ],
)
def test_a_long_run_tells_what_has_grown(changed: dict[str, int], seconds: list[float], found: list[str]) -> None:
    """The short run of the tests is too short for the bounds of the long one."""
    assert grown(EARLY, dataclasses.replace(EARLY, **changed), seconds, 0.05) == found

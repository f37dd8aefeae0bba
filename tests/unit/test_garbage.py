"""What a process has loaded before it serves is not searched for garbage; what comes later is."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import gc, sys, weakref
from kvcluster.garbage import exempt_living

class Node:
    def __init__(self):
        self.itself = self

before = weakref.ref(dropped := Node())
del dropped
lives = [Node() for _ in range(1000)]
if sys.argv[1] == "on":
    exempt_living()
after = weakref.ref(dropped := Node())
del dropped
num_visited = len(gc.get_objects())
gc.collect()
print(before() is None, after() is None, num_visited > 1000, len(lives))
"""


def printed(switch: str, folder: Path) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, switch]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return run.stdout.split()


def test_what_lives_is_not_visited_and_garbage_before_and_after_is_found(tmp_path: Path) -> None:
    assert printed("on", tmp_path) == ["True", "True", "False", "1000"]


def test_without_it_all_that_lives_is_visited(tmp_path: Path) -> None:
    assert printed("off", tmp_path) == ["True", "True", "True", "1000"]

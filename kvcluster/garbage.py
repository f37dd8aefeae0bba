"""Python's search for garbage passes over what a process has loaded before it serves.

A process with torch and a model in it has half a million objects that live as long as it does. The
search visits all of them now and then, which holds up everything for a quarter of a second: a step,
and every stream that waits for it.
"""

import atexit
import gc


def exempt_living() -> None:
    """What lives now is not looked at any more. For a process that is warm and about to serve.

    Nothing is kept alive by that, but of what is dropped later, cycles stay. Whatever holds much
    memory and does not live as long as the process must not be in one."""
    gc.collect()
    gc.freeze()
    # Libraries that count what is left of theirs at the end would report all of it as leaked.
    atexit.register(gc.unfreeze)

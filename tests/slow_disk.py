"""train.py on a disk that takes its time: long enough that a test can kill the run while a checkpoint is being written.

Seconds per fsync of a checkpoint: OPEN_FLAMINGO_TEST_FSYNC, or 0.2.
"""

import os
import threading
import time

from open_flamingo.train.train import main

fsync = os.fsync


def slow_fsync(descriptor: int) -> None:
    if threading.current_thread().name.startswith("checkpoint"):
        time.sleep(float(os.environ.get("OPEN_FLAMINGO_TEST_FSYNC", "0.2")))
    fsync(descriptor)


if __name__ == "__main__":
    os.fsync = slow_fsync
    main()

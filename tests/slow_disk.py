"""train.py on a disk that takes its time: long enough that a test can kill the run while a checkpoint is being written."""

import os
import time

from open_flamingo.train.train import main

fsync = os.fsync


def slow_fsync(descriptor: int) -> None:
    time.sleep(0.2)
    fsync(descriptor)


if __name__ == "__main__":
    os.fsync = slow_fsync
    main()

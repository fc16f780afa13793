"""`python -m benchmarks <what>`: this program beside the reference. `python -m benchmarks <what> --help` says more."""

from benchmarks.command import main

if __name__ == "__main__":
    main()

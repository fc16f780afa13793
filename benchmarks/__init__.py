"""Speed and memory beside the reference: `python -m benchmarks --help`. Results: docs/performance.md."""

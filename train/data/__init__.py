"""Shards → lanes → samples → batches: see `loader.build_loader`. Imports nothing: flags are checked (`shards`) before torch is loaded."""

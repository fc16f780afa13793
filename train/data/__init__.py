"""Shards → lanes → samples → batches. `loader.build_loader` is the way in.

Nothing is imported here: flags are checked by `shards.check_shards`, before torch and webdataset are loaded.
"""

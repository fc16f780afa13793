"""Few-shot scores of a checkpoint, as the OpenFlamingo paper measures them (arXiv 2308.01390, section 4)."""

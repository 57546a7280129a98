"""Data set rows to packed batches: sources -> decode -> slicing -> patches -> chat -> encode -> packing -> loader."""

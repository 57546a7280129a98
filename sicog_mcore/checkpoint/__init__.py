"""Checkpoints: what is saved (store.py), how it is committed and verified (commit.py), random states (rng.py)."""

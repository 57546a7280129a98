"""Candidates from a checkpoint, sharded and resumable. Start: generate.py."""

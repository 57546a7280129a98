"""Benchmarks, judgements, intervals. Start: evaluate.py."""

"""Benchmarks, judgements, intervals. Start: judging.py."""

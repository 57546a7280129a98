"""Answers drawn from a model: engines, KV cache, sampling, and the proof that an engine computes what training computes."""

"""sicog_mcore: Megatron-Core training of multimodal LLMs that improve themselves (SICOG, arXiv 2503.12303).

The flow, one file per arrow:  Sample -> SlicePlan -> EncodedSample -> PackedBatch -> (loss_sum, count)

Shape legend, used in every comment and docstring:
    b microbatch, s sequence, t packed tokens, h decoder hidden, n heads, g key/value groups, d head dim, v vocabulary,
    k slices, p packed patches, c tower width, q queries per slice, m visual tokens in a batch.
Sizes are always (height, width).
"""

__version__ = "0.1.0"

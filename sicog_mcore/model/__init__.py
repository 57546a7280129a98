"""The multimodal model: vision tower, resampler and decoder on Megatron-Core modules. Process groups are passed in."""

"""Everything that knows about ranks: the only package that may import torch.distributed or parallel_state."""

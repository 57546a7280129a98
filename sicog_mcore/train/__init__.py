"""The training loop: one step, the schedule, what is measured and shown, and the order of it all.

In: Experiment, PackedBatches   Out: checkpoints, metrics.jsonl, TensorBoard files   Start reading at trainer.py
"""

"""SICOG stage 1.5, multimodal pre-training: every part of the model is trained.

torchrun --nproc-per-node 2 launch/pretrain_stage15.py --config examples/demo.yaml --parallel.tensor 2
The same command resumes an interrupted run.
"""

import os
import sys

from sicog_mcore.cli import load_experiment
from sicog_mcore.errors import SicogError


def main() -> int:
    """Reads and checks the configuration before anything heavy is imported, then trains."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    per_node = os.environ.get("LOCAL_WORLD_SIZE")
    starter = f"torchrun --nproc-per-node {per_node}" if per_node else "python"
    try:
        experiment = load_experiment(sys.argv[1:], world_size)
        from sicog_mcore.train.run import run  # needs seconds to import

        run(experiment, " ".join([starter, *sys.argv]))
    except SicogError as error:
        if rank == 0 or not error.same_on_all_ranks:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

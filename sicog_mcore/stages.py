"""SICOG's training stages: what each fixes on top of a preset. Learning rates and batch sizes stand in examples/.

In: the name of a stage   Out: values by dotted path   Next: launcher.py puts them between preset and YAML
Rule: arXiv 2503.12303; stage 1 trains the resampler on overviews, all other stages train every part on slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

StageDefaults = Mapping[str, Any]

PERCEPTION: StageDefaults = MappingProxyType({"output": "runs/stage0_perception"})
REASONING: StageDefaults = MappingProxyType({"output": "runs/stage0_reasoning"})
ALIGN: StageDefaults = MappingProxyType(
    {
        "output": "runs/stage1",
        "optim.freeze": ("tower", "decoder"),
        "model.slicing.overview_only": True,
        "train.samples_per_step": 256,
    }
)
PRETRAIN: StageDefaults = MappingProxyType({"output": "runs/stage15"})
FINETUNE: StageDefaults = MappingProxyType({"output": "runs/stage2"})
DPO: StageDefaults = MappingProxyType({"output": "runs/dpo", "objective": "dpo"})

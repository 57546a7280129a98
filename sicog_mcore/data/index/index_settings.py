"""Settings decide the numbers of an index beside the rows: other settings have an index of their own.

In: Experiment   Out: IndexSettings   Next: index_store.py
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sicog_mcore.config import Experiment
from sicog_mcore.data.chat import TEMPLATES
from sicog_mcore.data.fingerprint import tokenizer_digest
from sicog_mcore.data.pairs import build_pair
from sicog_mcore.data.rows import BuildSample, build_sample
from sicog_mcore.files import hash_json

FORMAT = 2  # goes up when what an index holds, or how it is measured, changes
FOLDER = "index"  # in a run's output folder, unless data.index names another


@dataclass(frozen=True)
class IndexSettings:
    """The settings that an index was made with.

    Attributes:
        values: by name, as JSON has them.
        digest: hash of the values; name of the folder that holds the index.
    """

    values: dict[str, Any]
    digest: str

    @classmethod
    def of(cls, experiment: Experiment) -> IndexSettings:
        """Raises OSError if the tokenizer's file cannot be read."""
        data, model = experiment.data, experiment.model
        values = {
            "format": FORMAT,
            "tokenizer": tokenizer_digest(data.tokenizer),
            "template": data.template,
            "system_prompt": data.system_prompt if TEMPLATES[data.template].names_roles else "",
            "slicing": asdict(model.slicing),
            "query_grid": model.resampler.query_grid,
            "patch_px": model.tower.patch_px,
            "token_budget": data.token_budget,
            "slice_budget": data.slice_budget,
            "too_long": data.too_long,
            "max_image_px": data.max_image_px,
            "max_aspect": data.max_aspect,
            "rows": "pairs" if experiment.objective == "dpo" else "conversations",
        }
        return cls(values, hash_json(values))


def index_folder(experiment: Experiment) -> Path:
    """The folder of the index: ``data.index``, or one in the run's output folder."""
    return Path(experiment.data.index or Path(experiment.output) / FOLDER)


def build_function(experiment: Experiment) -> BuildSample:
    """Chooses the function that builds a sample from a row in this run."""
    return build_pair if experiment.objective == "dpo" else build_sample

"""Our model against transformers: the same random tokens and patches through both, and the largest difference.

In: chunks of a model, a folder that transformers loads   Out: WeightComparison   Used by: weight_steps.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sicog_mcore.commands.weight_options import ExportedPart
from sicog_mcore.config import ModelPart
from sicog_mcore.data.batch import EncodedSample
from sicog_mcore.data.collate import collate
from sicog_mcore.model.attention import packed_sequences
from sicog_mcore.model.vlm import VisionLanguageModel

TOKENS, SEED = 64, 0  # of the batch that is compared
# Largest difference, relative to the largest value: rounding in fp32, and in bf16 over many layers.
TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class WeightComparison:
    """How far our outputs are from those of transformers.

    Attributes:
        difference: largest absolute one.
        relative: the same, as a share of the largest absolute output.
        dtype: of the weights.
    """

    what: ModelPart | ExportedPart
    path: Path
    difference: float
    relative: float
    dtype: torch.dtype

    @property
    def is_good(self) -> bool:
        """Whether rounding explains the difference; false for NaN."""
        return self.relative <= TOLERANCES[self.dtype]

    def lines(self) -> tuple[str, str]:
        """Returns the numbers and the verdict."""
        kind = "features" if self.what == "tower" else "logits"
        numbers = f"largest difference {self.difference:.3g} ({self.relative:.3g} of the largest)"
        verdict = "verified" if self.is_good else f"DIFFERS, more than {TOLERANCES[self.dtype]:g} of the largest"
        return f"{self.what}: {kind} of {self.path} in {self.dtype}: {numbers}", f"{self.what}: {verdict}"


@torch.no_grad()
def compare_weights(
    chunks: Sequence[VisionLanguageModel], what: ModelPart | ExportedPart, path: Path
) -> WeightComparison:
    """Compares a whole model on one rank with the folder at ``path``, on a seeded batch."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    compare = {"decoder": compare_decoder, "tower": compare_tower, "vlm": compare_model}[what]
    ours, theirs = compare(chunks[0], path)
    difference = float((ours - theirs).abs().max())
    relative = difference / float(theirs.abs().max())
    return WeightComparison(what, path, difference, relative, chunks[0].config.params_dtype)


def compare_decoder(chunk: VisionLanguageModel, path: Path) -> tuple[Tensor, Tensor]:
    """Returns our logits [t, v] of random tokens, and those of the causal language model in a folder."""
    from transformers import AutoModelForCausalLM

    decoder, vocab = chunk.language_model, chunk.model_config.decoder.vocab_size
    tokens = torch.randint(vocab, (TOKENS,), generator=torch.Generator().manual_seed(SEED))
    positions = torch.arange(TOKENS)
    borders = packed_sequences(torch.tensor([0, TOKENS], dtype=torch.int32), TOKENS)
    hidden = decoder(decoder.embedding(tokens[None], positions[None]), positions, borders)
    ours = decoder.project(hidden, positions)[:, 0, :vocab]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=ours.dtype).eval()
    return ours.float(), model(tokens[None]).logits[0].float()


def compare_tower(chunk: VisionLanguageModel, path: Path) -> tuple[Tensor, Tensor]:
    """Returns our features [p, c] of slices of three grids, and those of the CLIP in a folder."""
    from transformers import CLIPVisionModel

    assert chunk.tower is not None, "one rank has the tower"
    tower, config = chunk.tower, chunk.model_config.tower
    side = config.grid
    grids = [(side, side), (max(1, side - 2), side + 1), (side, max(1, side // 2))]
    patches = _random_patches(grids, config.patch_dim)
    ours = tower(torch.cat(patches), torch.tensor(grids))
    model = CLIPVisionModel.from_pretrained(path, dtype=ours.dtype).eval()
    theirs = []
    for rows, (height, width) in zip(patches, grids, strict=True):
        pixels = _image(rows, height, width, config.patch_px).to(ours.dtype)
        outputs = model(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
        theirs.append(outputs.hidden_states[config.layers_used][0, 1:])
    return ours.float(), torch.cat(theirs).float()


def compare_model(chunk: VisionLanguageModel, path: Path) -> tuple[Tensor, Tensor]:
    """Returns our logits [t, v] of random tokens around two slices, and those of the exported model in a folder."""
    from sicog_mcore.hf import SicogForConditionalGeneration

    model_config = chunk.model_config
    grids, queries, vocab = [(3, 5), (4, 4)], model_config.resampler.queries, model_config.decoder.vocab_size
    visual = len(grids) * queries
    tokens = torch.randint(vocab, (TOKENS + visual,), generator=torch.Generator().manual_seed(SEED))
    sample = EncodedSample(
        id="verify",
        tokens=tokens,
        labels=torch.full_like(tokens, -100),
        patches=torch.cat(_random_patches(grids, model_config.tower.patch_dim)),
        grids=torch.tensor(grids),
        image_slots=torch.arange(visual) + TOKENS // 2,
        visual_rows=torch.arange(visual),
        num_images=1,
    )
    patch_dim = model_config.tower.patch_dim
    batch = collate([sample], token_budget=len(tokens), pad_id=0, queries=queries, patch_dim=patch_dim)
    hidden = chunk.hidden_states(batch)
    ours = chunk.language_model.project(hidden, torch.arange(len(tokens)))[:, 0, :vocab]
    rows = torch.full_like(tokens, -1).index_copy(0, sample.image_slots, sample.visual_rows)
    model = SicogForConditionalGeneration.from_pretrained(path, dtype=ours.dtype).eval()
    theirs = model(tokens[None], visual_rows=rows[None], patches=sample.patches, grids=sample.grids).logits[0]
    return ours.float(), theirs.float()


def _random_patches(grids: Sequence[tuple[int, int]], patch_dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(0, 256, (h * w, patch_dim), generator=generator, dtype=torch.uint8) for h, w in grids]


def _image(rows: Tensor, height: int, width: int, side: int) -> Tensor:
    """Patch rows of one slice as the normalised image [1, 3, height * side, width * side] that CLIP takes."""
    from sicog_mcore.model.vision_tower import CLIP_MEAN, CLIP_STD

    mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    image = rows.reshape(height, width, 3, side, side).permute(2, 0, 3, 1, 4).reshape(3, height * side, width * side)
    return ((image / 255 - mean) / std)[None]

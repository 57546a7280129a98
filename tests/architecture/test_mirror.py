"""Every module has tests: a mirror file under tests/, or a line in one table that names the tests which cover it.

A line of the table must be needed and true: the module exists and has no mirror, the test file exists, and it imports the
module or names its file. For a verb its script in tools/ or launch/ counts as well, which does nothing but start it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.architecture.source import ROOT, imports, python_files

PACKAGES = ("sicog_mcore", "kernels/sicog_kernels")
TESTS = Path("tests")
VERBS, SCRIPTS = Path("sicog_mcore/commands"), ("tools", "launch")

# Modules without a mirror file, and the test files (below tests/) that cover them. One module a line, in order.
COVERED_BY: Mapping[str, tuple[str, ...]] = {
    "sicog_mcore/__main__.py": ("commands/test_front.py",),
    "sicog_mcore/build.py": ("checkpoint/test_weights.py", "parallel/test_ddp.py"),
    "sicog_mcore/checkpoint/hf_folder.py": ("checkpoint/test_hf_config.py",),
    "sicog_mcore/checkpoint/hf_keys.py": ("checkpoint/test_hf_config.py",),
    "sicog_mcore/checkpoint/part_writer.py": ("checkpoint/test_part_reader.py",),
    "sicog_mcore/checkpoint/targets.py": ("checkpoint/test_tables.py", "checkpoint/test_layer_kinds.py"),
    "sicog_mcore/checkpoint/trusted_files.py": ("checkpoint/test_hostile.py",),
    "sicog_mcore/cognition/annotation/annotated_rows.py": ("cognition/annotation/test_annotator.py",),
    "sicog_mcore/cognition/annotation/endpoint.py": ("cognition/annotation/test_annotator.py",),
    "sicog_mcore/cognition/annotation/ledger.py": ("cognition/annotation/test_annotator.py",),
    "sicog_mcore/cognition/answer_cues.py": ("cognition/test_answer_grammar.py",),
    "sicog_mcore/cognition/curation/conversations.py": ("cognition/curation/test_curated_round.py",),
    "sicog_mcore/cognition/curation/datasets.py": ("cognition/curation/test_curated_round.py",),
    "sicog_mcore/cognition/curation/funnel.py": ("cognition/curation/test_curated_round.py",),
    "sicog_mcore/cognition/curation/selection.py": ("cognition/curation/test_curated_round.py",),
    "sicog_mcore/cognition/evaluation/cells.py": ("cognition/evaluation/test_benchmark.py",),
    "sicog_mcore/cognition/generation/cost_estimate.py": ("cognition/generation/test_generate.py",),
    "sicog_mcore/cognition/generation/items.py": ("cognition/generation/test_generate.py",),
    "sicog_mcore/cognition/generation/options.py": ("cognition/generation/test_generate.py",),
    "sicog_mcore/cognition/generation/record_parts.py": ("cognition/generation/test_generate.py",),
    "sicog_mcore/cognition/item_keys.py": ("cognition/generation/test_generate.py",),
    "sicog_mcore/cognition/loop/loop_config.py": ("cognition/loop/test_workflow.py",),
    "sicog_mcore/cognition/loop/loop_console.py": ("cognition/loop/test_steps.py",),
    "sicog_mcore/cognition/loop/runner.py": ("cognition/loop/test_steps.py",),
    "sicog_mcore/cognition/scoring/encoders.py": ("cognition/scoring/test_embed.py",),
    "sicog_mcore/cognition/step_options.py": ("cognition/loop/test_workflow.py", "tools/test_curate.py"),
    "sicog_mcore/commands/candidates.py": ("e2e/test_generate.py",),
    "sicog_mcore/commands/check_conformance.py": ("tools/test_check_conformance.py",),
    "sicog_mcore/commands/convert.py": ("tools/test_convert.py", "commands/test_tool_options.py"),
    "sicog_mcore/commands/curate.py": ("tools/test_curate.py",),
    "sicog_mcore/commands/demo_data.py": ("tools/test_prepare_demo_data.py",),
    "sicog_mcore/commands/device_speed.py": ("tools/test_gpu_report.py",),
    "sicog_mcore/commands/doctor.py": ("tools/test_doctor.py",),
    "sicog_mcore/commands/evaluate.py": ("tools/test_evaluate.py",),
    "sicog_mcore/commands/gguf_folder.py": ("tools/test_import_gguf.py",),
    "sicog_mcore/commands/gpu_report.py": ("tools/test_gpu_report.py",),
    "sicog_mcore/commands/import_gguf.py": ("tools/test_import_gguf.py",),
    "sicog_mcore/commands/join_records.py": ("tools/test_join_records.py",),
    "sicog_mcore/commands/loop_demo_data.py": ("tools/test_prepare_loop_demo.py",),
    "sicog_mcore/commands/report.py": ("tools/test_report.py",),
    "sicog_mcore/commands/score.py": ("tools/test_score.py",),
    "sicog_mcore/commands/train_stage.py": ("cognition/loop/test_workflow.py",),
    "sicog_mcore/commands/weight_options.py": ("commands/test_tool_options.py", "commands/test_weight_steps.py"),
    "sicog_mcore/commands/weight_parity.py": ("commands/test_weight_steps.py",),
    "sicog_mcore/config.py": ("test_cli.py", "test_validation.py"),
    "sicog_mcore/data/batch.py": ("data/test_encode.py", "data/test_packing.py"),
    "sicog_mcore/data/collate.py": ("data/test_encode.py", "data/test_packing.py"),
    "sicog_mcore/data/fingerprint.py": ("data/test_resume.py",),
    "sicog_mcore/data/image_range.py": ("data/test_image_header.py",),
    "sicog_mcore/data/index/block_jobs.py": ("data/index/test_build_index.py",),
    "sicog_mcore/data/index/block_rows.py": ("data/index/test_build_index.py", "data/index/test_indexed_files.py"),
    "sicog_mcore/data/index/block_table.py": ("data/index/test_indexed_files.py",),
    "sicog_mcore/data/index/image_recheck.py": ("data/index/test_build_index.py",),
    "sicog_mcore/data/index/index_settings.py": ("data/index/test_build_index.py",),
    "sicog_mcore/data/index/index_store.py": ("data/index/test_build_index.py",),
    "sicog_mcore/data/index/row_blocks.py": ("data/index/test_build_index.py",),
    "sicog_mcore/data/row_spans.py": ("data/test_sources.py",),
    "sicog_mcore/data/sample.py": ("data/test_rows.py", "data/test_chat.py"),
    "sicog_mcore/errors.py": ("checkpoint/test_failures.py", "train/test_disk.py"),
    "sicog_mcore/flags.py": ("commands/test_parser.py",),
    "sicog_mcore/hf/image_processing_sicog.py": ("hf/test_processing.py",),
    "sicog_mcore/hf/modeling_sicog.py": ("hf/test_modeling.py", "hf/test_vision_tower.py"),
    "sicog_mcore/hf/processing_sicog.py": ("hf/test_processing.py",),
    "sicog_mcore/model/decoder.py": ("model/test_mcore_options.py",),
    "sicog_mcore/parallel/padding.py": ("parallel/test_settle.py",),
    "sicog_mcore/rollout/load.py": ("train/test_held_out.py", "checkpoint/test_hostile.py"),
    "sicog_mcore/rollout/requests.py": ("rollout/test_engine.py", "cognition/test_records.py"),
    "sicog_mcore/sizes.py": ("test_presets.py", "model/test_vlm.py"),
    "sicog_mcore/stages.py": ("test_cli.py", "test_launcher.py"),
    "sicog_mcore/train/reference.py": ("train/test_dpo.py", "parallel/test_settle.py"),
    "sicog_mcore/train/reference_key.py": ("train/test_dpo.py",),
    "sicog_mcore/train/reporter.py": ("e2e/test_fields.py",),
    "sicog_mcore/train/run.py": ("train/test_health.py", "e2e/test_stages.py"),
    "sicog_mcore/train/trainer.py": ("e2e/test_fields.py",),
}


def mirror_of(module: Path) -> Path:
    """Where the tests of a module stand: in the same folder below tests/, with test_ before the name."""
    top, *folders = module.parent.parts
    inside = ("kernels", *folders[1:]) if top == "kernels" else tuple(folders)
    return TESTS.joinpath(*inside, f"test_{module.name}")


def speaks_of(text: str, module: Path) -> bool:
    """Whether the text of a test file imports a module, or names its file or its dotted name."""
    parts = module.with_suffix("").parts
    names = [".".join(parts[1:] if parts[0] == "kernels" else parts)]
    names += [f"{folder}.{module.stem}" for folder in SCRIPTS] if module.parent == VERBS else []
    if any(found == name or found.startswith(f"{name}.") for found in imports(ast.parse(text)) for name in names):
        return True
    return re.search(rf"\b{re.escape(names[0])}\b|(?<!\w){re.escape(module.name)}\b", text) is not None


def mirror_violations(
    modules: Iterable[Path], tests: Mapping[Path, str], covered_by: Mapping[str, tuple[str, ...]]
) -> list[str]:
    """Modules without tests, and lines of the table that are stale or untrue.

    Args:
        modules: of the packages.
        tests: text of every test file, by its path.
        covered_by: the table; test files are paths below tests/.
    """
    listed = [module for module in modules if module.name != "__init__.py"]
    found = [
        f"{module} has no tests: write {mirror_of(module)}, or add a line to COVERED_BY"
        for module in listed
        if mirror_of(module) not in tests and module.as_posix() not in covered_by
    ]
    for name, files in covered_by.items():
        module = Path(name)
        if module not in listed:
            found.append(f"{name} does not exist: take its line out of COVERED_BY")
        elif mirror_of(module) in tests:
            found.append(f"{name} has {mirror_of(module)}: take its line out of COVERED_BY")
        if not files:
            found.append(f"{name}: its line in COVERED_BY names no test")
        for file in files:
            if TESTS / file not in tests:
                found.append(f"{name}: {TESTS / file} does not exist")
            elif not speaks_of(tests[TESTS / file], module):
                found.append(f"{name}: {TESTS / file} neither imports nor names it")
    return found


def test_every_module_has_tests() -> None:
    tests = {file: (ROOT / file).read_text(encoding="utf-8") for file in python_files("tests")}
    assert mirror_violations(python_files(*PACKAGES), tests, COVERED_BY) == []


def test_the_table_is_in_order() -> None:
    assert list(COVERED_BY) == sorted(COVERED_BY)


def test_the_mirror_of_a_module_stands_in_the_same_folder() -> None:
    assert mirror_of(Path("sicog_mcore/lock.py")) == Path("tests/test_lock.py")
    assert mirror_of(Path("sicog_mcore/a/b/c.py")) == Path("tests/a/b/test_c.py")
    assert mirror_of(Path("kernels/sicog_kernels/triton/x.py")) == Path("tests/kernels/triton/test_x.py")


def test_the_check_sees_a_violation() -> None:
    modules = [Path(f"sicog_mcore/data/{name}.py") for name in ("__init__", "rows", "chat", "lost", "decode")]
    tests = {
        Path("tests/data/test_rows.py"): "from sicog_mcore.data import chat",
        Path("tests/data/test_named.py"): '"""Rows, see decode.py; encode_rows.py is another."""',
    }
    right = {"sicog_mcore/data/chat.py": ("data/test_rows.py",), "sicog_mcore/data/decode.py": ("data/test_named.py",)}
    (lost,) = mirror_violations(modules, tests, right)
    assert lost.startswith("sicog_mcore/data/lost.py has no tests: write tests/data/test_lost.py")
    wrong: dict[str, tuple[str, ...]] = {
        "sicog_mcore/data/rows.py": ("data/test_rows.py",),  # has a mirror, whose line does not name it either
        "sicog_mcore/data/gone.py": ("data/test_nowhere.py",),
        "sicog_mcore/data/lost.py": (),
        "sicog_mcore/data/decode.py": ("data/test_rows.py",),
    }
    assert mirror_violations(modules, tests, right | wrong) == [
        "sicog_mcore/data/decode.py: tests/data/test_rows.py neither imports nor names it",
        "sicog_mcore/data/rows.py has tests/data/test_rows.py: take its line out of COVERED_BY",
        "sicog_mcore/data/rows.py: tests/data/test_rows.py neither imports nor names it",
        "sicog_mcore/data/gone.py does not exist: take its line out of COVERED_BY",
        "sicog_mcore/data/gone.py: tests/data/test_nowhere.py does not exist",
        "sicog_mcore/data/lost.py: its line in COVERED_BY names no test",
    ]

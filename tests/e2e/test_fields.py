"""Every field of the configuration reaches what it promises: change it, and the promised thing changes.

One rank trains a tiny model for a few steps per field, without checkpoints. What needs several ranks, a kill or a file of
its own is proven where PROVEN_ELSEWHERE says.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.cli import known_fields
from sicog_mcore.config import Experiment
from tests.builders import tiny_experiment, with_values, write_dataset, write_image
from tests.dist import Rank, run_ranks
from tests.pairs import write_pairs

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1]
NUM_ROWS = 24


@dataclass(frozen=True)
class Change:
    """Another value of a field, and what it must change.

    Attributes:
        value: the field's other value.
        seen_in: key of what ``observe`` returns.
        given: other fields, by path, in both runs; without them the field has nothing to change.
    """

    value: Any
    seen_in: str
    given: Mapping[str, Any] = field(default_factory=dict)


PAIRS = {"objective": "dpo"}
CHANGES: Mapping[str, Change] = {
    "model.slicing.resolution_px": Change(84, "slices"),
    "model.slicing.max_slices": Change(2, "slices"),
    "model.slicing.layout": Change("per_slice", "tokens"),
    "model.slicing.separators": Change("legacy", "losses", {"model.decoder.vocab_size": 29_952}),
    "model.slicing.overview_only": Change(True, "slices"),
    "model.tower.image_px": Change(98, "shapes"),
    "model.tower.patch_px": Change(28, "shapes"),
    "model.tower.num_layers": Change(4, "shapes"),
    "model.tower.feature_layer": Change(-1, "shapes"),
    "model.tower.hidden": Change(32, "shapes"),
    "model.tower.num_heads": Change(2, "losses"),
    "model.tower.ffn": Change(128, "shapes"),
    "model.tower.norm_eps": Change(0.1, "losses"),
    "model.resampler.query_grid": Change(3, "tokens"),
    "model.resampler.num_heads": Change(2, "losses"),
    "model.resampler.norm_eps": Change(0.1, "losses"),
    "model.resampler.train_positions": Change(False, "weights"),
    "model.decoder.num_layers": Change(2, "shapes"),
    "model.decoder.hidden": Change(64, "shapes"),
    "model.decoder.num_heads": Change(2, "shapes"),
    "model.decoder.num_kv_heads": Change(1, "shapes"),
    "model.decoder.head_dim": Change(16, "shapes"),
    "model.decoder.ffn": Change(256, "shapes"),
    "model.decoder.vocab_size": Change(2048, "shapes"),
    "model.decoder.rope_base": Change(100, "losses"),
    "model.decoder.rope_scaling_factor": Change(8.0, "losses"),
    "model.decoder.qkv_bias": Change(False, "shapes"),
    "model.decoder.qk_norm": Change(True, "shapes"),
    "model.decoder.tie_embeddings": Change(True, "shapes"),
    "model.decoder.norm_eps": Change(0.1, "losses"),
    "data.template": Change("plain", "tokens"),
    "data.system_prompt": Change("", "tokens"),
    "data.token_budget": Change(768, "ids"),
    "data.slice_budget": Change(9, "ids"),
    "data.window_samples": Change(5, "ids"),
    "data.too_long": Change("truncate", "truncated"),
    "data.duplicate_ids": Change("keep", "quarantined"),
    "data.max_image_px": Change(20_000, "quarantined"),
    "data.max_aspect": Change(2.0, "quarantined"),
    "data.max_bad_rate": Change(0.0, "error"),
    "optim.lr": Change(1e-4, "weights"),
    "optim.tower_lr_scale": Change(0.5, "weights"),
    "optim.resampler_lr_scale": Change(0.5, "weights"),
    "optim.decoder_lr_scale": Change(0.5, "weights"),
    "optim.min_lr_fraction": Change(0.9, "lr"),
    "optim.warmup_fraction": Change(1.0, "lr"),
    "optim.beta1": Change(0.5, "weights"),
    "optim.beta2": Change(0.5, "weights"),
    "optim.eps": Change(0.1, "weights"),
    "optim.weight_decay": Change(0.5, "weights"),
    "optim.clip_grad_norm": Change(0.01, "weights"),
    "optim.freeze": Change(("tower",), "weights"),
    "train.steps": Change(3, "lr"),
    "train.packs_per_step": Change(2, "ids"),
    "train.samples_per_step": Change(5, "ids"),
    "train.tokens_per_step": Change(2048, "ids"),
    "train.seed": Change(7, "ids"),
    "train.precision": Change("bf16", "losses"),
    "train.recompute_decoder": Change("full", "recomputed"),
    "train.recompute_layers": Change(3, "recomputed", {"train.recompute_decoder": "block"}),
    "train.recompute_tower": Change("full", "recomputed"),
    "train.log_every": Change(2, "printed"),
    "train.tensorboard": Change(True, "files"),
    "train.peak_tflops": Change(100.0, "mfu"),
    "checkpoint.every_steps": Change(1, "saves"),
    "objective": Change("next_token", "error", PAIRS),
    "dpo.loss": Change("hinge", "losses", PAIRS),
    "dpo.beta": Change(0.5, "losses", PAIRS),
    "dpo.label_smoothing": Change(0.2, "losses", PAIRS),
    "dpo.sft_weight": Change(1.0, "losses", PAIRS),
    "dpo.reference": Change("frozen", "files", PAIRS),
}
# Fields whose promise needs more than one rank, a killed process, or foreign files; the tests name them.
PROVEN_ELSEWHERE: Mapping[str, str] = {
    "preset": "train/test_console.py",
    "output": "e2e/test_resume.py",
    "model.decoder.mcore": "model/test_mcore_options.py",
    "data.sources": "data/test_sources.py",
    "data.tokenizer": "data/test_tokenizer.py",
    "data.workers": "data/test_loader.py",
    "data.worker_timeout_s": "data/test_loader.py",
    "data.bad_window": "data/test_quarantine.py",
    "data.on_change": "data/test_resume.py",
    "data.index": "data/index/test_build_index.py",
    "data.index_limit_s": "train/test_index_share.py",
    "parallel.tensor": "e2e/test_layouts.py",
    "parallel.pipeline": "e2e/test_layouts.py",
    "parallel.virtual_pipeline": "e2e/test_layouts.py",
    "parallel.sequence": "e2e/test_layouts.py",
    "parallel.overlap_grad_reduce": "e2e/test_layouts.py",
    "parallel.overlap_param_gather": "e2e/test_layouts.py",
    "parallel.timeout_s": "parallel/test_topology.py",
    "train.attention": "model/test_capability.py",
    "checkpoint.keep_last": "checkpoint/test_store.py",
    "checkpoint.resume": "checkpoint/test_commit.py",
    "init.checkpoint": "checkpoint/test_weights.py",
    "init.tower": "checkpoint/test_weights.py",
    "init.resampler": "checkpoint/test_weights.py",
    "init.decoder": "checkpoint/test_weights.py",
    "held_out.every_steps": "train/test_held_out_check.py",
    "held_out.sources": "train/test_held_out_check.py",
    "held_out.benchmark": "cognition/evaluation/test_benchmark_grader.py",
    "held_out.images": "cognition/evaluation/test_benchmark_grader.py",
    "held_out.prompt": "cognition/evaluation/test_benchmark_grader.py",
    "held_out.max_new_tokens": "cognition/evaluation/test_benchmark_grader.py",
    "held_out.batch": "cognition/evaluation/test_benchmark_grader.py",
}


class NoStore:
    """Stands where checkpoints would be written, and remembers when."""

    def __init__(self) -> None:
        self.saves: list[int] = []

    def save(self, model: Any, state: Any) -> None:
        self.saves.append(state.step)

    def folder(self, step: int) -> Path:
        return Path(f"step_{step}")

    def newest(self) -> None:
        return None

    def require_space(self) -> None:
        return None


def observe(experiment: Experiment, topology: Any) -> dict[str, Any]:
    """Trains, and says what a user or the model can see of it."""
    from sicog_mcore.build import build_model, plan_build
    from sicog_mcore.checkpoint.store import RunState
    from sicog_mcore.errors import SicogError
    from sicog_mcore.train.console import Console
    from sicog_mcore.train.feed import Feed, open_data
    from sicog_mcore.train.reporter import Reporter
    from sicog_mcore.train.run import build_objective
    from sicog_mcore.train.trainer import Trainer

    build = plan_build(experiment)
    model = build_model(build, topology)
    chunk: Any = model.chunks[0]
    shapes = {name: tuple(parameter.shape) for name, parameter in chunk.named_parameters()}
    opened = open_data(experiment, topology)
    objective, complete = build_objective(build, topology, model, opened, lambda _: None)
    feed = Feed(experiment, topology, opened, first_step=1, complete=complete)
    store, error = NoStore(), ""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        reporter = Reporter(experiment, topology, Console(True, experiment.train.log_every), first_step=1)
        try:
            Trainer(experiment, model, feed, store, reporter, RunState(), objective).fit()  # type: ignore[arg-type]
        except SicogError as caught:
            error = type(caught).__name__
        finally:
            feed.close()
            reporter.close()
    if error:
        return {"error": error}
    output = Path(experiment.output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    recomputed = [
        (config.recompute_granularity, config.recompute_method, config.recompute_num_layers)
        for config in (model.config, chunk.tower.transformer.config)
    ]
    return {
        "error": "",
        "shapes": shapes,
        "losses": [line["loss"] for line in lines],
        "lr": [line["lr"] for line in lines],
        "mfu": [line["mfu"] for line in lines],
        "slices": [line["slices"] for line in lines],
        "tokens": [line["decoder_tokens"] for line in lines],
        "quarantined": [line["quarantined"] for line in lines],
        "truncated": [line["truncated"] for line in lines],
        "weights": {name: parameter.detach().double().sum().item() for name, parameter in chunk.named_parameters()},
        "recomputed": recomputed,
        "ids": (output / "consumed-0.jsonl").read_text(),
        "files": sorted(str(path.relative_to(output).parts[0]) for path in output.rglob("*")),
        "saves": store.saves,
        "printed": printed.getvalue().count("grad norm"),
    }


def _observe_all(rank: Rank, experiments: list[Experiment]) -> list[dict[str, Any]]:
    topology = rank.start(experiments[0].parallel)
    return [observe(experiment, topology) for experiment in experiments]


def write_rows(folder: Path) -> None:
    """Usable rows, and one each that is repeated, too long, too flat, and too large for a lowered limit."""
    path = write_dataset(folder, NUM_ROWS)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    long = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "word and word " * 800}]
    write_image(folder / "images" / "flat.png", 20, 90, seed=0)
    flat = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Flat."}]
    rows += [rows[0], {"id": "long", "conversations": long}, {"id": "flat", "image": "flat.png", "conversations": flat}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """For each field what was seen without and with its other value."""
    root = tmp_path_factory.mktemp("fields")
    for name in ("rows", "pairs"):
        (root / name).mkdir()
    write_rows(root / "rows")
    write_pairs(root / "pairs", 12)
    plans: dict[tuple[tuple[str, Any], ...], Experiment] = {}

    def plan(given: Mapping[str, Any]) -> Experiment:
        key = tuple(sorted(given.items()))
        if key not in plans:
            folder = root / ("pairs" if "objective" in given else "rows")
            base = tiny_experiment(
                folder,
                output=str(root / f"run{len(plans)}"),
                data={"max_bad_rate": 1.0},
                train={"steps": 2, "packs_per_step": 1, "tensorboard": False},
                checkpoint={"every_steps": 100},
                optim={"warmup_fraction": 0.3},
            )
            plans[key] = with_values(base, given)
        return plans[key]

    wanted = {path: (plan(c.given), plan({**c.given, path: c.value})) for path, c in CHANGES.items()}
    order = list(plans.values())
    (results,) = run_ranks(_observe_all, 1, order)
    found = {experiment.output: result for experiment, result in zip(order, results, strict=True)}
    return {path: (found[before.output], found[after.output]) for path, (before, after) in wanted.items()}


@pytest.mark.parametrize("path", CHANGES)
def test_a_field_changes_what_it_promises(path: str, observed: Any) -> None:
    before, after = observed[path]
    seen = CHANGES[path].seen_in
    assert before["error"] == ""
    if seen != "error":
        assert after["error"] == ""
    assert before[seen] != after[seen]


def test_every_field_is_in_one_of_the_tables() -> None:
    assert sorted([*CHANGES, *PROVEN_ELSEWHERE]) == sorted(known_fields())


@pytest.mark.parametrize("path", PROVEN_ELSEWHERE)
def test_a_test_that_is_named_elsewhere_speaks_of_the_field(path: str) -> None:
    assert path.rpartition(".")[2] in (TESTS / PROVEN_ELSEWHERE[path]).read_text()

"""The whole chain learns: eight image-text samples by heart, told back by greedy decoding."""

from __future__ import annotations

from pathlib import Path

import pytest

from sicog_mcore.config import Experiment
from tests.builders import tiny_experiment, write_dataset
from tests.dist import Rank, run_ranks
from tests.e2e.runs import read_metrics
from tests.tolerances import OVERFIT_LOSS

pytestmark = pytest.mark.slow
SAMPLES, STEPS, MAX_ANSWER_TOKENS = 8, 120, 40


def _train_and_answer(rank: Rank, experiment: Experiment) -> list[tuple[str, str]]:
    """Trains, then asks every sample's last question; (answer, label) pairs."""
    import torch

    from sicog_mcore.build import build_model, plan_build
    from sicog_mcore.checkpoint.store import CheckpointStore
    from sicog_mcore.data.encode import Encoder
    from sicog_mcore.data.sources import open_sources
    from sicog_mcore.train.run import train

    build, topology = plan_build(experiment), rank.start(experiment.parallel, experiment.train.seed)
    train(build, topology, "the test's command")
    # A fresh model with the weights of the checkpoint: what is asked is what was saved.
    model = build_model(build, topology)
    CheckpointStore(experiment, topology).load(model, STEPS)
    encoder = Encoder(experiment.model, experiment.data)
    samples = open_sources(experiment.data.sources, experiment.data)
    with torch.no_grad():
        return [
            (_greedy(model.chunks[0], experiment, encoder, samples.read(i)), samples.read(i).turns[-1].text)
            for i in range(len(samples))
        ]


def _greedy(model, experiment: Experiment, encoder, sample) -> str:
    """Greedy decoding without a cache: the whole prefix again for every token."""
    from dataclasses import replace

    import torch

    from sicog_mcore.data.collate import collate

    prompt = encoder.encode_prompt(sample)
    answer: list[int] = []
    while len(answer) < MAX_ANSWER_TOKENS:
        tokens = torch.cat([prompt.tokens, torch.tensor(answer, dtype=torch.int64)])
        grown = replace(prompt, tokens=tokens, labels=torch.full_like(tokens, -100), segments=())
        batch = collate(
            [grown],
            token_budget=len(tokens),
            pad_id=encoder.chat.pad_id,
            queries=experiment.model.resampler.queries,
            patch_dim=experiment.model.tower.patch_dim,
        )
        logits = model.language_model.project(model.hidden_states(batch), torch.tensor([len(tokens) - 1]))
        best = int(logits[0, 0].argmax())
        if best == encoder.chat.end_id:
            break
        answer.append(best)
    return encoder.chat.decode(answer)


def test_eight_samples_are_learnt_by_heart(tmp_path: Path) -> None:
    write_dataset(tmp_path, SAMPLES)
    experiment = tiny_experiment(
        tmp_path,
        train={"steps": STEPS, "packs_per_step": 2, "tensorboard": False},
        data={"token_budget": 512},
        optim={"lr": 3e-3, "min_lr_fraction": 0.0},
    )
    (answers,) = run_ranks(_train_and_answer, 1, experiment)
    assert read_metrics(tmp_path / "run")[-1]["loss"] < OVERFIT_LOSS
    assert len(answers) == SAMPLES
    assert [answer for answer, _ in answers] == [label for _, label in answers]

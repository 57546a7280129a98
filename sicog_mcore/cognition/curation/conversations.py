"""Turns a kept item into training data: its winner as rows, and as the better side of a preference pair.

In: Generation, Scores   Out: TrainingRow in LLaVA form, pair rows of sicog_mcore/data/pairs.py   Next: datasets.py
Answers in steps are written as codec.py writes them, whole, whatever markup the model chose: one form is learnt, and neither
side of a pair is known by its looks. Every user turn is the one that generation uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import xxhash

from sicog_mcore.cognition.codec import KINDS, final_clause, parse, render
from sicog_mcore.cognition.prompts import Prompt, ask, find_prompt
from sicog_mcore.cognition.records import Candidate, Generation, Scores, Task
from sicog_mcore.data.pairs import build_pair
from sicog_mcore.data.rows import build_sample
from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, ImageRef, Role, Sample, Turn
from sicog_mcore.errors import SampleError

RowForm = Literal["chain", "plain", "turns"]

PLAIN_PROMPTS: Mapping[Task, str] = {"caption": "caption", "answer": "direct"}
SPEAKERS: Mapping[Role, str] = {"system": "system", "user": "human", "assistant": "gpt"}
# One for each of codec.COD_STEPS: a chain of description as a conversation.
TURN_QUESTIONS = (
    "What does this image mainly show?",
    "What can be seen of each element by itself?",
    "How do the elements relate to each other?",
    "What lies around them, at the edges and in the background?",
    "Now describe the whole image in one full and detailed description.",
)


@dataclass(frozen=True)
class TrainingRow:
    """One row of training data.

    Attributes:
        id: of the record, "#", and the form; so ids are unique where those of the records are.
        image: as in the record; empty for none.
        record: id of the item, by which everything about the row is found again.
        form: how the winner was put, or "text" for a row that came from elsewhere.
        prompt: id and version of the prompt that the winner answered, e.g. "cod@1"; empty for a row from elsewhere.
    """

    id: str
    image: str
    turns: tuple[Turn, ...]
    record: str
    form: RowForm | Literal["text"]
    prompt: str

    def fields(self) -> dict[str, Any]:
        """In LLaVA form; the loader leaves alone what it does not know."""
        conversations = [{"from": SPEAKERS[turn.role], "value": turn.text} for turn in self.turns]
        image = {"image": self.image} if self.image else {}
        origin = {"record": self.record, "form": self.form, "prompt": self.prompt}
        return {"id": self.id, **image, "conversations": conversations, **origin}


@dataclass(frozen=True)
class PairBounds:
    """The bounds within which a candidate is the worse side of a pair.

    Attributes:
        margin: score by which it must lie below the winner; above 0.
        length_ratio: largest ratio of the longer to the shorter of the two (tokens).
    """

    margin: float = 0.05
    length_ratio: float = 1.5


def make_rows(generation: Generation, winner: Candidate, forms: Sequence[RowForm]) -> list[TrainingRow]:
    """The rows of a kept item, in the order of ``forms``.

    "chain" is the winner's whole answer; "plain" is a chain's last step, asked for without steps; "turns" asks for each
    step of a chain of description in a turn of its own. A winner that is plain has the first form alone.

    Raises:
        SampleError: the loader would refuse a row; reasons of rows.py, codec.py and prompts.py.
    """
    prompt = find_prompt(winner.prompt)
    rows = []
    for form in forms if prompt.style == "steps" else ("chain",):
        if form == "turns" and prompt.task != "caption":
            continue
        turns = _turns(form, prompt, generation, winner)
        row = TrainingRow(
            f"{generation.id}#{form}",
            generation.image,
            tuple(turns),
            generation.id,
            form,
            f"{prompt.id}@{prompt.version}",
        )
        # Checked as the loader will check it: a row that training would refuse drops the item here, with a reason.
        build_sample(row.fields(), _images(generation), row.id, generation.id)
        rows.append(row)
    return rows


def text_row(sample: Sample) -> TrainingRow:
    """A row of text that came from elsewhere."""
    return TrainingRow(f"{sample.id}#text", "", sample.turns, sample.id, "text", "")


def make_pair(generation: Generation, winner: int, rejected: int) -> dict[str, Any]:
    """A row of data/pairs.py: the same question, a better and a worse answer in the same form.

    Raises:
        SampleError: the loader would refuse it.
    """
    better, worse = generation.candidates[winner], generation.candidates[rejected]
    prompt = find_prompt(better.prompt)
    row = {
        "id": f"{generation.id}#pair",
        **({"image": generation.image} if generation.image else {}),
        "prompt": ask(prompt, generation.question, len(_images(generation))),
        "chosen": _whole(prompt, better.text),
        "rejected": _whole(prompt, worse.text),
        "record": generation.id,
    }
    build_pair(row, _images(generation), row["id"], generation.id)
    return row


def find_rejected(generation: Generation, scores: Scores, bounds: PairBounds, seed: int) -> tuple[int, str]:
    """The worse side of a pair: one of the lower half of those that fit, drawn by the item's id.

    Returns:
        Index of the candidate and "", or -1 and the first condition that left none: pair_alone (no other of the style),
        pair_unreadable (cut, or without its last step), pair_no_worse, pair_length.
    """
    winner = generation.candidates[scores.winner]
    style = find_prompt(winner.prompt).style
    # Each condition narrows the last, so the first that leaves none is the reason.
    left = [i for i, other in enumerate(generation.candidates) if i != scores.winner and _style(other) == style]
    if not left:
        return -1, "pair_alone"
    left = [i for i in left if scores.clauses[i] is not None and generation.candidates[i].finish == "stop"]
    if not left:
        return -1, "pair_unreadable"
    highest = scores.scores[scores.winner] - bounds.margin
    left = [i for i in left if scores.scores[i] <= highest]
    if not left:
        return -1, "pair_no_worse"
    left = [i for i in left if _length_ratio(generation.candidates[i], winner) <= bounds.length_ratio]
    if not left:
        return -1, "pair_length"
    left.sort(key=lambda i: (scores.scores[i], i))
    # Not always the worst: one of the lower half, drawn by the item.
    lower = left[: (len(left) + 1) // 2]
    return lower[chance(seed, generation.id) % len(lower)], ""


def chance(seed: int, item_id: str) -> int:
    """A number of 64 bits that depends on nothing but the seed and the id."""
    return xxhash.xxh3_64_intdigest(f"{seed}:{item_id}".encode("utf-8", "surrogatepass"))


def _turns(form: RowForm, prompt: Prompt, generation: Generation, winner: Candidate) -> list[Turn]:
    num_images = len(_images(generation))
    if form == "chain":
        question, answer = ask(prompt, generation.question, num_images), _whole(prompt, winner.text)
        return [Turn("user", question), Turn("assistant", answer)]
    if form == "plain":
        plain = find_prompt(PLAIN_PROMPTS[prompt.task])
        clause = final_clause(winner.text, prompt.style, prompt.task)
        return [Turn("user", ask(plain, generation.question, num_images)), Turn("assistant", clause or "")]
    turns = []
    for number, (question, step) in enumerate(zip(TURN_QUESTIONS, _steps(prompt, winner.text), strict=True)):
        images = f"{IMAGE_PLACEHOLDER}\n" * num_images if number == 0 else ""
        turns += [Turn("user", images + question), Turn("assistant", step)]
    return turns


def _whole(prompt: Prompt, text: str) -> str:
    return render(_steps(prompt, text), KINDS[prompt.task]) if prompt.style == "steps" else text.strip()


def _steps(prompt: Prompt, text: str) -> tuple[str, ...]:
    parsed = parse(text, KINDS[prompt.task])
    if parsed.steps is None:
        raise SampleError(parsed.problem, f"found no {KINDS[prompt.task]} steps in {text!r:.80}")
    return parsed.steps


def _images(generation: Generation) -> list[ImageRef]:
    return [ImageRef(generation.image)] if generation.image else []


def _style(candidate: Candidate) -> str:
    return find_prompt(candidate.prompt).style


def _length_ratio(one: Candidate, other: Candidate) -> float:
    return max(one.tokens, other.tokens) / max(min(one.tokens, other.tokens), 1)

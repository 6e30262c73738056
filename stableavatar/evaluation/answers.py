"""What the answers of a blind user study say (see `study`): preferences in percent with their intervals, as in table 7 of the paper."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stableavatar.evaluation.statistics import Interval, proportion
from stableavatar.evaluation.study import KEY
from stableavatar.files import replacing

COLUMNS = ("study", "participant", "trial", "question", "choice")
"""Of exported tables."""


@dataclass(frozen=True)
class Answer:
    """What a participant chose; `choice` is the clip's file name."""

    participant: str
    trial: str
    question: str
    choice: str


@dataclass(frozen=True)
class Preference:
    """Part of the answers to a question that prefer our model to a competitor, from 0 to 1; `share.count` answers."""

    competitor: str
    question: str
    share: Interval
    participants: int


def count_answers(answers: Path, key: Path, out: Path) -> list[Preference]:
    """The preferences that exported answers say, also written to out/preferences.csv and out/preferences.md.

    Args:
        answers: folder of what participants exported, *.json and *.csv. An answer that is in several files counts once.
        key: study_key.json of the study.

    Raises:
        ValueError: no answers, a file of something else or of another study, a participant with two answers to one question.
    """
    about = _read_key(key)
    files = sorted(path for path in answers.iterdir() if path.suffix in (".json", ".csv")) if answers.is_dir() else []
    if not files:
        raise ValueError(f"no answers in {answers}; expected the .json or .csv files that participants exported")
    preferences = preferences_of(_collect(files, about), about)
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "preferences.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["competitor", "question", "percent", "low", "high", "answers", "participants"])
        for found in preferences:
            percents = [f"{100 * value:.1f}" for value in (found.share.mean, found.share.low, found.share.high)]
            writer.writerow([found.competitor, found.question, *percents, found.share.count, found.participants])
    with replacing(out / "preferences.md") as part:
        part.write_text(markdown(preferences), encoding="utf-8")
    return preferences


def _read_key(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}; give the {KEY} that was written with the study") from None
    if not isinstance(content, dict) or not {"study", "trials", "questions"} <= content.keys():
        raise ValueError(f"{path} is not the key of a study; give the {KEY} that was written with it")
    return content


def _collect(files: Sequence[Path], about: Mapping[str, Any]) -> list[Answer]:
    """All answers, each once."""
    clips = {trial["name"]: (trial["ours"], trial["other"]) for trial in about["trials"]}
    found: dict[tuple[str, str, str], tuple[Answer, Path]] = {}
    for path in files:
        for study, answer in _read_answers(path):
            if study != about["study"]:
                raise ValueError(f"{path} answers study {study!r}, expected {about['study']!r}; remove it or give its own key")
            if answer.choice not in clips.get(answer.trial, ()) or answer.question not in about["questions"]:
                raise ValueError(f"{path} has {answer}, which the study does not have; remove it")
            if not answer.participant:
                raise ValueError(f"{path} has an answer of nobody; name the participant")
            other, where = found.setdefault((answer.participant, answer.trial, answer.question), (answer, path))
            if other != answer:
                raise ValueError(f"participant {answer.participant!r} answered {answer.question} of {answer.trial} differently in {where} "
                                 f"and {path}; keep one, or rename one participant")
    return [answer for answer, _ in found.values()]


def _read_answers(path: Path) -> Iterator[tuple[str, Answer]]:
    """(study, answer) of every answer of an exported file."""
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = [tuple(row[column] for column in COLUMNS) for row in csv.DictReader(file)]
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
            about = (content["study"], content["participant"])
            rows = [(*about, *(answer[column] for column in COLUMNS[2:])) for answer in content["answers"]]
        checked = [[str(value) for value in row] for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot read answers from {path} ({why}); expected a file that the study exported") from None
    return ((study, Answer(*answer)) for study, *answer in checked)


def preferences_of(answers: Sequence[Answer], about: Mapping[str, Any]) -> list[Preference]:
    """One for every competitor and question that was answered, in the key's order."""
    trials = {trial["name"]: trial for trial in about["trials"]}
    found = []
    for competitor in dict.fromkeys(trial["competitor"] for trial in about["trials"]):
        for question in about["questions"]:
            chosen = [answer for answer in answers if answer.question == question and trials[answer.trial]["competitor"] == competitor]
            if chosen:
                table = _table(chosen, trials)
                found.append(Preference(competitor, question, proportion(table), len(table)))
    return found


def _table(answers: Sequence[Answer], trials: Mapping[str, Mapping[str, Any]]) -> np.ndarray:
    """[participants, trials]: 1 where ours was chosen, 0 where the other was, NaN where nothing was."""
    people, asked = (sorted({getattr(answer, name) for answer in answers}) for name in ("participant", "trial"))
    table = np.full((len(people), len(asked)), np.nan)
    for answer in answers:
        table[people.index(answer.participant), asked.index(answer.trial)] = answer.choice == trials[answer.trial]["ours"]
    return table


def markdown(preferences: Sequence[Preference]) -> str:
    """Table 7: a row for every competitor, a column for every question."""
    questions = list(dict.fromkeys(found.question for found in preferences))
    cells = {(found.competitor, found.question): found for found in preferences}
    lines = ["| preferred to | " + " | ".join(questions) + " |", "|---" * (len(questions) + 1) + "|"]
    for competitor in dict.fromkeys(found.competitor for found in preferences):
        lines.append(f"| {competitor} | " + " | ".join(_percent(cells.get((competitor, question))) for question in questions) + " |")
    people = max((found.participants for found in preferences), default=0)
    return "\n".join(lines) + f"\n\nPart of the answers that prefer our video, with 95 % intervals; up to {people} participants.\n"


def _percent(found: Preference | None) -> str:
    if found is None:
        return "–"
    mean, low, high = (100 * value for value in (found.share.mean, found.share.low, found.share.high))
    return f"{mean:.1f} % ({low:.1f} .. {high:.1f})"

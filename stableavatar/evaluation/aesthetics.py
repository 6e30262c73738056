"""Q-Align: how good and how beautiful a picture looks, from 1 (bad) to 5 (excellent).

H. Wu et al., "Q-Align: Teaching LMMs for Visual Scoring via Discrete Text-Defined Levels", 2023. IQA is its "quality", ASE its
"aesthetics", each the mean over pictures that are scored one by one (`input_="image"`).

The model is a folder as published (q-future/one-align). It brings its own program along, so it runs only with the user's leave; that
program needs transformers 4.37 or so, older than ours, so it may run in another Python environment, to which pictures go as files. In
that environment this very file is the program: it must import nothing of ours and run with old versions of its packages.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

TASKS = ("quality", "aesthetics")
HIGHEST, LOWEST = 5.0, 1.0
LOADING = (OSError, ValueError, ImportError, AttributeError, TypeError, KeyError, RuntimeError)
"""What a program of another version of transformers was seen to raise."""
PROGRAM = "import runpy, sys; del sys.path[0], sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
"""Runs a file without its folder on the path: a module beside it, statistics.py, has the name of one of Python's."""


class QAlign:
    """The scorer, loaded into this process from a folder; nothing is downloaded.

    Args:
        folder: config.json, weights, tokenizer and, unless transformers itself has the model, its program.
        device: where it runs; in half precision on a GPU.
        trust: run the folder's own program.

    Raises:
        ValueError: no such model, no leave for its program, or it does not load.
    """

    def __init__(self, folder: str, device: str, trust: bool) -> None:
        check_model(folder, trust)
        from transformers import AutoModelForCausalLM

        dtype = torch.float16 if device.startswith("cuda") else torch.float32
        # `torch_dtype` is the name of old versions, which later ones still take.
        options = {"local_files_only": True, "trust_remote_code": trust, "torch_dtype": dtype, "attn_implementation": "eager"}
        try:
            self._model = AutoModelForCausalLM.from_pretrained(folder, **options).eval().to(device)
        except LOADING as error:
            raise ValueError(f"Q-Align in {folder} does not load ({_one_line(error)}); one-align needs an environment with transformers "
                             "4.37, whose python can be given") from error

    def scores(self, pictures: Sequence[Image.Image]) -> dict[str, float]:
        """Mean `quality` and `aesthetics` of RGB pictures; ValueError if the model gives something else than 1 to 5."""
        return {task: self._mean(task, pictures) for task in TASKS}

    def _mean(self, task: str, pictures: Sequence[Image.Image]) -> float:
        with torch.inference_mode():
            scores = [float(self._model.score([picture], task_=task, input_="image")) for picture in pictures]
        if not all(LOWEST <= score <= HIGHEST for score in scores):
            raise ValueError(f"Q-Align gave a {task} of {scores}; expected {LOWEST:g} to {HIGHEST:g}")
        return sum(scores) / len(scores)


class RemoteQAlign:
    """The same scorer in a process of another Python environment, which ends with this object.

    Args:
        python: the interpreter of an environment with torch, pillow and what the model needs.
    """

    def __init__(self, folder: str, device: str, trust: bool, python: str) -> None:
        check_model(folder, trust)
        self._python = python
        self._log = tempfile.TemporaryFile()
        words = [python, "-c", PROGRAM, str(Path(__file__).resolve()), folder, device, "trusted" if trust else "untrusted"]
        try:
            self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True)
        except OSError as error:
            raise ValueError(f"cannot run {python}: {error.strerror}; give the python of an environment with transformers 4.37") from None

    def scores(self, pictures: Sequence[Image.Image]) -> dict[str, float]:
        """As `QAlign.scores`."""
        with tempfile.TemporaryDirectory() as scratch:
            files = [f"{scratch}/{number}.png" for number in range(len(pictures))]
            for picture, file in zip(pictures, files):
                picture.save(file, compress_level=1)
            answer = self._ask(files)
        if "problem" in answer:
            raise ValueError(answer["problem"])
        return answer

    def _ask(self, files: list[str]) -> dict:
        try:
            self._process.stdin.write(json.dumps(files) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            self._process.wait()
            self._log.seek(0)
            lines = self._log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise ValueError(f"Q-Align ended in {self._python}: {lines[-1]}") from None


def check_model(folder: str, trust: bool) -> None:
    """ValueError unless a folder holds a model that may run."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"no Q-Align in {folder}: cannot read {path}; give the folder of q-future/one-align") from None
    if "auto_map" in config and not trust:
        raise ValueError(f"the model in {folder} runs its own program; read it and set trust_remote_code=true, or do without the model")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def serve(folder: str, device: str, trust: str) -> None:
    """Answers lines on stdin: a JSON list of picture files -> the scores, or {"problem": one line}."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the model's program prints is no answer
    scorer = None
    for line in sys.stdin:
        try:
            scorer = scorer or QAlign(folder, device, trust == "trusted")
            answer = scorer.scores([Image.open(file).convert("RGB") for file in json.loads(line)])
        except ValueError as error:
            answer = {"problem": _one_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(*sys.argv[1:])

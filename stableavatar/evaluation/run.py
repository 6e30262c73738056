"""The walk of scripts/evaluate.py: cases of a set -> generated videos -> features -> figures -> tables and a report."""

import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from stableavatar import __version__
from stableavatar.config import settings
from stableavatar.evaluation.features import Lab, Tools
from stableavatar.evaluation.findings import Findings
from stableavatar.evaluation.measuring import Measured, Measuring, measure
from stableavatar.evaluation.metrics import choose_metrics
from stableavatar.evaluation.pairs import Pair, Problem, find_pairs
from stableavatar.evaluation.published import read_published
from stableavatar.evaluation.report import write_report
from stableavatar.evaluation.sets import load_set, read_cases, write_cases
from stableavatar.evaluation.settings import EvaluateConfig
from stableavatar.evaluation.side_by_side import write_videos
from stableavatar.evaluation.study import KEY, write_study
from stableavatar.evaluation.tables import write_tables
from stableavatar.sampling.offload import resolve_device

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "numpy", "scipy", "scikit-image")


def run(config: EvaluateConfig) -> int:
    """Runs the wanted steps; the exit code: 1 if something could not be made and the same has to be run again.

    Raises:
        ValueError, OSError: settings that do not fit, folders or weights that cannot be read.
    """
    return max(WALK[step](config) for step in config.wanted())


def make_cases(config: EvaluateConfig) -> int:
    """The step cases."""
    for key in ("set", "data", "reference"):
        if not getattr(config, key):
            raise ValueError(f"{key} is not given; the step cases needs set=YAML, data=FOLDER (raw videos) and reference=FOLDER (cases)")
    return write_cases(load_set(config.set, config.set_settings.split()), Path(config.data), Path(config.reference), _workers(config))


def generate(config: EvaluateConfig) -> int:
    """The step generate."""
    from stableavatar.evaluation import experiments  # the networks of the pipeline are slow to import

    return experiments.generate(config)


def evaluate(config: EvaluateConfig) -> int:
    """The step evaluate: measures all videos, writes the tables and the report."""
    out = _out(config)
    metrics = choose_metrics(config.metrics)
    test_set = read_cases(Path(config.reference))["set"].get("name", "") if config.reference else ""
    published = read_published(config.published, test_set)
    lab = Lab(Path(config.cache) if config.cache else out / "features", Tools(config.weights, config.device, config.batch))
    absent = {name: why for name, metric in metrics.items() if (why := metric.absent(lab.tools))}
    present = [name for name in metrics if name not in absent]
    lab.check(present)
    for name, why in absent.items():
        logger.warning("%s is %s", name, why)
    pairs, problems = chosen_pairs(config)
    how = Measuring(config.least_frames, config.resamples, _workers(config))
    measured = measure(pairs, present, lab, config.stretches(), reference_variant(config, pairs), how)
    findings = replace(
        _findings(config, test_set, measured), problems=[*problems, *measured.problems], reference=reference_variant(config, pairs),
        absent=absent, published=published, missing=missing_variants(config),
    )  # fmt: skip
    write_tables(out, findings)
    if config.looks:
        findings = replace(findings, videos=write_videos(out / "side_by_side", findings.pairs, _workers(config)))
    report = write_report(out, findings, _workers(config))
    logger.info("%d videos measured, %d excluded; %s, %s", len(findings.pairs), len(findings.problems), out / "table.md", report)
    return 0


def study(config: EvaluateConfig) -> int:
    """The step study: writes the page, or counts the answers to it."""
    from stableavatar.evaluation.answers import count_answers

    out = _out(config)
    if config.answers:
        for found in count_answers(Path(config.answers), Path(config.key) if config.key else out / KEY, out):
            logger.info("%s, %s: %.1f %% prefer ours", found.competitor, found.question, 100 * found.share.mean)
        return 0
    pairs, _ = chosen_pairs(config)
    page = write_study(out, config.study_of or reference_variant(config, pairs), pairs, config.study_seed, config.study_videos)
    logger.info("open %s", page)
    return 0


WALK = {"cases": make_cases, "generate": generate, "evaluate": evaluate, "study": study}


def chosen_pairs(config: EvaluateConfig) -> tuple[list[Pair], list[Problem]]:
    """The pairs of the experiment in the order of its rows, and videos without a partner; of `limit` cases."""
    folder = Path(config.generated) if config.generated else _out(config) / "videos"
    pairs, problems = find_pairs(folder, Path(config.reference) if config.reference else None)
    order = [variant.name for variant in config.rows()]
    names = sorted({pair.name for pair in pairs})[: config.limit or None]
    kept = [pair for pair in pairs if pair.name in names]
    kept.sort(key=lambda pair: order.index(pair.variant) if pair.variant in order else len(order))
    return kept, [one for one in problems if not config.limit or one.path.stem in names]


def reference_variant(config: EvaluateConfig, pairs: Sequence[Pair]) -> str:
    """The variant that others are compared with: the last row that has videos; empty where there is none."""
    here = [pair.variant for pair in pairs]
    own = [variant.name for variant in config.rows() if variant.name in here]
    return config.compared_with or next(reversed(own or here), "")


def missing_variants(config: EvaluateConfig) -> dict[str, str]:
    """Variants that have no weights, and no videos either -> why."""
    from stableavatar.evaluation.experiments import VIDEOS, absence

    made = Path(config.generated) if config.generated else Path(config.out) / VIDEOS
    return {variant.name: why for variant in config.rows() if (why := absence(config, variant)) and not (made / variant.name).is_dir()}


def _findings(config: EvaluateConfig, test_set: str, measured: Measured) -> Findings:
    about = " ".join(filter(None, [config.about, f"Set: {test_set}." if test_set else ""]))
    shown = {key: value for key, (_, value, _) in settings(config).items()}
    versions = {"stableavatar": __version__, "python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    return Findings(
        title=config.title, about=about, metrics=choose_metrics(config.metrics), results=measured.results,
        pairs=measured.pairs, sets=measured.sets, set_differences=measured.set_differences, settings=shown, versions=versions,
    )  # fmt: skip


def _out(config: EvaluateConfig) -> Path:
    if not config.out:
        raise ValueError("out is not given; set out=FOLDER, where the results go")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _workers(config: EvaluateConfig) -> int:
    """Processes: as many as there are cores, or one where all would share a GPU."""
    return config.workers or (1 if resolve_device(config.device).type == "cuda" else len(os.sched_getaffinity(0)))

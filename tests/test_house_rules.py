"""The house rules that a program can check; every exception is named here with its reason."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from stableavatar.config import InferenceConfig, load_config, settings
from stableavatar.data.preparation.settings import PrepareConfig
from stableavatar.evaluation.sets import SetConfig
from stableavatar.evaluation.settings import EvaluateConfig
from stableavatar.puppet.ablations import AblateConfig
from stableavatar.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "stableavatar").rglob("*.py"))
PROGRAMS = [ROOT / "inference.py", ROOT / "train.py", *sorted((ROOT / "scripts").glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]
CODE = LIBRARY + PROGRAMS

FUNCTION_LINES, FILE_LINES, PARAMETERS, FILE_BYTES = 60, 400, 9, 20_000_000
EXCEPTIONS: dict[str, str] = {
    "stableavatar/models/dit.py:__init__": "its parameters are the keys of config.json; diffusers records what __init__ takes",
}
"""`file` or `file:function` -> why it may break a rule of size."""
PROCESS_EXCEPTIONS = {
    ("stableavatar/models/strict_loading.py", "accelerate"): "builds a model without memory for it, to be filled from disk",
}

BROUGHT_ALONG = {"yaml": "omegaconf", "huggingface_hub": "diffusers", "PIL": "pillow"}
"""Module -> the listed package that it comes with."""

CONFIGS = {"inference": InferenceConfig, "train": TrainConfig, "ablations": AblateConfig, "preparation": PrepareConfig,
           "evaluation": EvaluateConfig, "sets": SetConfig}  # fmt: skip
PROCESS_MODULES = ("torch.distributed", "accelerate", "deepspeed")
BROAD = {"Exception", "BaseException"}
NEWER_THAN_3_10 = {("typing", "Self"), ("typing", "Never"), ("typing", "override"), ("typing", "assert_never"), ("typing", "Unpack"),
                   ("enum", "StrEnum"), ("datetime", "UTC"), ("itertools", "batched"), ("contextlib", "chdir")}
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in CODE}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def nodes(kind: type | tuple[type, ...], paths: list[Path]) -> Iterator[tuple[str, ast.AST]]:
    """("file:line", node) of every node of a kind."""
    for path in paths:
        for node in ast.walk(TREES[path]):
            if isinstance(node, kind):
                yield f"{name_of(path)}:{getattr(node, 'lineno', 0)}", node


def within(outer: Iterable[ast.AST]) -> set[int]:
    """id of every node inside of some."""
    return {id(inner) for node in outer for inner in ast.walk(node)}


def for_type_checkers(paths: list[Path]) -> set[int]:
    """id of every node that is not run."""
    return within(node for _, node in nodes(ast.If, paths) if getattr(node.test, "id", "") == "TYPE_CHECKING")


def imports(paths: list[Path]) -> Iterator[tuple[str, str, str]]:
    """("file:line", module, name or ""), but for those that only type checkers see."""
    unseen = for_type_checkers(paths)
    for at, node in nodes((ast.Import, ast.ImportFrom), paths):
        if id(node) not in unseen:
            module = getattr(node, "module", None) or ""
            yield from ((at, module or alias.name, alias.name if module else "") for alias in node.names)


def repository_files() -> list[Path]:
    """Files that belong to the repository, committed or about to be."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def oversize() -> dict[str, str]:
    """Name -> what is too large about it."""
    found = {}
    for path in LIBRARY:
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > FILE_LINES:
            found[name_of(path)] = f"{lines} lines"
    for at, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef), CODE):
        name = f"{at.partition(':')[0]}:{node.name}"
        lines, count = node.end_lineno - node.lineno + 1, len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
        if lines > FUNCTION_LINES or count > PARAMETERS:
            found[name] = f"{lines} lines, {count} parameters"
    return found


def test_functions_files_and_parameter_lists_are_small():
    found = oversize()
    assert {name: what for name, what in found.items() if name not in EXCEPTIONS} == {}
    assert [name for name in EXCEPTIONS if name not in found] == [], "exceptions that are no longer needed"


def test_the_library_does_not_print():
    assert [at for at, node in nodes(ast.Call, LIBRARY) if getattr(node.func, "id", "") == "print"] == []


def test_no_exception_is_caught_broadly():
    def names(handler: ast.ExceptHandler) -> set[str]:
        caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        return {getattr(item, "id", "Exception" if item is None else "") for item in caught}

    assert [at for at, node in nodes(ast.ExceptHandler, CODE) if names(node) & BROAD] == []


def test_weights_load_strictly_and_safely():
    loose = {("strict", False), ("weights_only", False), ("ignore_mismatched_sizes", True), ("trust_remote_code", True)}
    assert [at for at, node in nodes(ast.keyword, CODE) if (node.arg, getattr(node.value, "value", None)) in loose] == []


def test_the_model_knows_nothing_of_processes_and_environment():
    models = [path for path in LIBRARY if path.parent.name == "models"]
    assert models
    found = {(at.partition(":")[0], module) for at, module, _ in imports(models) if module.startswith(PROCESS_MODULES)}
    assert found - PROCESS_EXCEPTIONS.keys() == set() == PROCESS_EXCEPTIONS.keys() - found
    assert [at for at, node in nodes(ast.Attribute, models) if node.attr in ("environ", "getenv")] == []


def test_imports_point_downwards():
    """The network and the samplers do not import the pipeline, the pipeline not the program above it."""
    above = {
        "models": ("pipeline", "cases", "sampling", "config", "data", "training"),
        "sampling": ("pipeline", "cases", "data", "training"),
        "data": ("pipeline", "cases", "training"),
        "stableavatar": ("cases", "training"),
    }
    wrong = [
        (at, module)
        for path in LIBRARY
        for at, module, _ in imports([path])
        if module.startswith(tuple(f"stableavatar.{name}" for name in above.get(path.parent.name, ())))
    ]
    assert wrong == []


def imported_at_start(program: Path) -> dict[str, str]:
    """Module outside the library -> "file:line" of one of its imports: what a program and the library's modules need to be imported."""
    paths, found = [program], {}
    for path in paths:  # which grows
        later = within(node for _, node in nodes(ast.FunctionDef, [path]) if path != program) | for_type_checkers([path])
        for at, node in nodes((ast.Import, ast.ImportFrom), [path]):
            if id(node) in later:
                continue
            module, names = getattr(node, "module", None), [alias.name for alias in node.names]
            for name in [module, *(f"{module}.{name}" for name in names)] if module else names:
                own = [file for end in (".py", "/__init__.py") if (file := ROOT / (name.replace(".", "/") + end)) in TREES]
                paths += [file for file in own if file not in paths]
                found[name.partition(".")[0]] = at
    return {module: at for module, at in found.items() if module not in {*sys.stdlib_module_names, "stableavatar"}}


@pytest.mark.parametrize("program", ["inference.py", "train.py"])
def test_a_program_starts_with_what_is_listed(program):
    listed = {re.split("[<>=]", line)[0] for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()}
    needed = imported_at_start(ROOT / program)
    assert {module: at for module, at in needed.items() if BROUGHT_ALONG.get(module, module.replace("_", "-")) not in listed} == {}
    assert {"torch", "soundfile", "omegaconf"} <= needed.keys(), "imports are not followed"


def test_python_3_10_can_import_it():
    assert [(at, name) for at, module, name in imports(CODE) if (module, name) in NEWER_THAN_3_10 or module == "tomllib"] == []


def test_public_functions_of_the_library_are_typed():
    bare = []
    for at, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef), LIBRARY):
        named = [item for item in node.args.args + node.args.kwonlyargs if item.arg not in ("self", "cls")]
        untyped = node.returns is None or any(item.annotation is None for item in named)
        if not node.name.startswith("_") and untyped:
            bare.append(f"{at} {node.name} lacks types")
    modules = [f"{name_of(path)} lacks a docstring" for path in LIBRARY if path.stat().st_size and ast.get_docstring(TREES[path]) is None]
    assert bare + modules == []


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_setting_is_read_outside_config(config):
    readers = [path for path in CODE if path.name != "config.py"]
    read = {node.attr for _, node in nodes(ast.Attribute, readers) if isinstance(node.ctx, ast.Load)}
    assert [key for key in settings(config()) if key.rpartition(".")[2] not in read] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_yaml_loads(path):
    load_config(CONFIGS[path.parent.name], path)


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.stem)
def test_a_launcher_names_configurations_that_are_there(path):
    if match := re.search(r'/train\.sh" (\S+) (\S+) "\$@"$', path.read_text().strip()):
        assert (ROOT / f"configs/train/{match[1]}.yaml").is_file() and (ROOT / f"accelerate_config/{match[2]}.yaml").is_file()
    else:
        named = re.findall(r"configs/train/(\w+)\.yaml", path.read_text())
        assert named or not path.stem.startswith(("train_", "finetune_")), "it calls no configuration"
        assert all((ROOT / f"configs/train/{name}.yaml").is_file() for name in named)


def test_files_are_small_and_name_no_machine():
    text = {".py", ".sh", ".md", ".yaml", ".toml", ".txt", ".cff", ".json"}
    wrong = []
    for path in repository_files():
        if path.stat().st_size > FILE_BYTES:
            wrong.append(f"{name_of(path)}: {path.stat().st_size} bytes")
        if path.suffix in text:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if re.search(r"(?<![\w.])/(work|farm|root|home)/|\b(TODO|FIXME)\b", line) and path != Path(__file__):
                    wrong.append(f"{name_of(path)}:{number}: {line.strip()[:100]}")
    assert wrong == []

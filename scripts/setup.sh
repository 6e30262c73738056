#!/usr/bin/env bash
# Makes .venv in the project's root and installs what the program needs; with the word data also what data preparation needs, with evaluation
# what evaluation needs as well, with dev all that the tests need.
# Running it again does nothing until the requirements change. PYTHON=/path/to/python chooses the interpreter (3.10 to 3.12).
#   bash scripts/setup.sh [data|evaluation|dev]
set -euo pipefail
cd "$(dirname "$0")/.."

all="requirements.txt requirements-data.txt requirements-evaluation.txt requirements-dev.txt"  # each holds those before it
requirements=requirements${1:+-$1}.txt
case " $all " in
    *" $requirements "*) enough="$requirements${all#*"$requirements"}" ;;
    *) echo "error: got $1; expected data, evaluation, dev or nothing" >&2; exit 2 ;;
esac
wanted() { echo "$(cat requirements.txt requirements-data.txt requirements-evaluation.txt requirements-vocals.txt "$1" pyproject.toml | cksum) $PWD"; }
works() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }

ready() {
    works .venv/bin/python || return 1
    for name in $enough; do if [ "$(cat ".venv/installed-$name" 2>/dev/null)" = "$(wanted "$name")" ]; then return 0; fi; done
    return 1
}

if ready; then exit 0; fi
if command -v flock >/dev/null; then  # machines that share the folder take turns
    exec 9>.setup.lock
    flock 9
    if ready; then exit 0; fi
fi

if ! { works .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
    for python in ${PYTHON:-python3 python3.11 python3.12 python3.10 python}; do
        if works "$python"; then found=$python; break; fi
    done
    if [ -z "${found:-}" ]; then
        echo "error: no Python 3.10, 3.11 or 3.12 on this machine (looked for ${PYTHON:-python3, python3.11, python3.12, python3.10, python}); install one, or say PYTHON=/path/to/python" >&2
        exit 2
    fi
    echo "Making .venv with $("$found" --version)"
    if ! "$found" -m venv --clear .venv; then
        echo "error: $found cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
    fi
fi

echo "Installing $requirements into .venv (the first time takes some minutes)"
.venv/bin/python -m pip install --disable-pip-version-check --progress-bar on -r "$requirements" | sed -u -n 's/^\(Collecting [^ ]*\|Installing collected\|Downloading [^ ]*\).*/  \1/p'
if [ "$requirements" != requirements.txt ]; then  # mediapipe and insightface bring OpenCV's windows, for which servers lack libraries
    .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --force-reinstall opencv-python-headless
fi
if [ "$requirements" = requirements-dev.txt ]; then
    .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target .venv/vocals -r requirements-vocals.txt
    # Only its maths is wanted; it asks for torchvision, which has no build beside a torch without a GPU.
    .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target .venv/fidelity 'torch-fidelity>=0.4'
fi
.venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -e .
wanted "$requirements" >".venv/installed-$requirements"

#!/usr/bin/env bash
# Sets up and runs the tests, the whole suite in two processes; further words go to pytest.
#   bash scripts/test.sh [-k name] [-x] [tests/test_config.py]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev

# A folder or file among the words replaces the whole suite.
where="tests -n 2 --dist loadfile"
for word in "$@"; do if [ -e "${word%%::*}" ]; then where=; fi; done
if [ -n "$where" ]; then export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"; fi  # threads of two processes would wait for each other
exec .venv/bin/python -m pytest $where "$@"

#!/usr/bin/env bash
# Sets up and runs the tests; further words go to pytest.
#   bash scripts/test.sh [-k name] [-x] [tests/test_config.py]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev

# A folder or file among the words replaces the whole suite.
where=tests
for word in "$@"; do if [ -e "${word%%::*}" ]; then where=; fi; done
exec .venv/bin/python -m pytest $where "$@"

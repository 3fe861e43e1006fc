#!/usr/bin/env bash
# Prints the interpreter that .venv is made from: the one asked for, else the first that will do.
# It must be Python 3.11 or newer and able to make a virtual environment.
set -euo pipefail

asked="${1:-}"
check='import ensurepip, sys, venv; raise SystemExit(sys.version_info < (3, 11))'

if [ -n "$asked" ]; then
  candidates=("$asked")
else
  candidates=(python3 python3.13 python3.12 python3.11 python)
fi

for candidate in "${candidates[@]}"; do
  if "$candidate" -c "$check" >/dev/null 2>&1; then
    echo "$candidate"
    exit 0
  fi
done

{
  echo "nestlearn needs Python 3.11 or newer, able to make virtual environments. Tried:"
  for candidate in "${candidates[@]}"; do
    if version="$("$candidate" -c 'import sys; print(sys.version.split()[0])' 2>/dev/null)"; then
      if "$candidate" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then
        why="has no venv or ensurepip module (on Debian: install python3-venv)"
      else
        why="too old"
      fi
      echo "  $candidate: $version, $why"
    else
      echo "  $candidate: not found"
    fi
  done
  echo "Install a newer Python, or name one: make setup PYTHON=/path/to/python3.12"
} >&2
exit 1

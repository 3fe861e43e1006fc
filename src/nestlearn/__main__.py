"""``python -m nestlearn``: the same as the ``nestlearn`` command."""

from nestlearn.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())

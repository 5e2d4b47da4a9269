"""`python -m gpuglass` is the `gpuglass` command."""

from gpuglass.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

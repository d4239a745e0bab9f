"""``python -m vitkd_cli`` is ``vitkd``."""

from vitkd_cli.cli import main

if __name__ == "__main__":
    main()

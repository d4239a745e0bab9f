"""The ``vitkd`` command: parse, call the library, print."""

from vitkd_cli.cli.main import main

__all__ = ["main"]

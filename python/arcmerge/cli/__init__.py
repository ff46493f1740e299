"""The command `arcmerge`: a file for each of its commands, which parses, calls the package and prints."""

from arcmerge.cli.command import main

__all__ = ["main"]

"""Fuzzing: reading files from others, changed at random, must end with a result or an ArcmergeError.

`make fuzz` runs `python -m fuzz` over targets.py, guided by coverage (atheris); tests/test_fuzz.py runs a few
inputs of each target.
"""

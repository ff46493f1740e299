"""Fuzzing: files that strangers wrote, changed at random, must end in a result or in an ArcmergeError.

`make fuzz` runs `python -m fuzz` over targets.py, guided by coverage (atheris); tests/test_fuzz.py runs a few of each.
"""

"""The architectures that csrc/cuda is compiled for. setup.py reads this file too, so it imports nothing."""

# Code for one architecture has a letter, and runs on no other; the others run on all that are newer.
TARGETS = ("sm_80", "sm_90a", "sm_100a", "sm_120")

"""The error of a program that is wrong on a GPU."""


class Fault(AssertionError):
    """An order, a wait or an access that a GPU does not allow, or whose result depends on chance."""

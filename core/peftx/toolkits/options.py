"""Validators of options that several plugins have. Without torch, since `peftx validate` runs them."""

from __future__ import annotations


def whole_steps(value: float) -> float:
    """For options that are a share of the run below 1, and from 1 on a number of steps.

        _whole = field_validator("prune")(whole_steps)

    Raises:
        ValueError: a number of steps that is not whole.
    """
    if value >= 1 and value != int(value):
        raise ValueError("from 1 on it is a number of steps, and must be whole")
    return value

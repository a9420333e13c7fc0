"""For tests of plugins: the conformance kit, tiny models of every architecture, inputs for them, a tokenizer.

from peftx.testing import conformance
test_conformance = conformance("propulsion")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_WHERE = {
    "ARCHITECTURES": "peftx.testing.models",
    "CORE_ARCHITECTURES": "peftx.testing.models",
    "example_inputs": "peftx.testing.models",
    "output_of": "peftx.testing.models",
    "tiny": "peftx.testing.models",
    "tiny_tokenizer": "peftx.testing.models",
    "Case": "peftx.testing.case",
    "assert_close": "peftx.testing.case",
    "assert_equal": "peftx.testing.case",
    "difference": "peftx.testing.case",
    "Check": "peftx.testing.checks",
    "conformance": "peftx.testing.kit",
    "loopback_hub": "peftx.testing.hub",
    "CheckResult": "peftx.testing.kit",
    "plan_checks": "peftx.testing.kit",
    "run_checks": "peftx.testing.kit",
}

__all__ = [
    "ARCHITECTURES",
    "CORE_ARCHITECTURES",
    "Case",
    "Check",
    "CheckResult",
    "assert_close",
    "assert_equal",
    "conformance",
    "difference",
    "example_inputs",
    "loopback_hub",
    "output_of",
    "plan_checks",
    "run_checks",
    "tiny",
    "tiny_tokenizer",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'peftx.testing' has no attribute '{name}'")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from peftx.testing.case import Case, assert_close, assert_equal, difference
    from peftx.testing.checks import Check
    from peftx.testing.hub import loopback_hub
    from peftx.testing.kit import CheckResult, conformance, plan_checks, run_checks
    from peftx.testing.models import (
        ARCHITECTURES,
        CORE_ARCHITECTURES,
        example_inputs,
        output_of,
        tiny,
        tiny_tokenizer,
    )

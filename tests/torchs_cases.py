"""torch's own cases for its modules, from its own tests."""

from types import ModuleType
from typing import Any

import pytest
from torch import nn


def module_cases() -> ModuleType:
    """The module of torch's tests; without what they import, the test that asks is skipped."""
    return pytest.importorskip(
        "torch.testing._internal.common_modules",
        reason="torch's own test cases need the packages that torch's tests do, such as expecttest",
    )


def module_info(name: str) -> Any:
    """What torch's tests know of ``torch.nn``'s module of that name."""
    wanted = getattr(nn, name)
    return next(info for info in module_cases().module_db if info.module_cls is wanted)

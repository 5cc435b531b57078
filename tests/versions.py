"""What PyTorch 2.6, the oldest version that the library takes, cannot do itself."""

import pytest
import torch

OLDEST = torch.__version__.startswith("2.6.")


def skip_in_oldest(why: str) -> pytest.MarkDecorator:
    """Skip a test of what is beyond this version of PyTorch, with any layer."""
    return pytest.mark.skipif(OLDEST, reason=f"PyTorch 2.6: {why}")

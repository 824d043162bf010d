from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tide_mega.parallel.groups import make_host_group


@pytest.mark.parametrize(
    ("given", "expected"), [((), timedelta(minutes=30)), ((2880.0,), timedelta(hours=48))]
)
def test_a_host_group_waits_as_long_as_asked(alone, given, expected):
    group = make_host_group(*given)
    assert group._get_backend(torch.device("cpu")).options._timeout == expected
    dist.destroy_process_group(group)

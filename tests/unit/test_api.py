"""The public names: all there, and the package light."""

import subprocess
import sys

import pytest

import hyena_dist
from hyena_dist.api import MODULES


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_there(name):
    found = getattr(hyena_dist, name)
    assert found.__name__ == name
    assert name in dir(hyena_dist)
    assert found.__doc__, "a public name is documented"


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version
    assert hyena_dist.__version__ == version("hyena-dist")


def test_other_names_are_none():
    with pytest.raises(AttributeError, match="no attribute 'Hyena'"):
        _ = hyena_dist.Hyena
    with pytest.raises(ImportError, match="cannot import name 'Hyena'"):
        from hyena_dist import Hyena  # noqa: F401


def test_importing_the_package_imports_nothing_heavy_and_a_name_no_engine():
    code = ("import sys, hyena_dist; heavy = [m for m in ('torch', 'numpy', 'deepspeed', 'megatron') if m in "
            "sys.modules]; assert not heavy, heavy; from hyena_dist import Config; assert 'torch' not in sys.modules; "
            "from hyena_dist import build_model; assert 'deepspeed' not in sys.modules; import torch.distributed; "
            "assert not torch.distributed.is_initialized()")
    subprocess.run([sys.executable, "-c", code], check=True)

"""The modules and the names of ``lesa_kernels``."""

import importlib
import pkgutil
from functools import reduce

import pytest

import lesa_kernels

MODULES = [info.name for info in pkgutil.walk_packages(lesa_kernels.__path__, "lesa_kernels.")]


@pytest.mark.parametrize("name", MODULES)
def test_no_function_shadows_a_module_of_its_name(name):
    """``import lesa_kernels.ops.combine.cpu as x`` reads one attribute after another, so none may be a function."""
    if name.rpartition(".")[2] in ("kernels", "launch"):
        pytest.importorskip("triton")
    module = importlib.import_module(name)
    assert reduce(getattr, name.split(".")[1:], lesa_kernels) is module


def test_every_operation_has_the_same_files():
    operations = {name.split(".")[2] for name in MODULES if name.startswith("lesa_kernels.ops.")}
    assert operations == {
        *("combine", "fused_output_head", "gram_row", "kan_linear", "kan_predict", "prediction_error")
    }
    for operation in operations:
        for file in ("reference", "op"):
            assert f"lesa_kernels.ops.{operation}.{file}" in MODULES
    for operation in operations - {"gram_row"}:  # gram_row uses a kernel of combine
        for file in ("kernels", "launch"):
            assert f"lesa_kernels.ops.{operation}.{file}" in MODULES


@pytest.mark.parametrize(("old", "new"), [("head", "fused_output_head"), ("residual", "prediction_error")])
def test_an_old_name_works_and_the_warning_has_the_new_one(old, new):
    with pytest.warns(DeprecationWarning, match=f"lesa_kernels.{old} is now called {new}"):
        assert getattr(lesa_kernels, old) is getattr(lesa_kernels, new)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lesa_kernels.nothing  # noqa: B018

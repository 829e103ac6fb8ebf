"""The public names of ``lesa``, and what importing it loads."""

import subprocess
import sys

import pytest

import lesa


@pytest.mark.parametrize("name", lesa.__all__)
def test_a_public_name_exists_and_has_a_docstring(name):
    assert getattr(lesa, name).__doc__


def test_a_renamed_class_is_found_by_its_old_name_with_a_warning():
    with pytest.warns(DeprecationWarning, match="lesa.ErrorGram is now called OutputErrorGram"):
        assert lesa.ErrorGram is lesa.OutputErrorGram
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lesa.nothing  # noqa: B018


def test_importing_lesa_loads_no_evaluation_no_adapter_and_no_pipeline_library():
    program = (
        "import sys, lesa; "
        "print([name for name in sys.modules if name.startswith(('lesa.evaluation', 'lesa.adapters', 'lesa.demo', "
        "'lesa.cli', 'diffusers', 'transformers', 'cache_dit', 'triton', 'matplotlib'))])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"

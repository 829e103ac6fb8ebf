"""README.md and docs/: every number comes from a committed result, and every link leads somewhere."""

import json
import re
from importlib.metadata import version

import pytest

from benchmarks.report import drawing, registry

registry.find_parts()
DOCUMENTS = {path.relative_to(registry.ROOT).as_posix(): path for path in registry.ROOT.glob("docs/*.md")}
DOCUMENTS["README.md"] = registry.ROOT / "README.md"
RESULTS = sorted(registry.RESULTS.rglob("*.json"))


@pytest.mark.parametrize("document", registry.documents())
def test_every_measured_part_comes_from_the_committed_results(document):
    text = DOCUMENTS[document].read_text()
    assert registry.rendered(document, text) == text, "make report writes it again"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_marker_belongs_to_a_part(document):
    names = re.findall(r"<!-- end of (.+?) -->", DOCUMENTS[document].read_text())
    assert {(document, name) for name in names} <= registry.PARTS.keys()


@pytest.mark.parametrize("path", registry.PICTURES)
def test_every_picture_is_drawn_from_the_committed_results(path):
    entry = registry.PICTURES[path]
    measured = registry.load(entry.result)
    if measured is None:
        assert not (registry.ROOT / path).exists()
        return
    drawn = drawing.svg(entry.draw(measured))
    if f"matplotlib=={version('matplotlib')}" not in (registry.ROOT / "constraints.txt").read_text().split():
        pytest.skip("another matplotlib than the pinned one draws the same numbers a little differently")
    assert drawn == (registry.ROOT / path).read_text(), "make report draws it again"


def test_a_missing_result_is_shown_as_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "RESULTS", tmp_path)
    made = registry.Part("README.md", "a table", "a.json", "python -m a", write=str)
    assert made.text() == "Not measured yet: `python -m a` writes `benchmarks/results/a.json`."


def test_a_part_without_markers_is_an_error():
    with pytest.raises(ValueError, match="has 0 places"):
        registry.rendered("README.md", "nothing is marked here")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_pictures_exist(document):
    path = DOCUMENTS[document]
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_python_examples_use_names_that_exist():
    import lesa

    names = {
        name
        for path in DOCUMENTS.values()
        for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.S)
        for name in re.findall(r"\blesa\.([A-Za-z_]\w*)\(", block)
    }
    assert names
    assert [name for name in names if not hasattr(lesa, name)] == []


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_name_device_versions_and_commit(path):
    measured = json.loads(path.read_text())
    for row in measured if isinstance(measured, list) else [measured]:
        assert {"device", "versions", "commit"} <= row["environment"].keys()
        assert "+changes" not in (row["environment"]["commit"] or "")

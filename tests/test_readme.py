import json
import re
from pathlib import Path

from benchmarks.readme import RESULTS, ROOT, rendered

README = (ROOT / "README.md").read_text()


def test_every_measured_part_comes_from_the_committed_results():
    assert rendered(README) == README


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\((?!https?://|#)([^)]+)\)", README)
    assert targets
    assert all((ROOT / target).exists() for target in targets)


def test_python_examples_use_names_that_exist():
    import lesa

    names = set(re.findall(r"\blesa\.([A-Za-z_]\w*)\(", README))
    assert names
    assert all(hasattr(lesa, name) for name in names)


def test_results_name_what_they_were_measured_on():
    for path in Path(RESULTS).glob("*.json"):
        for row in json.loads(path.read_text()):
            assert {"device", "versions", "commit"} <= row["environment"].keys()
            assert "+changes" not in (row["environment"]["commit"] or "")

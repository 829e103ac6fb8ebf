"""Folders and the Hugging Face Hub: predictors are saved, loaded, pushed, and described by a model card."""

import fnmatch
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

import lesa
from lesa.files import hub
from tests.lesa.adapters.diffusers import tiny
from tests.lesa.strategies import schedule

STEPS = 10
PLAN = lesa.StepPlan.paper(STEPS, 4)
STREAMS = [("transformer", "cond"), ("transformer", "uncond")]
REPORT = [
    {"method": "full sampler", "plan": "every step", "full_steps": 10, "speedup_ideal": 1.0, "psnr": None},
    {
        "method": "LESA | ours",
        "plan": "paper N=4",
        "full_steps": 5,
        "speedup_ideal": 2.0,
        "psnr": 33.274,
        "samples": 16,
        "unheard_of": 7,
        "environment": {"device": "a slow one", "versions": {"torch": "2.13.0", "triton": None}, "commit": "abc"},
    },
]


def fitted_predictor(seed=0):
    """A random predictor with the description of a fitted one."""
    torch.manual_seed(seed)
    predictor = lesa.LesaPredictor(lesa.LesaConfig(STEPS, hidden_dim=4))
    predictor.plan, predictor.schedule, predictor.losses = PLAN, schedule(STEPS), {"guided": [0.5, 0.25]}
    return predictor


def equal(a, b):
    """Whether two predictors have the same config and weights."""
    return a.config == b.config and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


class Hub:
    """A stand-in for the Hub: each repository is a folder, and the downloaded files are listed in ``fetched``."""

    def __init__(self, root):
        self.root, self.fetched, self.offline = root, [], False

    def repository(self, name):
        return self.root / name / "snapshots" / "c0ffee"

    def snapshot_download(self, name, *, allow_patterns, revision, **options):
        if self.offline:
            raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder\nmore lines")
        if not self.repository(name).is_dir():
            response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError("404 Not Found", response=response)
        assert revision in (None, "c0ffee", "v1")
        target = self.root / "cache" / name / "snapshots" / "c0ffee"
        for path in self.repository(name).rglob("*"):
            file = path.relative_to(self.repository(name)).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / file)
                self.fetched.append(file)
        target.mkdir(parents=True, exist_ok=True)
        return str(target)

    def create_repo(self, repo_id, **options):
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, self.repository(repo_id))
        return f"https://hub.invalid/{repo_id}/commit/c0ffee"


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A stand-in for the Hugging Face Hub."""
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr("lesa.files.hub.snapshot_download", made.snapshot_download)
    monkeypatch.setattr("lesa.api.folders.HfApi", lambda token=None: made)
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", lambda token=None: made)
    return made


@pytest.fixture
def no_hub(monkeypatch):
    """Any request to the Hub fails the test."""

    def refuse(*_, **__):
        raise AssertionError("the Hub was contacted")

    monkeypatch.setattr("lesa.files.hub.snapshot_download", refuse)


@pytest.mark.usefixtures("no_hub")
def test_saved_predictors_are_loaded_from_a_folder(tmp_path):
    predictor = fitted_predictor()
    lesa.save(predictor, tmp_path / "one")
    for loaded in (lesa.load(tmp_path / "one"), lesa.LesaPredictor.from_pretrained(str(tmp_path / "one"))):
        assert equal(predictor, loaded)
        assert (loaded.plan, loaded.losses) == (PLAN, predictor.losses)
        assert torch.equal(loaded.schedule, predictor.schedule)
    both = {stream: fitted_predictor(seed) for seed, stream in enumerate(STREAMS)}
    lesa.save(both, tmp_path / "both")
    loaded = lesa.load(tmp_path / "both")
    assert list(loaded) == STREAMS
    assert all(equal(both[stream], loaded[stream]) for stream in STREAMS)


def test_predictors_are_pushed_to_the_hub_and_loaded_from_it(fake_hub):
    predictor = fitted_predictor()
    address = predictor.push_to_hub("user/one", report=REPORT)
    assert address == "https://hub.invalid/user/one/commit/c0ffee"
    assert equal(predictor, lesa.load("user/one", revision="v1"))
    assert equal(predictor, lesa.LesaPredictor.from_pretrained("user/one"))
    card = (fake_hub.repository("user/one") / "README.md").read_text()
    assert 'lesa.enable(pipeline, "user/one")' in card
    assert "33.27 dB" in card
    both = {stream: fitted_predictor(seed) for seed, stream in enumerate(STREAMS)}
    assert lesa.push_to_hub(both, "user/both").endswith("commit/c0ffee")
    loaded = lesa.load("user/both")
    assert all(equal(both[stream], loaded[stream]) for stream in STREAMS)
    assert lesa.push_to_hub(predictor, "user/other").endswith("commit/c0ffee")
    assert equal(predictor, lesa.load("user/other"))


def test_only_the_files_of_lesa_are_downloaded(fake_hub):
    lesa.push_to_hub({stream: fitted_predictor() for stream in STREAMS}, "user/both")
    repository = fake_hub.repository("user/both")
    for file in ("model.safetensors", "unet/config.json", "unet/model.safetensors", "v1.0/model.safetensors"):
        (repository / file).parent.mkdir(exist_ok=True)
        (repository / file).write_text("{}")
    (repository / "v1.0" / "config.json").write_text('{"library": "diffusers"}')
    lesa.load("user/both")
    ours = [
        f"transformer.{branch}/{file}" for branch in ("cond", "uncond") for file in ("config.json", hub.WEIGHTS_FILE)
    ]
    assert sorted(set(fake_hub.fetched)) == sorted([*ours, "v1.0/config.json"])


def test_a_repository_of_another_library_is_refused_before_the_download(fake_hub):
    repository = fake_hub.repository("user/bert")
    repository.mkdir(parents=True)
    (repository / "model.safetensors").write_bytes(bytes(100))
    for config in ("{}", "[", "[" * 100_000, '{"library": "transformers"}', "[1]"):
        (repository / "config.json").write_text(config)
        with pytest.raises(ValueError, match="user/bert of the Hugging Face Hub holds nothing that lesa has written"):
            lesa.load("user/bert")
    assert fake_hub.fetched == ["config.json"] * 5


def test_a_folder_named_config_json_is_not_read_as_a_config(fake_hub):
    lesa.push_to_hub(fitted_predictor(), "user/one")
    odd = fake_hub.root / "cache" / "user/one" / "snapshots" / "c0ffee" / "v1.0" / "config.json"
    odd.mkdir(parents=True)
    assert equal(fitted_predictor(), lesa.load("user/one"))


def test_a_folder_is_preferred_to_a_repository_of_the_same_name(tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    lesa.save(fitted_predictor(), "user/one")
    assert equal(fitted_predictor(), lesa.load("user/one"))


def test_an_unreachable_repository_raises_an_error_that_says_what_was_tried(tmp_path, fake_hub):
    with pytest.raises(FileNotFoundError, match=r"no folder user/none.*private or gated.*hf auth login.*404 Not Found"):
        lesa.load("user/none")
    fake_hub.offline = True
    with pytest.raises(FileNotFoundError, match=r"no folder user/one.*HF_HUB_OFFLINE.*\(Cannot find[^\n]*\)$"):
        lesa.load("user/one")


def test_a_repository_in_the_local_hub_cache_is_loaded_offline(tmp_path):
    """Uses huggingface_hub itself and its cache layout, a snapshot of links to files."""
    lesa.save({stream: fitted_predictor(seed) for seed, stream in enumerate(STREAMS)}, tmp_path / "made")
    repository = tmp_path / "cache" / "models--user--both"
    commit = "0123456789abcdef0123456789abcdef01234567"
    for path in (tmp_path / "made").rglob("*.*"):
        if path.is_file():
            link = repository / "snapshots" / commit / path.relative_to(tmp_path / "made")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for options in ({}, {"local_files_only": True}, {"revision": commit}):
        loaded = lesa.load("user/both", cache_dir=tmp_path / "cache", **options)
        assert all(equal(fitted_predictor(seed), loaded[stream]) for seed, stream in enumerate(STREAMS))
    with pytest.raises(FileNotFoundError, match=r"no folder user/other, and no such repository .* on this machine"):
        lesa.load("user/other", cache_dir=tmp_path / "cache")


@pytest.mark.usefixtures("no_hub")
def test_names_that_are_not_repositories_are_not_requested_from_the_hub(tmp_path):
    for name in ("nowhere", "./a/b", "/a/b", "../a", "a/b/c", "~/nowhere", Path("user/one")):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            lesa.load(name)
    (tmp_path / "flux.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a file.*lesa\.load_official"):
        lesa.load(tmp_path / "flux.pt")
    with pytest.raises(FileNotFoundError, match=r"holds nothing that lesa has written: it should have config\.json"):
        lesa.load(tmp_path)
    lesa.save({stream: fitted_predictor() for stream in STREAMS}, tmp_path / "both")
    with pytest.raises(FileNotFoundError, match=r"lesa\.load reads folders with a predictor for each branch"):
        lesa.LesaPredictor.from_pretrained(tmp_path / "both")


def test_streams_that_are_not_valid_folder_names_are_refused(tmp_path):
    for stream in [("transformer", "../out"), ("transformer", ""), ("a.b", "cond"), ("/tmp", "x")]:
        with pytest.raises(ValueError, match=r"by \(component, branch\)"):
            lesa.save({stream: fitted_predictor()}, tmp_path / "made")
    with pytest.raises(ValueError, match=r"by \(component, branch\)"):
        lesa.save({}, tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("guided", [False, True])
def test_enable_accepts_a_folder_and_uses_its_plan(tmp_path, guided):
    predictor = fitted_predictor()
    predictor.schedule = None
    lesa.save({("transformer", "cond"): predictor} if guided else predictor, tmp_path / "made")
    pipeline = tiny.pipeline()
    made = {}
    for name, forecaster in {"folder": str(tmp_path / "made"), "memory": predictor}.items():
        with lesa.enable(pipeline, forecaster) as handle:
            made[name] = tiny.generate(pipeline)
            assert handle.records[0].full == list(PLAN.full_steps)
    assert torch.equal(made["folder"], made["memory"])


def test_a_predictor_without_a_plan_needs_one_from_the_caller():
    predictor = lesa.LesaPredictor(lesa.LesaConfig(STEPS, hidden_dim=4))
    with pytest.raises(ValueError, match="say which steps are full"):
        lesa.enable(tiny.pipeline(), predictor)
    other = fitted_predictor()
    other.plan = lesa.StepPlan(STEPS, [0, 5])
    with pytest.raises(ValueError, match="say which steps are full"):
        lesa.enable(tiny.pipeline(), dict(zip(STREAMS, [fitted_predictor(), other], strict=True)))


def test_errors_about_another_schedule_give_the_differing_noise_levels():
    predictor = fitted_predictor()
    with pytest.raises(ValueError, match="another schedule of 10 steps") as refusal:
        predictor.table(PLAN, schedule(STEPS, shift=0.2))
    message = str(refusal.value)
    made_for, given = (f"{schedule(STEPS, shift)[7]:.4f}" for shift in (1.15, 0.2))
    assert f"made for the noise levels 1.0000, {schedule(STEPS)[1]:.4f}, " in message
    assert f"furthest apart at step 7: {made_for} and {given}" in message
    assert "Sample as it was fitted, fit one on this schedule, or set predictor.schedule = None" in message
    table = predictor.table(PLAN, schedule(STEPS))
    with pytest.raises(ValueError, match=f"furthest apart at step 7: {made_for} and {given}"):
        table.table(PLAN, schedule(STEPS, shift=0.2))
    with pytest.raises(ValueError, match=r"made for 10 steps, the plan has 28; sample 10 steps .* or fit a predictor"):
        predictor.table(lesa.StepPlan.paper(28, 4), schedule(28))
    with pytest.raises(ValueError, match="made for 10 steps, the plan has 28; give a plan for 10 steps"):
        lesa.enable(tiny.pipeline(), predictor, lesa.StepPlan.paper(28, 4))


def test_the_model_card_describes_the_predictor_and_the_measurements(tmp_path):
    rows = tmp_path / "report.json"
    rows.write_text(json.dumps(REPORT))
    fitted_predictor().save_pretrained(tmp_path, report=rows)
    text = (tmp_path / "README.md").read_text()
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "lesa"
    assert {"lesa", "model_hub_mixin"} <= set(card.data.tags)
    lines = text.splitlines()
    assert "| full steps | 0, 1, 2, 3, 6 (2.00x fewer than all) |" in lines
    assert f"| noise levels | 1.0000, {schedule(STEPS)[1]:.4f}, {schedule(STEPS)[2]:.4f}, ..., " in text
    assert "| training, guided | mean absolute error 0.5000 to 0.2500 in 2 batches |" in lines
    assert "| full steps | method | count | ideal | PSNR |" in lines
    assert "| every step | full sampler | 10 | 1.00x |  |" in lines
    assert "| paper N=4 | LESA / ours | 5 | 2.00x | 33.27 dB |" in lines
    assert "16 samples, against the full sampler on the same seeds." in lines
    assert "Measured on a slow one: torch 2.13.0; lesa at abc." in lines
    assert "unheard" not in text


def test_a_model_card_is_replaced_unless_the_user_wrote_it(tmp_path):
    fitted_predictor().save_pretrained(tmp_path, report=REPORT)
    unknown = lesa.LesaPredictor(lesa.LesaConfig(20, hidden_dim=4))
    unknown.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "for 20 steps" in text
    assert "Measured" not in text
    assert "lesa.StepPlan.paper(20, interval=7)" in text
    (tmp_path / "README.md").write_text("mine")
    fitted_predictor().save_pretrained(tmp_path, report=REPORT)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("report", [{"method": "LESA"}, ["LESA"], 7])
def test_an_invalid_report_is_refused_before_anything_is_written(tmp_path, report):
    with pytest.raises(ValueError, match="a report is a list of rows"):
        fitted_predictor().save_pretrained(tmp_path / "made", report=report)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["config"].update(num_steps="50"),
        lambda d: d["config"].update(unheard_of=1),
        lambda d: d["config"].update(boundaries=7),
        lambda d: d["config"].update(num_steps=None),
        lambda d: d["config"].update(num_steps=10**15),
        lambda d: d["config"].update(anchors=[1.0, 0.0]),
        lambda d: d.update(config=[]),
        lambda d: d.update(schedule=[1, 2, 3]),
        lambda d: d.update(schedule="1"),
        lambda d: d.update(schedule=[float("nan")] * STEPS),
        lambda d: d.update(plan={"num_steps": STEPS}),
        lambda d: d.update(plan={"num_steps": STEPS, "full_steps": [3]}),
        lambda d: d.update(plan=[]),
    ],
)
def test_an_invalid_config_file_is_refused(tmp_path, change):
    fitted_predictor().save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    change(description)
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"config\.json does not describe a LESA predictor"):
        lesa.load(tmp_path)


def test_no_memory_is_allocated_for_weights_that_are_not_in_the_file(tmp_path):
    fitted_predictor().save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    description["config"]["hidden_dim"] = 10**4  # 2.4 GB
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"another configuration: timestep\.0\.layers\.0\.base_weight is \[4, 11\]"):
        lesa.load(tmp_path)


def test_predictors_saved_without_a_plan_are_loaded(tmp_path):
    fitted_predictor().save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    del description["plan"], description["losses"]
    (tmp_path / "config.json").write_text(json.dumps(description))
    loaded = lesa.load(tmp_path)
    assert (loaded.plan, loaded.losses) == (None, {})

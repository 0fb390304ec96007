"""Prefect's UI in Debian's Chromium: the form, the run's page, Retry. Mark `browser`.

    python -m pytest -m browser -o addopts= tests/test_browser.py

Screenshots are kept where DITTY_SCREENSHOTS says.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from ditty.runs.rundir import RunDir
from tests.served import Serving, serving, tiny_spec

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture
def page() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(90_000)
        yield page
        browser.close()


def keep(page: Any, name: str, whole: bool = False) -> None:
    """Keep a screenshot for people."""
    if folder := os.environ.get("DITTY_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=whole)


def test_a_run_from_the_form_fails_at_upload_and_is_retried(tmp_path: Path, page: Any) -> None:
    spec = tiny_spec(tmp_path, "from-the-browser", steps=60)
    blocker = tmp_path / "target" / "renamed" / "final"
    blocker.parent.mkdir(parents=True)
    blocker.write_text("a file where the upload's folder should be")
    with serving(tmp_path) as served:
        with served.client() as client:
            deployment = client.read_deployment_by_name("finetune/finetune")
            client.update_deployment(deployment.id, _defaults(spec))
        run_id = _submit(page, served, deployment.id)
        run = RunDir.named("renamed", served.home)
        served.wait(lambda: served.state(run_id) in ("Failed", "Completed", "Crashed"), 240)
        assert served.state(run_id) == "Failed", served.logs()
        states = served.ended_tasks(run_id)
        assert states["train", "Completed"] == 1 and states["upload", "Failed"] == 1, states
        assert len(run.attempts("train")) == 1

        blocker.unlink()
        page.goto(f"{served.url}/v2/runs/flow-run/{run_id}")
        page.get_by_role("tab", name="Task Runs").wait_for()  # the page is whole
        page.locator("button[aria-haspopup=menu]").first.click()
        keep(page, "failed")
        page.get_by_role("menuitem", name="Retry").click()
        page.get_by_role("alertdialog").get_by_role("button", name="Retry").click()
        served.wait(lambda: served.state(run_id) == "Completed", 240)
        states = served.ended_tasks(run_id)
        for stage in ("load", "tokenize", "pack", "train"):
            assert states[stage, "Cached"] == 1, states
        assert len(run.attempts("train")) == 1, "training ran again"
        assert (tmp_path / "target" / "renamed" / "final").is_dir()
        _see_the_report(page, served, run_id)


def _defaults(spec: dict[str, Any]) -> Any:
    from prefect.client.schemas.actions import DeploymentUpdate

    return DeploymentUpdate(parameters={"spec": spec})


def _submit(page: Any, served: Serving, deployment: Any) -> Any:
    """Open the deployment's form, rename the run in it, submit it; the flow run's id."""
    page.goto(f"{served.url}/v2/deployments/deployment/{deployment}/run")
    page.get_by_text("learning_rate", exact=False).first.wait_for()
    text = page.inner_text("body")
    for key in ("seq_len", "base_model", "sharding", "num_machines", "checkpoints"):
        assert key in text, f"the form has no {key}"
    name = page.locator("textarea, input").filter(has_text="from-the-browser").first
    name.fill("renamed")
    keep(page, "form")
    end = time.monotonic() + 60
    with served.client() as client:
        while not (runs := client.read_flow_runs()):
            assert time.monotonic() < end, page.inner_text("body")
            # A click while the page still validates what was typed is lost.
            page.get_by_role("button", name="Submit").click()
            page.wait_for_timeout(5000)
    assert runs[0].parameters["spec"]["name"] == "renamed"
    return runs[0].id


def _see_the_report(page: Any, served: Serving, run: Any) -> None:
    """The run's page, and the picture of the loss, shown by the browser itself."""
    page.goto(f"{served.url}/v2/runs/flow-run/{run}?tab=Artifacts")
    page.get_by_text("report-renamed").first.wait_for()
    page.get_by_text("lineage-renamed").first.wait_for()
    page.wait_for_timeout(3000)  # the graph of the tasks is drawn
    keep(page, "run", whole=True)
    with served.client() as client:
        (report,) = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["report-renamed"]))
        )
    page.goto(f"{served.url}/v2/artifacts/artifact/{report.id}")
    image = page.locator("img[alt=loss]")
    image.wait_for()
    assert image.evaluate("image => image.complete && image.naturalWidth") >= 600
    keep(page, "report", whole=True)
    page.get_by_role("link", name="what the result is made of").click()
    with served.client() as client:
        found = {a.key: a.id for a in client.read_artifacts()}
    page.get_by_text(str(found["lineage-renamed"])[:8]).first.wait_for()
    page.goto(f"{served.url}/v2/artifacts/artifact/{found['lineage-renamed']}")
    page.get_by_text("tokenize").first.wait_for()
    keep(page, "lineage", whole=True)

"""A reader opens a notebook in JupyterLab, runs it and moves the step scrubber."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
NO_CHROMIUM = (
    "Chromium was not found: install it (on Debian: apt-get install chromium), or set "
    "DLM_CHROMIUM to a Chrome or Chromium, or leave this test out: -m 'not browser'"
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    installed = filter(None, map(shutil.which, names))
    return (
        os.environ.get("DLM_CHROMIUM")
        or next(installed, None)
        or pytest.fail(NO_CHROMIUM)
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_up(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")


@pytest.fixture
def lab(tmp_path):
    """JupyterLab with fresh settings on a copy of the notebooks: folder, url(path)."""
    folder, config = tmp_path / "project", tmp_path / "config"
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    (folder / "data").symlink_to(ROOT / "data")
    page_config = config / "labconfig" / "page_config.json"
    page_config.parent.mkdir(parents=True)
    no_news = {"@jupyterlab/apputils-extension:announcements": True}
    page_config.write_text(json.dumps({"disabledExtensions": no_news}))
    port, token, log = free_port(), secrets.token_hex(16), tmp_path / "jupyter.log"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={folder}"]
    command += [
        f"--IdentityProvider.token={token}",
        "--LabApp.expose_app_in_browser=True",
    ]
    homes = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    places = dict.fromkeys(homes, str(config)) | {"IPYTHONDIR": str(config)}
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=os.environ | places, stdout=output, stderr=output
        )
    try:
        base = f"http://127.0.0.1:{port}"
        wait_until_up(f"{base}/api/status?token={token}", server, log)
        yield folder, lambda path: f"{base}/lab/tree/{path}?token={token}"
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture
def page(tmp_path):
    """A page of a fresh headless Chromium, and the errors on its console."""
    errors = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=find_chromium(),
            headless=True,
            args=FLAGS,
            viewport={"width": 1280, "height": 900},
        )
        page = browser.pages[0]
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda m: m.type == "error" and errors.append(f"{m.text} ({m.location})"),
        )
        yield page, errors
        browser.close()


RUN_ALL = """async () => {
  const panel = window.jupyterapp.shell.currentWidget;
  await panel.revealed;
  await panel.sessionContext.ready;
  await window.jupyterapp.commands.execute("notebook:run-all-cells");
  return panel.content.model.toJSON().cells.flatMap(cell => cell.outputs ?? []);
}"""
# JupyterLab draws a cell only when it comes near the window.
SHOW_CELL = """async (text) => {
  const notebook = window.jupyterapp.shell.currentWidget.content;
  const index = notebook.widgets.findIndex(
    cell => cell.model.type == "code" && cell.model.sharedModel.source.includes(text));
  notebook.activeCellIndex = index;
  await notebook.scrollToItem(index, "center");
}"""


WIDGET_CELLS = """() => {
  const cells = window.jupyterapp.shell.currentWidget.content.widgets;
  return cells.flatMap((cell, index) => cell.model.type == "code"
    && /crubber\\(/.test(cell.model.sharedModel.source) ? [index] : []);
}"""
SHOW_INDEX = """async (index) => {
  const notebook = window.jupyterapp.shell.currentWidget.content;
  notebook.activeCellIndex = index;
  await notebook.scrollToItem(index, "center");
}"""
OTHERS = sorted(
    path.name
    for path in (ROOT / "notebooks").glob("*.ipynb")
    if "crubber(" in path.read_text() and not path.name.startswith("03")
)


def expect_step(page: Page, step: int) -> None:
    """The step that the widget shows."""
    shown = page.locator(".dlm-scrubber .dlm-step")
    expect(shown).to_have_attribute("data-step", str(step), timeout=5_000)


def test_scrubber_moves_by_mouse_and_by_keyboard(lab, page):
    folder, url = lab
    page, errors = page
    (path,) = folder.glob("notebooks/03_*.ipynb")
    page.goto(url(path.relative_to(folder)))
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
    outputs = page.evaluate(RUN_ALL)
    failed = [o["ename"] for o in outputs if o["output_type"] == "error"]
    assert outputs and not failed
    page.evaluate(SHOW_CELL, "show.scrubber(")
    scrubber = page.locator(".dlm-scrubber")
    scrubber.scroll_into_view_if_needed(timeout=30_000)
    expect_step(page, 0)
    before = scrubber.inner_text()

    handle = scrubber.locator("[role=slider]")
    last = int(float(handle.get_attribute("aria-valuemax")))
    handle.focus()
    for step in (1, 2):
        page.keyboard.press("ArrowRight")
        expect_step(page, step)
    page.keyboard.press("ArrowLeft")
    expect_step(page, 1)
    assert scrubber.inner_text() != before

    track = scrubber.locator(".noUi-target").bounding_box()
    page.mouse.click(track["x"] + track["width"] / 2, track["y"] + track["height"] / 2)
    page.wait_for_function(
        "() => document.querySelector('.dlm-scrubber .dlm-step').dataset.step > 1"
    )
    middle = int(scrubber.locator(".dlm-step").get_attribute("data-step"))
    assert abs(middle - last / 2) <= 1
    assert errors == []


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_widget_follows_its_slider(lab, page, name):
    """Traces, thresholds, graphs: one key press shows another frame."""
    _, url = lab
    page, errors = page
    page.goto(url(f"notebooks/{name}"))
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
    outputs = page.evaluate(RUN_ALL)
    failed = [o["ename"] for o in outputs if o["output_type"] == "error"]
    assert outputs and not failed
    moved = 0
    for index in page.evaluate(WIDGET_CELLS):
        page.evaluate(SHOW_INDEX, index)
        widget = page.locator(".jp-mod-active .dlm-scrubber")
        widget.wait_for(timeout=30_000)
        view, handle = widget.locator(".widget-html"), widget.locator("[role=slider]")
        before = view.inner_html()
        handle.focus()
        page.keyboard.press("ArrowRight")
        expect(handle).to_have_attribute("aria-valuenow", re.compile("^1"))
        expect(view).not_to_have_js_property("innerHTML", before, timeout=5_000)
        moved += 1
    assert moved >= 1
    assert errors == []

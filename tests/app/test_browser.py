"""The page in Chromium: making, switching, cancelling, two visitors at once.

DUALOUT_SCREENSHOTS names a directory that keeps what the page looked like.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import tempfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from PIL import Image

from dualout import Denoiser, Dual, Epsilon, InputError, schedules
from dualout.app.page import LETTERS, Results, Visit, _make
from dualout.app.server import serve
from dualout.app.studio import Studio
from dualout.cli.main import main
from dualout.networks.build import build

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,1000",
)  # fmt: skip
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver on this machine")


def _has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as trial:
            trial.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory, found = tmp_path_factory.mktemp("runs"), []
    for name, parameterization, levels in (("dual", Dual(), 1000), ("eps", Epsilon(), 1000), ("short", Dual(), 4)):
        torch.manual_seed(0)
        network = build("tiny:width=8", 1, (8, 8), parameterization.channels(1))
        denoiser = Denoiser(network, parameterization, schedules.Linear(levels))
        denoiser.save_pretrained(directory / name, image={"channels": 1, "size": [8, 8]})
        found.append(str(directory / name))
    return found


@pytest.fixture(scope="module")
def studio(runs):
    return Studio(runs)


@pytest.fixture(scope="module")
def address(studio):
    page, address = serve(studio)
    yield address
    page.close(verbose=False)


@pytest.fixture
def look(tmp_path):
    """Takes a screenshot, in which something is to be seen."""
    directory = Path(os.environ.get("DUALOUT_SCREENSHOTS", tmp_path))
    directory.mkdir(parents=True, exist_ok=True)

    def take(driver, name):
        path = directory / f"{name}.png"
        assert driver.save_screenshot(str(path))
        with Image.open(path) as seen:
            assert len(seen.convert("RGB").getcolors(2**24)) > 50

    return take


@contextmanager
def browser(address, downloads=None):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in FLAGS:
        options.add_argument(flag)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    if downloads is not None:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.get(address)
        wait(driver, lambda: driver.find_elements("css selector", "#start") and "Ready" in status(driver))
        yield driver
    finally:
        driver.quit()


def wait(driver, condition, seconds=120):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds).until(lambda _: condition())


def status(driver):
    return driver.find_element("id", "status").text


def press(driver, selector):
    element = driver.find_element("css selector", selector)
    wait(driver, element.is_enabled)
    driver.execute_script("arguments[0].click()", element)


def make(driver):
    # every status is noted by the page: small images are made between two looks from here
    driver.execute_script("""
        const e = document.querySelector('#status'), told = window.told = [];
        window.watch?.disconnect();
        window.watch = new MutationObserver(() => told.push(e.innerText));
        window.watch.observe(e, {childList: true, characterData: true, subtree: true});""")
    press(driver, "#start")

    def made():
        told = driver.execute_script("return window.told")
        began = next((i for i, text in enumerate(told) if "Working" in text or "step" in text), None)
        return began is not None and any("images of" in text for text in told[began:])

    wait(driver, made)
    return picture(driver)


def picture(driver, letter="A", what="picture"):
    """The image that is shown, as the browser has it."""
    script = """
        const i = document.querySelector(arguments[0]);
        if (!i || !i.complete || !i.naturalWidth) return null;
        const c = document.createElement('canvas');
        c.width = i.naturalWidth; c.height = i.naturalHeight;
        c.getContext('2d').drawImage(i, 0, 0);
        return c.toDataURL();"""
    return wait(driver, lambda: driver.execute_script(script, f"#{what}-{letter} img"))


def choose(driver, letter, text):
    """One of the routes."""
    press(driver, f"#route-{letter} input[value='{text}']")


def choose_model(driver, letter, name):
    driver.find_element("css selector", f"#run-{letter} input").click()
    wait(driver, lambda: driver.find_elements("css selector", "[role=option]"))
    next(o for o in driver.find_elements("css selector", "[role=option]") if o.text.endswith(name)).click()


def command(driver, letter="A"):
    return driver.find_element("css selector", f"#command-{letter} textarea").get_attribute("value") or ""


def asked_elsewhere(driver, address):
    """The addresses outside the page's server that the browser was made to ask for, refused ones included."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith(address) for url in asked)
    return [url for url in asked if url.startswith(("http", "ws")) and not url.startswith(address)]


@needs_browser
def test_a_visit(address, look):
    with browser(address) as driver:
        learned = make(driver)
        assert picture(driver, what="film")
        assert picture(driver, what="ratio")
        assert "--route" not in command(driver)
        look(driver, "desktop")
        # the same seeds by another route are other images, and back again the same
        choose(driver, "A", "eps only")
        assert make(driver) != learned
        assert "--route eps" in command(driver)
        choose(driver, "A", "as trained")
        assert make(driver) == learned
        assert driver.find_element("id", "download").is_displayed()
        assert asked_elsewhere(driver, address) == []


@needs_browser
def test_a_mistake_is_told_and_work_can_be_cancelled(address, studio, look, monkeypatch):
    make_at_once, looked = studio.make, []

    def make_slowly(request):
        for item in make_at_once(request):
            looked.append(item)
            time.sleep(0.2)
            yield item

    monkeypatch.setattr(studio, "make", make_slowly)
    with browser(address) as driver:
        calibrated = driver.find_element("xpath", "//label[contains(., 'Calibrated')]//input")
        driver.execute_script("arguments[0].click()", calibrated)
        press(driver, "#start")
        wait(driver, lambda: "has no calibration" in status(driver))
        look(driver, "mistake")
        driver.execute_script("arguments[0].click()", calibrated)
        steps = driver.find_element("css selector", "#steps-A input[type=number]")
        steps.clear()
        steps.send_keys("100\t")
        start = driver.find_element("id", "start")
        # before the first step, between steps and in the middle of one; the mistake told of steps too
        for after in (0.0, 0.1, 0.5, 0.7):
            looked.clear()
            press(driver, "#start")
            wait(driver, lambda: not start.is_enabled())
            if after:
                wait(driver, lambda: "Working" in status(driver) or "of 100" in status(driver))
                time.sleep(after)
            press(driver, "#cancel")
            wait(driver, start.is_enabled)
            done = len(looked)
            time.sleep(0.5)
            assert status(driver) == "Stopped."
            assert len(looked) == done < 50


@needs_browser
def test_what_gradio_refuses_itself_leaves_a_page_that_works(address):
    def put(selector, text):
        field = driver.find_element("css selector", selector)
        field.clear()
        field.send_keys(text)

    with browser(address) as driver:
        # beyond a slider's end, which is checked before any code of ours
        put("#images input[type=number]", "100")
        press(driver, "#start")
        wait(driver, lambda: "Nothing was made" in status(driver))
        put("#images input[type=number]", "16\t")
        put("#seed input", "-1\t")
        press(driver, "#start")
        wait(driver, lambda: "the seed is 0 or more" in status(driver))
        put("#seed input", "7\t")
        # a model of fewer levels than the steps that were asked of another
        put("#steps-A input[type=number]", "50\t")
        choose_model(driver, "A", "short")
        wait(
            driver,
            lambda: driver.find_element("css selector", "#steps-A input[type=number]").get_property("value") == "4",
        )
        make(driver)
        assert "--seed 7" in command(driver)
        assert "--steps 4" in command(driver)


@needs_browser
def test_two_browsers_do_not_disturb_each_other(address):
    with browser(address) as one, browser(address) as other:
        choose(one, "A", "x0 only")
        press(one, "#start")
        alone = make(other)
        wait(one, lambda: "images of" in status(one))
        assert "--route x0" in command(one)
        assert "--route" not in command(other)
        assert picture(one) != alone
        assert make(other) == alone


@needs_browser
def test_two_settings_side_by_side_and_their_archive(address, runs, look, tmp_path):
    with browser(address, tmp_path) as driver:
        tab = next(b for b in driver.find_elements("css selector", "button[role=tab]") if "Setting B" in b.text)
        driver.execute_script("arguments[0].click()", tab)
        wait(driver, lambda: driver.find_elements("css selector", "#used-B input"))
        press(driver, "#used-B input")
        choose_model(driver, "B", "eps")
        # a model with one output has one route
        wait(driver, lambda: len(driver.find_elements("css selector", "#route-B input")) == 1)
        assert make(driver) != picture(driver, "B")
        assert shlex.split(command(driver, "B"))[2] == runs[1]
        look(driver, "two-settings")
        press(driver, "#download")
        with zipfile.ZipFile(wait(driver, lambda: next(tmp_path.glob("*.zip"), None))) as archive:
            names = archive.namelist()
            made_by = archive.read("B/command.txt").decode().strip()
        assert {name.partition("/")[0] for name in names} == {"A", "B"}
        assert made_by == command(driver, "B")


@needs_browser
def test_it_fits_a_phone(address, look):
    with browser(address) as driver:
        driver.set_window_size(400, 900)
        make(driver)
        wide, shown = (
            driver.execute_script(f"return document.documentElement.{k}") for k in ("scrollWidth", "clientWidth")
        )
        assert wide <= shown
        look(driver, "phone")


def test_nothing_is_left_in_the_temporary_directory(studio, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    column = [True, runs[0], "ddim", "trailing", 1, 0, "as trained", 0.5, False, 1, None]
    values = (0, 2, 0, *column, *(2 * [False, *column[1:]]))
    results = [Results(*(f"{what} {letter}" for what in Results._fields)) for letter in LETTERS]
    served = []
    for changes in _make(studio, Visit(wanted=True), values, "status", "download", results):
        if path := changes["download"].get("value") if "download" in changes else None:
            served += zipfile.ZipFile(path).namelist()
    assert "A/000001.png" in served
    assert list(tmp_path.iterdir()) == []


def test_a_visitor_can_neither_upload_nor_use_this_machines_token(address):
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nfull\r\n--x--\r\n'
    sent = {"Content-Type": "multipart/form-data; boundary=x"}
    asked = (Request(f"{address}gradio_api/upload", form, sent), f"{address}gradio_api/run-history/buckets")
    answers = []
    for one in asked:
        with pytest.raises(HTTPError) as refused:
            urlopen(one)
        answers.append(refused.value.code)
    assert answers == [413, 404]


def test_a_taken_port_is_told(runs):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} is taken"):
            serve(Studio(runs[:1]), port=port)


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
def test_an_address_of_ipv6(runs):
    page, address = serve(Studio(runs[2:]), "::1")
    page.close(verbose=False)
    assert address.startswith("http://[::1]:")
    # a model of 4 levels is not offered 10 steps
    assert [c["props"]["value"] for c in page.config["components"] if c["props"].get("label") == "Steps K"] == [4] * 3


@pytest.mark.parametrize("host", ["1.5", "==", "no such name"])
def test_a_host_that_is_not_here_is_told(runs, host):
    with pytest.raises(InputError, match=f"cannot listen at --host {host}"):
        serve(Studio(runs[:1]), host)


def test_the_command_refuses_what_it_cannot_show(tmp_path, capsys):
    assert main(["app", str(tmp_path / "nothing")]) == 2
    assert main(["app", str(tmp_path), "--port", "70000"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_without_gradio_it_says_what_to_install(runs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(InputError, match=r"dualout\[app\]"):
        serve(Studio(runs[:1]))

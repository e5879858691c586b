"""The page, in a real browser: it is clicked, sorted, searched and followed, and must ask nobody for anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from mixmask.engine.errors import UserError
from mixmask.engine.expected import Expectation
from mixmask.engine.predictions import SHEET
from mixmask.evaluate.collect import Run, collect
from mixmask.evaluate.comparison import compare
from mixmask.evaluate.headline import DEMO_CAVEAT, caveats, finding
from mixmask.evaluate.report import write_report
from tests.evaluate.made import backbone, laboratory, transfer, write
from tests.needs import needed_browser

playwright = pytest.importorskip("playwright.sync_api")

HOSTILE = "<img src=x onerror=alert(1)>\"'&</script><b>|名前"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the laboratory, with a hostile run, a log, pictures, an expectation, a damaged and an unfinished run."""
    root = tmp_path_factory.mktemp("lab")
    runs = write(laboratory(), root / "runs")
    of = backbone()
    changes = dict.fromkeys(("name", "framework", "dataset"), HOSTILE)
    strange = transfer(of, "knn", {"knn/top1": 12.3}, dataset="cifar100").model_copy(
        update={**changes, "fingerprint": "strange", "environment": {HOSTILE: HOSTILE}}
    )
    place = runs / "transfer" / "strange"
    place.mkdir()
    strange.write(place / "record.json")
    (place / "recipe.yaml").write_text(f"name: '{HOSTILE}'\n", encoding="utf-8")
    for record in laboratory():
        folder = runs / record.stage / f"{record.name}-{record.fingerprint}"
        if record.stage == "pretrain" and record.pretrain_epochs:
            lines = [
                {"step": s, "of": 100, "loss": 7 - s / 50, "clean": 3.0, "mixmask": 4 - s / 50, "seconds": s, "lr": 0.1}
                for s in range(10, 101, 10)
            ]
            (folder / "log.jsonl").write_text("".join(json.dumps({**line, "note": HOSTILE}) + "\n" for line in lines))
        if record.protocol == "detect_voc":
            Image.new("RGB", (64, 32), "orange").save(folder / SHEET)
    expected = Expectation(metric="knn/top1", value=70.0, tolerance=0.5, source="us")
    record = transfer(backbone(method="unmix", seed=7), "knn", {"knn/top1": 60.0}).model_copy(
        update={"expected": (expected,)}
    )
    write([record], runs)
    (runs / "pretrain" / "going").mkdir()
    (runs / "pretrain" / "going" / "recipe.yaml").write_text("")
    (runs / "pretrain" / "half").mkdir()
    (runs / "pretrain" / "half" / "record.json").write_text('{"schema": 2, <script>')
    return write_report(collect(runs), root / "report")


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    found = needed_browser()
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: object, page_file: Path) -> Iterator[object]:
    """The page, opened from disk; at the end it must have asked for nothing and complained of nothing."""
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    opened = context.new_page()
    heard: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: heard.append(str(error)))
    opened.on("dialog", lambda dialog: heard.append(f"dialog: {dialog.message}"))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(page_file.as_uri())
    yield opened
    outside = [url for url in asked if not url.startswith(("data:", page_file.as_uri()))]
    context.close()
    assert outside == []
    assert heard == []


def column(page: object, table: str, number: int) -> list[str]:
    cells = page.locator(f"{table} tbody tr > *:nth-child({number})").all()
    return [cell.inner_text() for cell in cells if cell.is_visible()]


def test_a_heading_sorts_up_and_down(page: object) -> None:
    button = page.locator("#run-table thead button", has_text="Epochs")
    button.click()
    epochs = [float(text.replace(",", "")) for text in column(page, "#run-table", 7) if text]
    assert epochs == sorted(epochs)
    button.click()
    epochs = [float(text.replace(",", "")) for text in column(page, "#run-table", 7) if text]
    assert epochs == sorted(epochs, reverse=True)
    assert page.locator("#run-table th[aria-sort=descending]").count() == 1
    of_table = page.locator("#table-5 thead button").nth(1)
    of_table.focus()
    page.keyboard.press("Enter")  # a keyboard does as well
    shown = [float(text.split()[0]) for text in column(page, "#table-5", 2) if text and text[0].isdigit()]
    assert shown == sorted(shown)
    assert len(shown) > 3


def test_search_and_filters_narrow_the_runs(page: object) -> None:
    total = len(column(page, "#run-table", 1))
    assert page.locator("#count").inner_text() == f"{total} of {total} runs"
    page.select_option("select >> nth=4", "Un-Mix")
    some = column(page, "#run-table", 6)
    assert set(some) == {"Un-Mix"}
    assert page.locator("details.run:visible").count() == len(some)
    page.fill("#search", "unmix knn")
    fewer = column(page, "#run-table", 1)
    assert 0 < len(fewer) < len(some)
    page.fill("#search", "no such run")
    assert page.locator("#count").inner_text() == f"0 of {total} runs"
    page.keyboard.press("Enter")  # does not reload
    page.fill("#search", "")
    page.select_option("select >> nth=4", "")
    assert len(column(page, "#run-table", 1)) == total


def followed(page: object, link: object) -> object:
    """The run that ``link`` leads to, once the page's script has opened it."""
    address = link.get_attribute("href")
    link.click()
    run = page.locator(f"details.run{address}:target[open]")
    run.wait_for()
    return run


def test_a_number_leads_to_its_run(page: object) -> None:
    target = followed(page, page.locator("#table-7 td a", has_text="57.0").first)
    text = target.inner_text()
    assert "torchvision" in text
    assert "mixmask transfer" in text
    assert "NVIDIA H200" in text
    assert "git checkout 0000" in text
    assert target.locator("img").evaluate("image => image.naturalWidth") == 64
    backbone_run = followed(page, target.locator("a[href^='#run-']").first)
    assert "loss" in backbone_run.inner_text()
    assert "Measured on it" in backbone_run.inner_text()


def test_a_mean_opens_its_seeds(page: object) -> None:
    cell = page.locator("#table-7 details.runs").first
    cell.locator("summary").click()
    links = cell.locator("a").all()
    assert [link.inner_text().split(":")[0] for link in links] == [
        f"seed {seed} (backbone 0)" if seed else "seed 0" for seed in range(5)
    ]
    assert followed(page, links[3]).is_visible()


def test_the_page_is_whole(page: object) -> None:
    assert page.locator("#checks .bad").inner_text() == "no"
    assert page.locator("#left-out li").count() == 2
    images = page.locator("#plots img")
    assert images.count() >= 6
    assert all(image.evaluate("image => image.complete && image.naturalWidth") > 100 for image in images.all())
    assert all(image.get_attribute("alt") for image in images.all())
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids))
    broken = page.evaluate(
        """[...document.querySelectorAll('a[href^="#"]')].map(a => a.hash.slice(1))
        .filter(id => !document.getElementById(id))"""
    )
    assert broken == []


def test_hostile_names_are_shown_as_they_are(page: object) -> None:
    assert HOSTILE in column(page, "#run-table", 1)
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("document.scripts.length") == 2  # the data and the program


@pytest.mark.parametrize("width", [390, 1280, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_any_window_in_light_and_dark(page: object, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 21, 23)")


def test_a_table_is_copied_in_three_forms(page: object, page_file: Path) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for form, start in (("Markdown", "**Table 7"), ("LaTeX", "% needs"), ("CSV", "table,row,column")):
        button = page.locator(f"button[data-table='7'][data-copy='{form}']")
        button.click()
        page.wait_for_function("([form, id]) => document.querySelector(`button[data-table='${id}'][data-copy='${form}']`)"
                               ".textContent === 'copied'", arg=[form, "7"])  # fmt: skip
        assert page.evaluate("navigator.clipboard.readText()").startswith(start)


def test_two_runs_are_set_side_by_side(page: object) -> None:
    page.fill("#search", "knn vanilla")
    boxes = page.locator("#run-table tbody tr:visible input")
    boxes.nth(0).check()
    assert page.locator("#pair").inner_text() == "Choose a second run to compare with."
    boxes.nth(1).check()
    lines = {line.locator("th").first.inner_text(): line.inner_text() for line in page.locator("#pair tbody tr").all()}
    assert "knn/top1" in lines
    assert any(key in lines for key in ("pretrain.epochs", "seed", "pretrain.seed"))
    assert page.locator("#run-table input:enabled").count() == 2  # a third one has no place
    boxes.nth(1).uncheck()
    assert page.locator("#run-table input:enabled").count() > 2


def test_it_begins_with_the_finding(page: object) -> None:
    finding = page.locator("header .finding").inner_text()
    assert finding.startswith("Compared with vanilla at 95 % confidence: ")
    assert "above vanilla" in finding
    assert "mixmask 0" in page.locator("header").inner_text()
    assert page.locator(".caveat").count() == 0


def test_the_demo_and_single_runs_claim_nothing() -> None:
    runs = [
        Run(Path(method), transfer(backbone(method=method), "knn", {"knn/top1": top1}, dataset="demo-shapes"))
        for method, top1 in (("vanilla", 40.0), ("mixmask", 60.0))
    ]
    said = finding(runs, compare(runs[1:], runs[:1]))
    assert said.startswith("Every backbone has a single run, so nothing is said here about which method is better.")
    assert caveats(runs) == [DEMO_CAVEAT]
    assert finding([], []).startswith("Nothing has been measured")


@pytest.mark.parametrize("width", [700, 1040])  # pixels of A4 in portrait and landscape, without margins
def test_nothing_is_clipped_in_print(page: object, width: int) -> None:
    page.emulate_media(media="print")
    page.set_viewport_size({"width": width, "height": 1000})
    wide = page.evaluate(
        "limit => [...document.querySelectorAll('figure.table table, #run-table, #plots img')]"
        ".filter(one => one.getBoundingClientRect().right > limit + 1).map(one => one.closest('[id]').id)",
        width,
    )
    assert wide == []


@pytest.mark.parametrize("width", [390, 1280])
def test_a_table_that_scrolls_says_so_and_keeps_its_first_column(page: object, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    region = page.locator("#table-methods .scroll")
    hidden = region.evaluate("one => one.scrollWidth - one.clientWidth")
    page.wait_for_function(
        "more => document.querySelector('#table-methods .scroll').classList.contains('more-right') === more",
        arg=hidden > 1,
    )
    before = region.locator("tbody tr").first.locator("> *").first.bounding_box()["x"]
    region.evaluate("one => one.scrollTo(200, 0)")
    assert region.locator("tbody tr").first.locator("> *").first.bounding_box()["x"] == pytest.approx(before, abs=1)


def test_it_prints_without_its_controls(page: object) -> None:
    page.emulate_media(media="print")
    assert page.locator(".controls").is_visible() is False
    assert page.locator("#details").is_visible() is False
    assert page.locator("#table-7").is_visible()


@pytest.mark.slow
def test_links_to_folders_lead_there(page_file: Path) -> None:
    text = page_file.read_text()
    target = text.split('<p><a href="', 1)[1].split('"', 1)[0]
    assert (page_file.parent / target).is_dir()
    assert (page_file.parent / target / "record.json").is_file()


@pytest.mark.slow
def test_a_file_in_the_place_of_the_folder_is_refused(page_file: Path, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        write_report(collect(page_file.parent.parent / "runs"), tmp_path / "report")
    assert (tmp_path / "report").read_text() == "mine"


@pytest.mark.slow
def test_the_same_runs_give_the_same_page(page_file: Path) -> None:
    first = page_file.read_bytes()
    again = write_report(collect(page_file.parent.parent / "runs"), page_file.parent)
    assert again.read_bytes() == first

"""The search page in a real browser: words typed, sliders moved, a phone, the keyboard, and no request elsewhere."""

import pytest
from pages import find_chromium, make_search

from metaembed.app.page import launch

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
    pytest.mark.xdist_group("browser"),
]


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    return make_search(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def url(search):
    app, address, _ = launch(
        search.index, search.encoder, port=None, settings=search.source.settings, prevent_thread_lock=True, quiet=True
    )
    yield address
    app.blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, url):
    """Opens the page at a width. What it asked of other machines, and what went wrong in it, must be nothing."""
    contexts, wrong = [], []

    def visit(width=1200, height=850):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("request", lambda request: wrong.append(request.url) if foreign(request.url, url) else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        expect(page.get_by_role("textbox", name="Words")).to_be_visible(timeout=15_000)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def foreign(address, url):
    return not address.startswith((url, "data:", "blob:"))


def ask(page, words):
    page.get_by_role("textbox", name="Words").fill(words)
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#results button").first).to_be_visible(timeout=15_000)
    expect(page.locator("#looked .me-look")).to_be_visible(timeout=15_000)


def names(page):
    return page.locator("#results button").evaluate_all("all => all.map(one => one.ariaLabel)")


def expected(search, words, budget):
    state, _ = search.narrow(search.ask(words, None), *budget)
    found = [search._found(*hit) for hit in state.hits]
    return [f"{rank}: {hit.title}, score {hit.score:.2f}" for rank, hit in enumerate(found, 1)]


def test_words_are_typed_and_a_slider_is_moved_and_the_results_change(visit, search):
    page = visit()
    ask(page, "red apple")
    assert names(page) == expected(search, "red apple", (4, 8))
    slider = page.get_by_role("slider", name="Document vectors")
    slider.focus()
    page.keyboard.press("ArrowLeft")  # 7: from 8, the next that was trained is 4
    expect(page.locator("#facts")).to_contain_text("144 B")
    assert slider.input_value() == "4" and names(page) == expected(search, "red apple", (4, 4))
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#facts")).to_contain_text("36 B")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#facts")).to_contain_text("144 B")
    assert slider.input_value() == "4"
    ask(page, "blue fish")
    first = expected(search, "blue fish", (4, 4))[0]
    expect(page.locator("#results button").first).to_have_attribute("aria-label", first)


def test_a_result_is_chosen_and_its_attention_is_shown(visit):
    page = visit()
    ask(page, "red apple")
    page.get_by_role("button", name="note.md").click()
    expect(page.locator("#looked .me-tokens")).to_contain_text("green <b>boat</b>")
    page.get_by_role("button", name="picture 3").click()
    shown = page.locator("#looked .me-look img")
    expect(shown).to_be_visible()
    expect(page.get_by_role("button", name="picture 3")).to_have_attribute("aria-pressed", "true")
    before = shown.get_attribute("src")
    meta = page.locator("#meta input[type=number]")
    other = "2" if meta.input_value() != "2" else "3"
    meta.fill(other)
    meta.press("Enter")
    expect(page.locator("#looked")).to_contain_text(f"Meta Token {other}:")
    assert shown.get_attribute("src") != before
    page.get_by_label("Your query").check()
    expect(page.locator("#looked .me-tokens")).to_have_text("red apple")


def test_every_budget_is_side_by_side(visit, search):
    page = visit()
    ask(page, "red apple")
    page.get_by_role("tab", name="Every budget").click()
    rows = page.locator("#budgets tbody tr")
    expect(rows).to_have_count(len(search.budgets))
    expect(rows.nth(0)).to_contain_text("(1, 1)")
    assert rows.nth(0).locator("li").count() == 5


def test_results_are_counted_and_filtered_by_the_keyboard_and_a_wrong_filter_is_said(visit, search):
    page = visit()
    ask(page, "red apple")
    count, field = page.get_by_role("spinbutton", name="Results"), page.get_by_role("textbox", name="Filter")
    count.fill("3")
    expect(page.locator("#results button")).to_have_count(3)
    page.keyboard.press("Tab")
    expect(field).to_be_focused()
    page.keyboard.type('{"kind": "pdf"}')
    page.keyboard.press("Enter")
    expect(page.locator("#results button")).to_have_count(2)
    expect(page.locator("#results button").first).to_contain_text("report.pdf")
    field.fill("kind=pdf")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("The filter must be JSON, such as")
    field.fill("")
    page.keyboard.press("Tab")  # leaving the field is enough
    expect(page.locator("#results button")).to_have_count(3)
    assert names(page) == expected(search, "red apple", (4, 8))[:3]


def test_a_picture_is_uploaded_and_searched_for(visit, search):
    page = visit()
    root = search.source.settings.roots[0]
    page.locator("#picture input[type=file]").set_input_files(f"{root}/picture 4.png")
    expect(page.locator("#results button").first).to_be_visible()
    page.get_by_label("Your query").check()
    expect(page.locator("#looked .me-look img")).to_be_visible()


def test_all_fits_the_width_of_a_phone(visit):
    page = visit(390, 844)
    ask(page, "red apple")
    overflow = "document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(overflow) <= 0
    assert page.locator("#results button").first.bounding_box()["width"] > 140
    page.get_by_role("button", name="picture 2").click()  # what is shown of it lies below: the page goes there
    expect(page.locator("#looked img")).to_be_in_viewport()
    page.get_by_role("tab", name="Every budget").click()
    expect(page.locator("#budgets tbody tr").first).to_be_visible()
    assert page.evaluate(overflow) <= 0


def test_the_keyboard_is_enough(visit):
    """Type at once, Enter; Tab to a result, Enter; and the focus stays where it was."""
    page = visit()
    expect(page.get_by_role("textbox", name="Words")).to_be_focused()
    page.keyboard.type("red apple")
    page.keyboard.press("Enter")
    expect(page.locator("#looked .me-look")).to_be_visible()
    for _ in range(30):
        page.keyboard.press("Tab")
        rank = page.evaluate("document.activeElement.dataset.rank")
        if rank == "2":
            break
    assert rank == "2", "the third result cannot be reached"
    page.keyboard.press("Enter")
    third = page.locator("#results button").nth(2)
    expect(third).to_have_attribute("aria-pressed", "true")
    expect(third).to_be_focused()


def test_what_cannot_be_searched_for_is_said_in_a_sentence(visit):
    page = visit()
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#results")).to_contain_text("Type words, drop a picture, or both.")

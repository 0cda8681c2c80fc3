"""The page as a person uses it: with a mouse, by keyboard, on a phone, in the dark, on paper."""

from __future__ import annotations

import json
import re

import pytest

from hpc_supcon.config import load_config
from hpc_supcon.pages.page import render, write_page
from hpc_supcon.pages.runs import page_of_runs
from tests.run_folders import HOSTILE, full_run


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The page of two runs of three classes, with maps of 300 points."""
    root = tmp_path_factory.mktemp("runs")
    folders = [
        full_run(root / "a", "seed=0", name="first", accuracy=0.7),
        full_run(root / "b", "seed=0", "optim.lr=0.25", name="second", steps=30),
    ]
    write_page(root / "page.html", render(page_of_runs(folders)))
    return root / "page.html"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = full_run(tmp_path_factory.mktemp("runs") / "run")
    write_page(folder / "report.html", render(page_of_runs([folder])))
    return folder / "report.html"


def column(page, caption, number):
    rows = page.locator(f"table:has(caption:text-is('{caption}')) tbody tr")
    return rows.evaluate_all(f"rows => rows.map(row => row.cells[{number}].textContent.trim().split(' ')[0])")


def test_a_heading_sorts_its_table_by_numbers_with_the_mouse_and_the_keyboard(opened, path):
    page = opened(path)
    table = page.locator("table:has(caption:text-is('Scores'))")
    heading = table.locator("th", has_text="accuracy").first
    number = heading.evaluate("heading => heading.cellIndex")
    before = column(page, "Scores", number)
    heading.get_by_role("button").click()
    values = [float(value) for value in column(page, "Scores", number) if value]
    assert values == sorted(values, reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"
    page.keyboard.press("Enter")  # the heading has the focus
    assert [float(v) for v in column(page, "Scores", number) if v] == sorted(values)
    page.keyboard.press("Enter")
    assert column(page, "Scores", number) == before


def place_of(page, i):
    """Where point i of the map is on the screen, as its formula in assets/scatter.js tells without zoom."""
    return page.evaluate(
        """i => {
          const canvas = document.querySelector(".map .framed > canvas"), data = page.data;
          const map = data.runs[0].maps[0], points = page.uint16(map.points);
          const box = canvas.getBoundingClientRect(), margin = 12;
          const side = Math.min((box.width - 2 * margin) / map.shape, box.height - 2 * margin);
          const u = points[2 * i] / 65535 - 0.5, v = 0.5 - points[2 * i + 1] / 65535;
          return { x: box.x + box.width / 2 + u * side * map.shape, y: box.y + box.height / 2 + v * side,
                   index: page.uint32(map.index)[i], name: map.classes[page.uint16(map.labels)[i]] };
        }""",
        i,
    )


def shade_of_tip(page):
    return page.evaluate(
        """() => {
          const canvas = document.querySelector(".tip canvas");
          return canvas.getContext("2d").getImageData(4, 4, 1, 1).data[0];
        }"""
    )


@pytest.mark.parametrize("i", [0, 17, 140, 299])
def test_pointing_at_a_point_shows_its_class_and_its_image(opened, alone, i):
    page = opened(alone)
    at = place_of(page, i)
    page.mouse.move(at["x"], at["y"])
    tip = page.locator(".tip")
    tip.locator("canvas").wait_for()
    shown = re.fullmatch(r"(\w+), image (\d+)", tip.inner_text())
    # of points on top of each other, the nearest one
    near = place_of(
        page, page.evaluate("k => [...page.uint32(page.data.runs[0].maps[0].index)].indexOf(k)", int(shown[2]))
    )
    assert (near["x"] - at["x"]) ** 2 + (near["y"] - at["y"]) ** 2 < 2
    assert shown[1] == near["name"]
    assert abs(shade_of_tip(page) - int(shown[2]) % 256) < 12, "image k of the test is gray k"
    page.mouse.move(5, 5)
    assert tip.is_hidden()


def colors_of_map(page):
    """How many pixels of the map have each of the first three colors of the palette, nearly."""
    return page.evaluate(
        """() => {
          const canvas = document.querySelector(".map .framed > canvas"), n = [0, 0, 0];
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          const colors = [[0, 114, 178], [230, 159, 0], [0, 158, 115]];
          for (let i = 0; i < data.length; i += 4)
            if (data[i + 3] > 150) colors.forEach((c, k) => {
              if (Math.abs(data[i] - c[0]) + Math.abs(data[i + 1] - c[1]) + Math.abs(data[i + 2] - c[2]) < 24) n[k]++;
            });
          return n;
        }"""
    )


def test_a_class_of_the_legend_is_shown_alone_and_again_with_all(opened, alone):
    page = opened(alone)
    before = colors_of_map(page)
    assert min(before) > 100
    button = page.get_by_role("list", name="Classes").get_by_role("button", name="dog")
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    cat, dog, horse = colors_of_map(page)
    assert (cat, horse) == (0, 0)
    assert dog > 100
    at = next(place for i in range(300) if (place := place_of(page, i))["name"] == "cat")
    page.mouse.move(at["x"], at["y"])
    tip = page.locator(".tip")
    assert tip.is_hidden() or tip.inner_text().startswith("dog"), "only what is shown can be pointed at"
    button.click()
    page.mouse.move(5, 5)
    assert colors_of_map(page) == before


def test_zoom_pan_and_reset_move_the_map_and_bring_it_back(opened, alone):
    page = opened(alone)
    image = lambda: page.evaluate("document.querySelector('.map .framed > canvas').toDataURL()")  # noqa: E731
    before = image()
    canvas = page.locator(".map .framed > canvas")
    box = canvas.bounding_box()
    for act in (
        lambda: page.get_by_role("button", name="+").click(),
        lambda: page.mouse.dblclick(box["x"] + 200, box["y"] + 100),
        lambda: canvas.press("+"),
        lambda: [canvas.press("+"), canvas.press("Shift+ArrowLeft")],
        lambda: [canvas.focus(), page.mouse.move(box["x"] + 9, box["y"] + 9), page.mouse.wheel(0, -200)],
    ):
        act()
        page.mouse.move(5, 5)
        page.evaluate("document.activeElement.blur()")
        page.wait_for_function(
            "before => document.querySelector('.map .framed > canvas').toDataURL() !== before", arg=before
        )
        page.get_by_role("button", name="Reset").first.click()
        page.mouse.move(5, 5)
        assert image() == before


def test_the_arrow_keys_go_from_point_to_point_and_say_where(opened, alone):
    page = opened(alone)
    canvas = page.locator(".map .framed > canvas")
    told = set()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        canvas.press(key)
        assert page.locator(".tip").is_visible()
        told.add(page.locator(".map [role=status]").inner_text())
    assert all(re.fullmatch(r"(cat|dog|horse), image \d+", text) for text in told)
    assert len(told) >= 3


def test_maps_are_chosen_by_run_space_and_weights(opened, path):
    page = opened(path)
    status = page.locator(".map [role=status]")
    assert status.inner_text() == "t-SNE of the encoder embedding, 300 images"
    page.get_by_label("projection", exact=True).check()
    assert status.inner_text() == "PCA of the projection embedding, 300 images"
    page.get_by_label("before", exact=True).check()
    assert status.inner_text() == "t-SNE of the encoder embedding, 300 images"
    assert page.get_by_label("before", exact=True).is_checked()
    page.get_by_label("second", exact=True).check()
    assert page.get_by_label("before", exact=True).is_checked()
    page.reload()
    page.wait_for_selector(".map [role=status]:not(:empty)")
    assert page.get_by_label("before", exact=True).is_checked(), "what was chosen is kept"


def axis_label(page):
    return page.locator("#curves [role=img]").get_attribute("aria-label")


def test_curves_change_their_number_and_their_axis_and_are_hidden(opened, path):
    page = opened(path)
    curves = page.locator("#curves")
    assert axis_label(page) == "loss over step, 4 curves; see the values below"
    for axis, label in (("epoch", "epoch"), ("time", "time (s)"), ("images", "images")):
        curves.get_by_label(axis, exact=True).check()
        assert axis_label(page).startswith(f"loss over {label}")
    curves.get_by_label("accuracy", exact=True).check()
    assert axis_label(page).startswith("accuracy over images, 2 curves")
    curves.get_by_label("loss", exact=True).check()
    curves.get_by_role("button", name="first train").click()
    assert axis_label(page).startswith("loss over images, 3 curves")
    assert curves.get_by_role("button", name="first train").get_attribute("aria-pressed") == "false"
    curves.get_by_text("The values as a table").click()
    curves.locator("details tbody tr").first.wait_for()  # the table is filled when it is opened
    values = curves.locator("details tbody tr").evaluate_all(
        "rows => rows.map(r => [...r.cells].map(c => c.textContent))"
    )
    assert ["second train", "4", "4.6000"] in values
    assert not any(row[0] == "first train" for row in values)


def test_dragging_over_the_curves_zooms_in_and_reset_shows_all(opened, path):
    page = opened(path)
    plot = page.locator("#curves .u-over")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    picture = lambda: page.evaluate("document.querySelector('#curves canvas').toDataURL()")  # noqa: E731
    before = picture()
    page.mouse.move(box["x"] + 100, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 300, box["y"] + 60, steps=4)
    page.mouse.up()
    page.wait_for_function("before => document.querySelector('#curves canvas').toDataURL() !== before", arg=before)
    page.locator("#curves").get_by_role("button", name="Reset").click()
    page.mouse.move(5, 5)
    page.wait_for_function("before => document.querySelector('#curves canvas').toDataURL() === before", arg=before)


def test_cells_of_the_confusion_matrix_are_told_by_keyboard(opened, alone):
    page = opened(alone)
    canvas = page.locator("#confusion canvas")
    canvas.press("ArrowRight")
    status = page.locator("#confusion [role=status]")
    assert status.inner_text() == "true cat, predicted cat: 10, 83.3 % of its images"
    canvas.press("ArrowRight")
    assert status.inner_text() == "true cat, predicted dog: 2, 16.7 % of its images"


def test_settings_that_do_not_differ_are_hidden_until_asked_for(opened, path):
    page = opened(path)
    rows = page.locator("#settings tbody tr:visible")
    assert rows.count() == 1
    assert rows.first.inner_text().split() == ["optim.lr", "0.5", "0.25", str(load_config().optim.lr)]
    page.get_by_label("only what differs").uncheck()
    assert rows.count() > 100


def test_hostile_names_are_text_in_a_browser_too(opened, tmp_path):
    folder = full_run(tmp_path / "run", classes=HOSTILE, name="<script>alert(0)</script>")
    write_page(folder / "report.html", render(page_of_runs([folder])))
    page = opened(folder / "report.html")
    assert page.locator("h1").inner_text() == "<script>alert(0)</script>"
    names = page.get_by_role("list", name="Classes").locator(".name").all_text_contents()
    assert names == HOSTILE
    assert page.locator("script").count() == 2
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen_and_text_has_contrast(opened, path, scheme, width):
    page = opened(path, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    pairs = page.evaluate(
        """() => {
          const found = new Set(), opaque = (e) => {
            for (; e; e = e.parentElement) {
              const back = getComputedStyle(e).backgroundColor;
              if (back !== "rgba(0, 0, 0, 0)") return back;
            }
            return getComputedStyle(document.body).backgroundColor;
          };
          for (const e of document.querySelectorAll("body *"))
            if ([...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length
                && !e.closest(".off, script"))
              found.add(getComputedStyle(e).color + " on " + opaque(e));
          return [...found];
        }"""
    )
    assert len(pairs) >= 3

    def luminance(text):
        linear = [
            c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
            for c in (int(value) / 255 for value in re.findall(r"\d+", text)[:3])
        ]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for pair in pairs:
        dark, light = sorted(map(luminance, pair.split(" on ")))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"WCAG 2.2, 1.4.3: {pair}"


def test_everything_that_can_be_used_has_a_name_and_can_be_reached_by_tab(opened, path):
    page = opened(path)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll(
          "button, select, input, canvas[tabindex], [role=img], [role=region], svg")]
          .filter((e) => !(e.closest("[aria-hidden=true]") || e.getAttribute("aria-label") || e.textContent.trim()
            || e.labels?.length)).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    ids = page.locator("[id]").evaluate_all("all => all.map((e) => e.id)")
    assert len(set(ids)) == len(ids)
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map((e) => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    reached = []
    page.locator("body").focus()
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("`${document.activeElement.tagName} ${document.activeElement.textContent.trim()}`")
        )
    assert reached[0].startswith("A Skip")
    assert any(tag.startswith("CANVAS") for tag in reached)
    assert sum(tag.startswith("BUTTON") for tag in reached) >= 4
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", "the focus is seen"


def test_nothing_moves_for_those_who_asked_for_that(opened, path):
    page = opened(path, reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    animated = page.evaluate(
        "[...document.querySelectorAll('*')].filter((e) => parseFloat(getComputedStyle(e).transitionDuration)).length"
    )
    assert animated == 0


def test_paper_is_white_also_from_a_dark_screen(opened, path):
    page = opened(path, color_scheme="dark")
    back = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(back) != "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(back) == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(back) != "rgb(255, 255, 255)"
    assert len(page.pdf()) > 10_000


def test_a_page_without_a_script_still_tells_the_results(browser, path):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"file://{path}")
    assert "0.7000" in page.locator("#results").inner_text()
    assert page.locator("#settings tbody tr:visible").count() > 100
    context.close()


def test_a_part_that_cannot_be_drawn_leaves_the_others(browser, path, tmp_path):
    html = path.read_text()
    start = html.index('type="application/json" id="data">') + len('type="application/json" id="data">')
    end = html.index("</script>", start)
    data = json.loads(html[start:end])
    data["runs"][0]["maps"][0]["points"] = "nothing"
    (tmp_path / "broken.html").write_text(html[:start] + json.dumps(data) + html[end:])
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"file://{tmp_path}/broken.html")
    page.wait_for_selector("#curves canvas")
    assert "cannot be drawn" in page.locator(".map").inner_text()
    context.close()

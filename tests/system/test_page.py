"""The page of the server in a real browser: drop, answer, error, many tasks, by keyboard and in the dark."""

import base64

import pytest

import sounds
from browsing import launched
from restuning import load_backbone, serve
from restuning.problems import Segmentation
from restuning.serve import Limits
from serving import picture, running, save_task, save_tasks
from zoo import folders

pytestmark = pytest.mark.slow

DROP = """
([name, kind, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type: kind}));
  const target = document.getElementById("drop");
  for (const type of ["dragover", "drop"])
    target.dispatchEvent(new DragEvent(type, {dataTransfer: transfer, bubbles: true, cancelable: true}));
}
"""


@pytest.fixture(scope="module")
def browser():
    with launched() as opened:
        yield opened


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    tasks = save_tasks(folder, 1)
    tasks |= {f"more-{n:02}": tasks["t0"] for n in range(30)}
    backbone = load_backbone(f"hf:{folders.bert(folder / 'bert')}")
    tasks["places"] = save_task(
        load_backbone("restuning-tiny"),
        folder / "places.task",
        problem=Segmentation(),
        pool="grid",
    )
    labels = ["<b>good</b>", "<img src=x onerror=alert(1)>"]
    tasks["mood"] = save_task(backbone, folder / "mood.task", pool="mean", labels=labels)
    with running(serve.app(tasks, limits=Limits(pixels=10_000))) as found:
        yield found


@pytest.fixture
def page(browser, address):
    context = browser.new_context()
    made = context.new_page()
    made.set_default_timeout(20_000)
    made.problems, made.asked = [], []
    made.on("pageerror", lambda error: made.problems.append(str(error)))
    made.on("dialog", lambda dialog: made.problems.append(dialog.message))
    made.on("request", lambda request: made.asked.append(request.url))
    made.goto(address)
    made.get_by_text("34 tasks on 2 backbones").wait_for()
    yield made
    assert not made.problems
    # Nothing was asked of anybody else.
    assert all(url.startswith((address, "data:", "blob:")) for url in made.asked)
    context.close()


def drop(page, image, name="pet.png"):
    page.evaluate(DROP, [name, "image/png", base64.b64encode(image).decode()])


def test_a_dropped_image_is_answered_by_every_task_and_known_the_second_time(page):
    drop(page, picture(1))
    answer = page.locator("#answers article")
    answer.wait_for()
    assert answer.locator("section").count() == 33
    assert answer.get_by_role("heading", name="pet.png").is_visible()
    shares = answer.locator("section").first.get_by_role("meter")
    assert shares.count() == 3
    told = [float(m.get_attribute("value")) for m in shares.all()]
    assert sum(told) == pytest.approx(1, abs=1e-5) and told == sorted(told, reverse=True)
    assert "forward" in answer.locator(".times").inner_text()
    assert (
        answer.locator(".given img").evaluate("(i) => i.decode().then(() => i.naturalWidth)") == 48
    )
    drop(page, picture(1), "again.png")
    page.get_by_text("no forward").wait_for()
    assert page.locator("#history li").count() == 2
    page.get_by_role("button", name="Forget all").click()
    assert page.locator("#history li").count() == 0


def test_a_mask_lies_on_its_image_with_a_legend_and_its_strength_is_set_by_keys(page):
    page.get_by_role("button", name="None shown").click()
    page.get_by_label("Show tasks whose name has").fill("places")
    page.get_by_role("button", name="All shown").click()
    drop(page, picture(5))
    answer = page.locator("#answers article section")
    answer.wait_for()
    assert answer.get_by_role("heading", name="places").is_visible()
    image, mask = answer.locator(".laid img").all()
    for each in (image, mask):
        assert each.evaluate("(i) => i.decode().then(() => [i.naturalWidth, i.naturalHeight])") == [
            48,
            40,
        ]
    assert image.bounding_box() == mask.bounding_box()
    assert mask.get_attribute("alt")
    # The colours of the legend are those of the mask, where each class is as often as is told.
    shares = {
        row.locator(".swatch").evaluate("(i) => getComputedStyle(i).backgroundColor"): row
        for row in answer.locator(".choice").all()
    }
    pixels = mask.evaluate(
        """(i) => { const c = document.createElement("canvas"); [c.width, c.height] = [i.naturalWidth, i.naturalHeight];
        const d = c.getContext("2d"); d.drawImage(i, 0, 0); const p = d.getImageData(0, 0, c.width, c.height).data;
        const found = {}; for (let n = 0; n < p.length; n += 4) { const k = `rgb(${p[n]}, ${p[n + 1]}, ${p[n + 2]})`;
        found[k] = (found[k] || 0) + 1; } return found; }"""
    )
    answered = {k: n for k, n in pixels.items() if k != "rgb(224, 224, 192)"}
    assert answered.keys() == shares.keys()
    for colour, row in shares.items():
        told = float(row.get_by_role("meter").get_attribute("value"))
        assert told == pytest.approx(answered[colour] / sum(answered.values()), abs=1e-6)
        assert row.locator(".name").inner_text().strip()
    assert mask.evaluate("(i) => getComputedStyle(i).opacity") == "0.5"
    strength = answer.get_by_label("Strength of the mask")
    strength.focus()
    page.keyboard.press("Home")
    assert mask.evaluate("(i) => getComputedStyle(i).opacity") == "0"
    page.keyboard.press("ArrowRight")
    assert mask.evaluate("(i) => getComputedStyle(i).opacity") == "0.01"
    page.set_viewport_size({"width": 400, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_an_answer_is_shown_with_the_image_that_was_asked_about(page):
    held = []

    def hold(route):
        held.append(route)
        if len(held) > 1:
            route.continue_()

    def shown_width():
        image = page.locator("#answers article .given img")
        return image.evaluate("(i) => i.decode().then(() => i.naturalWidth)")

    page.route("**/v1/predict", hold)
    drop(page, picture(6, size=(30, 61)), "first.png")
    page.locator("#ask:disabled").wait_for()
    # Chosen, and not asked about yet.
    other = {"name": "second.png", "mimeType": "image/png", "buffer": picture(7, size=(30, 77))}
    page.set_input_files("#files", other)
    held[0].continue_()
    page.locator("#answers").get_by_text("first.png").wait_for()
    assert shown_width() == 61
    # Of two questions under way the answer to the later one stays, whichever comes first.
    held.clear()
    drop(page, picture(6, size=(30, 61)), "first.png")
    page.locator("#ask:disabled").wait_for()
    drop(page, picture(7, size=(30, 77)), "second.png")
    page.locator("#answers").get_by_text("second.png").wait_for()
    with page.expect_response("**/v1/predict"):
        held[0].continue_()
    page.locator("#history li").nth(2).wait_for()
    assert page.locator("#answers h2").all_inner_texts() == ["second.png"]
    assert shown_width() == 77
    assert page.locator("#history li").first.inner_text().startswith("first.png")


def test_an_error_is_told_and_the_page_goes_on(page):
    drop(page, b"no image")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "cannot be read" in alert.inner_text()
    drop(page, picture(size=(101, 100)))
    page.get_by_text("too many pixels").wait_for()
    drop(page, picture(2))
    page.locator("#answers article").wait_for()
    assert alert.is_hidden()


def test_tasks_are_filtered_and_chosen_by_keyboard_alone(page):
    page.get_by_role("button", name="None shown").click()
    page.get_by_label("Show tasks whose name has").focus()
    page.keyboard.type("more-07")
    assert page.locator("#task-list li:visible").count() == 1
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.get_by_label("Classes of each answer").fill("1")
    page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": picture(3)})
    page.get_by_role("button", name="Ask").focus()
    page.keyboard.press("Enter")
    page.locator("#answers article").wait_for()
    assert page.locator("#answers section h3").all_inner_texts() == ["more-07"]
    assert page.get_by_role("meter").count() == 1
    assert page.evaluate("document.activeElement.id") == "answers"


def test_a_text_is_answered_and_labels_are_shown_as_text(page):
    page.get_by_label("A text").fill("a good film <i>")
    page.keyboard.press("Control+Enter")
    answer = page.locator("#answers article")
    answer.wait_for()
    assert answer.get_by_role("heading", name="a good film <i>").is_visible()
    names = sorted(answer.locator(".name").all_inner_texts())
    assert names == ["<b>good</b>", "<img src=x onerror=alert(1)>"]
    assert answer.locator("b, img").count() == 0


def test_sounds_that_are_dropped_are_answered_after_the_images_and_can_be_played(browser, tmp_path):
    backbone = load_backbone(f"hf:{sounds.save('wav2vec2', tmp_path / 'model')}")
    tasks = {"owls": save_task(backbone, tmp_path / "owls.task"), **save_tasks(tmp_path, 1, False)}
    file = sounds.write(tmp_path / "owl.wav", sounds.tone(400))
    with running(serve.app(tasks)) as address:
        context = browser.new_context()
        page = context.new_page()
        refused = []
        page.on("console", lambda line: refused.append(line.text) if line.type == "error" else None)
        page.goto(address)
        page.get_by_text("Images or sounds: choose files").wait_for()
        page.set_input_files(
            "#files",
            [
                {"name": "owl.wav", "mimeType": "audio/wav", "buffer": file.read_bytes()},
                {"name": "owl.png", "mimeType": "image/png", "buffer": picture(1)},
            ],
        )
        page.get_by_role("button", name="Ask").click()
        page.locator("#answers article").nth(1).wait_for()
        assert page.locator("#answers h2").all_inner_texts() == ["owl.png", "owl.wav"]
        heard = page.locator("#answers article").nth(1)
        assert heard.locator("section h3").all_inner_texts() == ["owls"]
        player = heard.locator("audio[controls]")
        # The policy of the page lets it be loaded.
        player.evaluate(
            "(a) => a.readyState > 0 || new Promise((done, fail) => "
            "{ a.onloadedmetadata = done; a.onerror = () => fail(a.error.message); })"
        )
        assert not refused
        context.close()


def test_everything_has_a_name_and_enough_contrast_in_light_and_in_the_dark(page):
    drop(page, picture(4))
    page.locator("#answers article").wait_for()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, textarea, button, meter, img")].filter((e) =>
        !(e.labels?.length || e.ariaLabel || e.textContent.trim() || e.hasAttribute("alt"))).length"""
    )
    assert nameless == 0
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for part in ("body", ".times", "#ask", "#summary"):
            assert contrast(page, part) >= 4.5, (scheme, part)
    page.set_viewport_size({"width": 320, "height": 600})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def contrast(page, part):
    """Of a part's letters to what is behind them (WCAG 2)."""
    ink, ground = page.evaluate(
        """(part) => {
          let behind = document.querySelector(part);
          const ink = getComputedStyle(behind).color;
          const clear = "rgba(0, 0, 0, 0)";
          while (behind && getComputedStyle(behind).backgroundColor === clear) behind = behind.parentElement;
          return [ink, getComputedStyle(behind).backgroundColor];
        }""",
        part,
    )

    def light(colour):
        parts = [int(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        red, green, blue = [
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts
        ]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((light(ink), light(ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_interface_is_drawn_from_its_own_file(page):
    page.get_by_role("link", name="HTTP interface").click()
    page.get_by_role("heading", name="POST /v1/predict").wait_for()
    assert page.get_by_text("the first of them", exact=False).count() == 0
    assert page.locator("section").count() > 12

"""The page about a run in a real browser: wide and narrow, in light and dark, whatever names say."""

import itertools

import pytest
import torch
from PIL import Image

from browsing import launched
from restuning.problems import MultiLabel, Regression, Segmentation, SingleLabel
from restuning.report import Curve, Page, Shown, render

pytestmark = pytest.mark.slow

HOSTILE = [
    "<script>document.title='run'</script>",
    "<img src=https://example.com/x.png onerror=alert(1)>",
    "a-name-of-one-word-that-is-longer-than-any-telephone-is-wide-" * 2,
    "two words",
]
READABLE = 4.5
"""Contrast of text that WCAG 2.1 asks for (level AA)."""

CONTRASTS = """
() => {
  const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 ? m : [...m, 1]; };
  const light = ([r, g, b]) => { const f = (v) => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; };
    return .2126 * f(r) + .7152 * f(g) + .0722 * f(b); };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c[3] > .99) return c; } return [255, 255, 255, 1]; };
  return [...document.querySelectorAll("h1,h2,h3,p,th,td,dt,dd,a,figcaption,span.of,b,code,summary,caption,footer p")]
    .filter((e) => e.innerText.trim() && e.className !== "skip")
    .map((e) => { const a = light(parse(getComputedStyle(e).color)), b = light(behind(e));
      return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.tagName + " " + e.innerText.slice(0, 40)]; })
    .sort((x, y) => x[0] - y[0])[0];
}
"""


def make_page(problem, labels, logits, targets, metric):
    judge = problem.judge(labels)
    judge.update(logits, targets)
    judged = judge.conclude()
    images = [Image.new("RGB", (8, 8), (n * 9, 80, 120)) for n in range(len(judged.worst))]
    worst = [
        Shown(image if n % 4 else HOSTILE[n % 3], HOSTILE[n % 4]) for n, image in enumerate(images)
    ]
    lines = {
        "training": [(n, 1 / n) for n in range(1, 9)],
        "validation": [(n, 2 / n) for n in range(1, 9)],
    }
    return Page(
        *(HOSTILE[0], HOSTILE[1], metric, problem.noun, "test", judged),
        facts={"method": HOSTILE[2], "backbone": HOSTILE[0], "examples": "1 train + 2 test"},
        curves=[Curve("loss", lines), Curve("accuracy", lines, percent=True)],
        worst=worst,
        use={"On the command line": f"restuning predict {HOSTILE[2]} --task {HOSTILE[2]}"},
        settings={HOSTILE[2]: HOSTILE[1], "lr": 0.001},
        about={"weights": HOSTILE[0], "digest": "0" * 64},
        notes=[HOSTILE[2]],
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(90, 30, generator=draw)
    labels = [*HOSTILE, *(f"class {n}" for n in range(26))]
    truth = torch.randint(30, (90,), generator=draw)
    grids = torch.randn(9, 6, 6, 4, generator=draw)
    few, numbers = logits[:, :4], Regression([0.0] * 4, [1.0] * 4, [0.3] * 4)
    made = {
        "classes": make_page(SingleLabel(), labels, logits, truth, "accuracy"),
        "labels": make_page(
            MultiLabel(), HOSTILE, few, (few > 0.4).float(), "mean_average_precision"
        ),
        "numbers": make_page(numbers, HOSTILE, few, few * 2, "r2"),
        "masks": make_page(
            Segmentation(), HOSTILE, grids, (grids.argmax(-1) + 1).clamp(max=3), "mean_iou"
        ),
    }
    for name, page in made.items():
        (folder / f"{name}.html").write_text(render(page), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser():
    with launched() as opened:
        yield opened


@pytest.mark.parametrize("name", ["classes", "labels", "numbers", "masks"])
def test_a_report_fits_any_width_asks_nobody_and_is_read_in_light_and_dark(browser, pages, name):
    grounds = {}
    for width, scheme in itertools.product((400, 1200), ("light", "dark")):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        asked, problems = [], []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("pageerror", lambda error, problems=problems: problems.append(str(error)))
        page.on("console", lambda line, problems=problems: problems.append(line.text))
        page.on("dialog", lambda dialog, problems=problems: problems.append(dialog.message))
        page.goto((pages / f"{name}.html").as_uri())
        assert page.title().startswith("<script>")
        assert not problems
        assert all(url.startswith(("file:", "data:")) for url in asked)
        assert sum(url.startswith("file:") for url in asked) == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        least, where = page.evaluate(CONTRASTS)
        assert least >= READABLE, where
        # Text of drawings is as large as can be read.
        sizes = page.evaluate(
            "[...document.querySelectorAll('svg.plot:not(.matrix)')].map((s) => 12 * s.getBoundingClientRect().width"
            " / s.viewBox.baseVal.width)"
        )
        assert sizes and min(sizes) > 9
        # Input, truth and answer stand beside each other, however narrow the page is.
        for row in page.locator(".sheet .row").all()[1:3]:
            boxes = [each.bounding_box() for each in row.locator("img").all()]
            assert len(boxes) == 3 and len({box["y"] for box in boxes}) == 1
            assert all(box["width"] >= 60 for box in boxes)
        grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        context.close()
    assert grounds["light"] != grounds["dark"]

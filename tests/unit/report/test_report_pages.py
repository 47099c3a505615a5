"""The page about a run: what stands on it, whatever names say, and what every drawing is of."""

import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from restuning.problems import MultiLabel, Regression, SingleLabel
from restuning.problems.judged import Confusion, Judged, Pixels
from restuning.report import Curve, Page, Shown, render
from restuning.report.drawings import MOST_CLASSES, draw, draw_lines, find_ticks
from restuning.report.page import MOST_ROWS

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "a\x1b[31m\u202eb",
    "&amp;{{ 7*7 }}",
]
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Tags with their attributes, the text, and whether all that opens is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def judge(problem, labels, logits, targets):
    made = problem.judge(labels, 1.5)
    made.update(logits, targets)
    return made.conclude()


def page(judged, metric, worst=(), **more):
    told = {
        "title": HOSTILE[0],
        "lead": HOSTILE[1],
        "metric": metric,
        "noun": "classes",
        "split": "test",
        "judged": judged,
        "facts": {"answers": HOSTILE[2]},
        "curves": [Curve(HOSTILE[0], {"training": [(1, 2.0), (2, 1.0)], "validation": [(2, 1.5)]})],
        "worst": worst,
        "use": {"On the command line": HOSTILE[1]},
        "settings": {HOSTILE[0]: HOSTILE[3], "lr": 0.001, "clip": None},
        "about": {"weights": HOSTILE[2]},
        "notes": [HOSTILE[0]],
    }
    return Page(**{**told, **more})


@pytest.fixture(scope="module")
def classes():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4, generator=generator)
    return judge(SingleLabel(), HOSTILE, logits, torch.randint(4, (50,), generator=generator))


@pytest.fixture(scope="module")
def hostile_page(classes):
    shown = [Image.new("RGB", (8, 8)), Image.new("RGB", (300, 200)), HOSTILE[0], None]
    worst = [Shown(shown[n % 4], HOSTILE[n % 4]) for n in range(len(classes.worst))]
    return render(page(classes, "accuracy", worst))


def test_names_that_are_html_are_text_and_nothing_is_run_or_fetched(hostile_page):
    read = Reader(hostile_page)
    kinds = {tag for tag, _ in read.tags}
    assert not kinds & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for _, attributes in read.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/"))
    told = "".join(read.text)
    assert HOSTILE[0] in told and HOSTILE[1] in told
    assert "&amp;{{ 7*7 }}" in told
    assert "\x1b" not in hostile_page and "\u202e" not in hostile_page
    assert r"\x1b[31m\u202eb" in told
    (policy,) = (a for _, a in read.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy["content"]
    assert "url(" not in hostile_page and "@import" not in hostile_page


def test_the_page_has_landmarks_headers_and_words_for_every_picture(hostile_page):
    read = Reader(hostile_page)
    kinds = [tag for tag, _ in read.tags]
    assert [kinds.count(tag) for tag in ("main", "header", "footer", "nav", "h1")] == [1] * 5
    assert dict(read.tags)["html"]["lang"] == "en"
    assert all(a.get("scope") in ("col", "row") for tag, a in read.tags if tag == "th")
    assert all(a.get("alt") for tag, a in read.tags if tag == "img")
    assert all(a["role"] == "img" and a["aria-label"] for tag, a in read.tags if tag == "svg")
    named = {a["id"] for _, a in read.tags if "id" in a}
    asked = {a["href"][1:] for tag, a in read.tags if tag == "a"}
    asked |= {a["aria-labelledby"] for _, a in read.tags if "aria-labelledby" in a}
    assert asked <= named
    assert len(named) == sum("id" in a for _, a in read.tags)


def test_figures_stand_beside_those_of_a_constant_answer(classes, hostile_page):
    told = " ".join(Reader(hostile_page).text)
    for name in ("accuracy", "nll"):
        share = name in classes.shares
        for value in (classes.figures[name], classes.constant[name]):
            assert (f"{100 * value:.1f}%" if share else f"{value:.4g}") in told
    assert "0.001" in told


def test_labels_numbers_and_nothing_at_all_have_a_page():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(30, 2, generator=generator)
    labels = judge(MultiLabel(), ["x", "y"], logits, (logits.roll(1, 0) > 0).float())
    assert "average precision" in render(page(labels, "mean_average_precision"))
    numbers = judge(Regression([0.0, 0.0], [1.0, 2.0], [0.5, 0.5]), ["x", "y"], logits, 2 * logits)
    text = render(page(numbers, "r2"))
    # A curve, and each number as it is and as it was answered.
    assert text.count("<svg") == 3
    Reader(text)
    nothing = render(page(None, "accuracy", curves=[]))
    assert "nothing was tested" in nothing and "<svg" not in nothing
    one = Judged(
        3,
        {"mean_iou": 0.5},
        shares=["mean_iou"],
        pictures=[Pixels("mask", "a mask", torch.zeros(4, 4, 3, dtype=torch.uint8))],
    )
    told = render(page(one, "mean_iou"))
    assert "50.0%" in told and 'alt="a mask"' in told


def test_of_many_classes_pairs_are_told_and_the_worst_rows_come_first():
    count = MOST_CLASSES + 5
    names = [f"class {n}" for n in range(count)]
    labels = torch.arange(count).repeat(3)
    logits = torch.nn.functional.one_hot(labels, count).float()
    logits[7], logits[7 + count] = 0, 0
    logits[[7, 7 + count], 9] = 1
    judged = judge(SingleLabel(), names, logits, labels)
    assert draw(judged.pictures[0]) is None
    told = render(page(judged, "accuracy"))
    assert "2 of 3" in told
    rows = re.findall(r'<th scope="row"><bdi>(class \d+)</bdi>', told)
    assert rows[0] == "class 7"
    assert len(rows) == MOST_ROWS + count


def test_a_drawing_says_in_words_what_is_to_be_seen():
    svg = draw(Confusion(torch.tensor([[3, 1], [0, 4]]), ["<cat>", "dog"]))
    assert (
        'aria-label="True classes in rows, answers in columns. &lt;cat&gt; answered as dog 1 of 4 times"'
        in svg
    )
    assert "<cat>" not in svg
    lines = draw_lines("loss", {"training": [(1, 1.0), (2, 0.5)]}, "epoch")
    assert "training ends at 0.5" in lines


@pytest.mark.parametrize(
    ("least", "most"), [(0, 1), (0.2, 0.21), (-3, 1e6), (5, 5), (0, 0), (float("nan"), 1), (1, 100)]
)
def test_ticks_are_round_few_and_hold_what_is_shown(least, most):
    ticks = find_ticks(least, most, 5)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    if least < most:
        assert ticks[0] <= least and most <= ticks[-1]
    assert all(float(f"{tick:.12g}") == tick for tick in ticks)
